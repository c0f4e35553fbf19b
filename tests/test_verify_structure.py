"""Index, files and config that contradict the tensors are findings, whatever the config holds; never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from quantconvert.verification import Verification
from tests.builders import LLAMA_CONFIG, llama_tensors, write_checkpoint

INDEX, REPORT, SINGLE = "model.safetensors.index.json", "quantconvert.json", "model.safetensors"
O_PROJ = "model.layers.0.self_attn.o_proj"
LAYOUTS = ("awq", "gptq", "compressed-tensors", "rtn")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Converted with one module kept; made once, copied before it is written to."""
    root = tmp_path_factory.mktemp("structure")
    source = write_checkpoint(root / "in", llama_tensors(layers=1), LLAMA_CONFIG | {"num_hidden_layers": 1})

    def make(layout: str, size: str) -> Path:
        out = root / f"{layout}-{size}"
        if not out.exists():
            quantconvert.convert(source, out, format=layout, group_size=64, ignore=["*.o_proj"], max_shard_size=size)
        return out

    return make


@pytest.fixture
def copy(results: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def make(layout: str = "awq", size: str = "5GB") -> Path:
        return shutil.copytree(results(layout, size), tmp_path / "copy")

    return make


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed))


def structure(found: Verification) -> list[tuple[str, str]]:
    return [(f.where, f.message) for f in found.findings if f.check == "structure"]


INDEXES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "wrong file": (lambda v: v["weight_map"].update({"model.norm.weight": v["weight_map"]["lm_head.weight"]}), "norm"),
    "no such file": (lambda v: v["weight_map"].update({"model.norm.weight": "none.safetensors"}), "none.safetensors"),
    "lacks a tensor": (lambda v: v["weight_map"].pop("model.norm.weight") and None, "model.norm.weight"),
    "names a tensor that is none": (lambda v: v["weight_map"].update({"x": next(iter(v["weight_map"].values()))}), "x"),
    "total": (lambda v: v["metadata"].update(total_size=v["metadata"]["total_size"] + 1), "total_size"),
    "total is text": (lambda v: v["metadata"].update(total_size="1"), "total_size"),
    "metadata is a list": (lambda v: v.update(metadata=[1]), "metadata"),
    "no map": (lambda v: v.pop("weight_map") and None, "weight_map"),
    "a list": (lambda v: [1], "object"),
}


@pytest.mark.parametrize("change", INDEXES)
def test_index(change: str, copy: Callable[..., Path]):
    out, (work, expected) = copy("awq", "40KB"), INDEXES[change]
    files = sorted(path.name for path in out.glob("*.safetensors"))
    if change == "wrong file":
        index = json.loads((out / INDEX).read_text())["weight_map"]
        other = next(name for name in files if name != index["model.norm.weight"])
        edit(out / INDEX, lambda v: v["weight_map"].update({"model.norm.weight": other}))
    else:
        edit(out / INDEX, work)
    found = quantconvert.verify(out)
    assert found.failed == "structure"
    assert any(expected in where + message for where, message in structure(found))


@pytest.mark.parametrize("content", ["[]", "{", '{"metadata": [], "weight_map": []}', '{"weight_map": {"a": "b"}}'])
def test_index_beside_a_single_file(content: str, copy: Callable[..., Path]):
    """Engines prefer the one or the other; the reader here takes the file, and still looks at the index."""
    out = copy()
    (out / INDEX).write_text(content)
    assert any(INDEX in where + message for where, message in structure(quantconvert.verify(out)))


def test_another_file_beside(copy: Callable[..., Path]):
    out = copy("awq", "40KB")
    shutil.copy(next(out.glob("*.safetensors")), out / "extra.safetensors")
    assert "extra.safetensors" in dict(structure(quantconvert.verify(out)))


def groups(block: dict[str, Any]) -> dict[str, Any]:
    """Where the fields of a scheme stand."""
    return block["config_groups"]["group_0"]["weights"] if "config_groups" in block else block


@every_layout
@pytest.mark.parametrize("size", [32, 128, -1])
def test_another_group_size(layout: str, size: int, copy: Callable[..., Path]):
    out = copy(layout)
    edit(out / "config.json", lambda v: groups(v["quantization_config"]).update(group_size=size))
    assert structure(quantconvert.verify(out))


