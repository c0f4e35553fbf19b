"""docs/mixed-precision.md: the bits it shows are what plans of a 70B count, and the budget prints what it shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from quantconvert.cli.output import size_rows
from quantconvert.options import JobOptions, read_group
from tests.llama_shapes import write_llama_70b

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "mixed-precision.md").read_text()
COSTS = PAGE.partition("## What a layer costs")[2].partition("## By budget")[0]
ROWS = re.findall(r"^\| (nothing|`--.*`) \| (\d\.\d{3}) \| (\d\.\d{3})? ?\|$", COSTS, re.M)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_70b(tmp_path_factory.mktemp("large") / "70b")


def options_of(text: str) -> dict[str, Any]:
    """What a row of the table says on the command line, as keyword arguments."""
    words = [] if text == "nothing" else shlex.split(text.strip("`").replace(r"\|", "|"))
    found: dict[str, Any] = {}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        (option,) = (option for option in read_group(JobOptions).values() if flag in option.flags)
        found[option.name] = option.checked(option.from_text(value))
    return found


def test_the_table_has_all_its_rows():
    assert len(ROWS) == 7


@pytest.mark.parametrize(("asked", "bits", "more"), ROWS)
def test_bits_of_a_70b_are_what_the_page_says(model: Path, asked: str, bits: str, more: str):
    plan = quantconvert.plan(model, format="compressed-tensors", **options_of(asked))
    assert f"{plan.bits_per_quantized_weight:.3f}" == bits
    assert f"{plan.bits_per_quantized_weight - 4.125:.3f}" == (more or "0.000")


def test_a_part_of_one_layer_takes_less_than_a_twentieth_of_a_bit(model: Path):
    parts = [row for row in ROWS if r"layers\.79" in row[0]]
    assert len(parts) == 3
    for asked, *_ in parts:
        plan = quantconvert.plan(model, format="compressed-tensors", **options_of(asked))
        assert 0 < plan.bits_per_quantized_weight - 4.125 < 0.05


def test_the_budget_prints_what_is_shown():
    plan = quantconvert.plan(ROOT / "examples" / "tiny-llama", target_bits=4.5, symmetric=False)
    shown = re.findall(r"^    (budget|  noise left|  curve) +(.*)$", PAGE, re.M)
    assert len(shown) == 3
    assert dict(shown).items() <= dict(size_rows(plan)).items()
