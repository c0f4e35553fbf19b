"""Sources that say they are quantized: their quantization_config is as hostile as anything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from quantconvert import QuantConvertError, UnsupportedError
from quantconvert.patterns import check_foreign
from tests.hostile.build import CONFIG, good

ODD: tuple[Any, ...] = (None, True, -1, 0, 3, 2**70, 1e999, "x", "\x1b[2J", [], [1], {}, {"a": 1}, [[]], {"re:(": {}})


@pytest.fixture(scope="module", params=["awq", "compressed-tensors", "gptq", "rtn"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    quantconvert.convert(good(folder / "source"), folder / "out", format=request.param)
    return folder / "out"


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a config, the containers too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in leaves(inner, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


def answer(run: Callable[[], Any]) -> str | None:
    """What a call says when it refuses; anything but a refusal of ours goes through."""
    try:
        found = run()
    except QuantConvertError as error:
        return str(error)
    assert len(str(getattr(found, "schemes", ""))) < 5000
    return None


def test_odd_values_everywhere_never_crash(quantized: Path, tmp_path: Path) -> None:
    """`inspect` shows it on a line, `plan` and `repack` refuse it, or it does not matter."""
    config = json.loads((quantized / CONFIG).read_text())
    refused = 0
    for i, place in enumerate(leaves(config["quantization_config"])):
        for odd in ODD[i % 3 :: 3]:
            (quantized / CONFIG).write_text(json.dumps(put(config, ("quantization_config", *place), odd)))
            for run in (
                lambda: quantconvert.inspect(quantized),
                lambda: quantconvert.plan(quantized),
                lambda: quantconvert.repack(quantized, quantized, "rtn"),  # refused at the latest for its place
            ):
                said = answer(run)
                refused += said is not None
                assert said is None or all(c == "\n" or c.isprintable() for c in said)
    (quantized / CONFIG).write_text(json.dumps(config))
    assert refused > 20


@pytest.mark.parametrize(
    "regex", ["(a+)+$", "(?:.*)*x", "[" * 10_001, "(a|aa){2,}", "re:(.*a){20}", ".*" * 9, r"\d+" * 9]
)
def test_patterns_that_take_forever(regex: str) -> None:
    with pytest.raises(UnsupportedError, match="could take forever to match"):
        check_foreign(regex)


@pytest.mark.parametrize("regex", [r"re:.*\.layers\.\d+\.mlp\.(gate|up)_proj$", r"re:(.*\.)?[)*+]+x\)+", "Linear"])
def test_patterns_of_writers(regex: str) -> None:
    assert check_foreign(regex) == regex


def test_a_hostile_pattern_in_a_source(tmp_path: Path) -> None:
    quantconvert.convert(good(tmp_path / "source"), tmp_path / "quantized", format="compressed-tensors")
    config = json.loads((tmp_path / "quantized" / CONFIG).read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:(.+)+(.+)+!"]
    (tmp_path / "quantized" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="could take forever"):
        quantconvert.dequantize(tmp_path / "quantized", tmp_path / "out")