@every_layout
def test_other_bits(layout: str, copy: Callable[..., Path]):
    out = copy(layout)
    name = "num_bits" if layout == "compressed-tensors" else "bits"
    edit(out / "config.json", lambda v: groups(v["quantization_config"]).update({name: 8}))
    assert structure(quantconvert.verify(out))


def ignored(block: dict[str, Any]) -> Any:
    """The entries that leave modules alone, and how one is written."""
    if block["quant_method"] in ("awq", "gptq"):
        return block["dynamic"]
    return block["ignore" if "ignore" in block else "modules_to_not_convert"]


@every_layout
def test_an_ignored_module_that_the_config_forgets(layout: str, copy: Callable[..., Path]):
    def forget(value: Any) -> None:
        block = value["quantization_config"]
        entries = ignored(block)
        for entry in [e for e in entries if "o_proj" in e]:
            entries.pop(entry) if isinstance(entries, dict) else entries.remove(entry)
        block.pop("modules_to_not_convert", None) if layout == "awq" else None

    out = copy(layout)
    edit(out / "config.json", forget)
    assert (O_PROJ, "is plain, but quantization_config says it is quantized") in structure(quantconvert.verify(out))


@every_layout
def test_a_quantized_module_that_the_config_ignores(layout: str, copy: Callable[..., Path]):
    regex = r".*layers\.\d+\.mlp\.up_proj$"

    def add(value: Any) -> None:
        entries = ignored(value["quantization_config"])
        if isinstance(entries, dict):
            entries[f"-:{regex}"] = {}
        else:
            entries.append(f"re:{regex}" if layout == "compressed-tensors" else regex)

    out = copy(layout)
    edit(out / "config.json", add)
    expected = ("model.layers.0.mlp.up_proj", "is quantized, but quantization_config leaves it alone")
    assert expected in structure(quantconvert.verify(out))


HOSTILE: tuple[Any, ...] = (
    "(", "(a+)+$", "(.*a){30}$", "(" * 3000, "a{99999999999}", "x" * 20000, "(?P<a>)(?P<a>)", "[", "\\", "\ud800",
    1, None, True, [], {}, [["a"]], {"a": [1]}, 1.5, "", -1, 10**400, {"weights": 1}, {"weights": {"group_size": "x"}},
)  # fmt: skip


def spots(block: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a value."""
    items = block.items() if isinstance(block, dict) else enumerate(block) if isinstance(block, list) else ()
    return [place for key, item in items for place in [(*path, key), *spots(item, (*path, key))]]


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@every_layout
def test_hostile_configs_give_findings(layout: str, copy: Callable[..., Path]):
    """Any value in any place, as a key of `dynamic` and as an entry too: findings, at once, and no traceback."""
    out = copy(layout)
    (out / REPORT).rename(out / "kept.json")
    original = json.loads((out / "config.json").read_text())
    for i, place in enumerate(spots(original["quantization_config"])):
        for hostile in HOSTILE[i % 2 :: 2]:
            config = json.loads(json.dumps(original))
            inner = config["quantization_config"]
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = hostile
            (out / "config.json").write_text(json.dumps(config))
            json.dumps(quantconvert.verify(out).to_json())
    for hostile in HOSTILE:
        config = json.loads(json.dumps(original))
        block = config["quantization_config"]
        entries = ignored(block)
        if isinstance(entries, dict):
            entries[f"-:{hostile}"] = hostile
        else:
            entries.insert(0, f"re:{hostile}" if layout == "compressed-tensors" else hostile)
        (out / "config.json").write_text(json.dumps(config))
        found = quantconvert.verify(out)
        if isinstance(hostile, str) and hostile not in ("", "\\"):
            assert not found.is_ok, hostile


def test_inspect_tells_of_quantized_activations(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in")
    quantconvert.convert(source, tmp_path / "out", scheme="W8A8")
    (line,) = quantconvert.inspect(tmp_path / "out").schemes
    assert line.startswith("int8 per channel symmetric, int8 activations: Linear")
