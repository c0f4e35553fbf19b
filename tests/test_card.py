"""The model card: one first heading, what can be published, quality, and the base card as a part."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import quantconvert
from quantconvert.card import BASE_NOTE, command_of
from quantconvert.markdown import demoted
from quantconvert.verification.findings import Quality, TensorError
from tests.builders import write_checkpoint

OLD = """---
license: mit
---
# Old <model>

Text with `# no heading`.

```bash
# a comment, no heading
```

## Use

Setext
======

- item
---
<h1 align="center">Big</h1>
"""


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def headings(card: str, level: int) -> list[str]:
    """Headings of a level outside of code, HTML ones too."""
    text = re.sub(r"(?ms)^(`{3,}).*?^\1", "", card)
    return re.findall(rf"(?m)^#{{{level}}} (.*)$", text) + re.findall(rf"<h{level}[^>]*>(.*?)</h{level}>", text)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "private-name-of-a-project")
    (folder / "README.md").write_text(OLD)
    return folder


def test_one_first_heading_and_the_base_card_below(source: Path, tmp_path: Path) -> None:
    quantconvert.convert(source, tmp_path / "out")
    card = card_of(tmp_path / "out")
    assert headings(card, 1) == ["llama, quantized"]
    assert headings(card, 2) == ["Load it", "How it was made", "Quality", "Card of the base model"]
    assert headings(card, 3) == ["Old <model>", "Setext", "Big"]
    assert headings(card, 4) == ["Use"]
    assert "\n# a comment, no heading\n" in card
    assert source.name not in card
    assert re.search(r"\| size \| \S+ kB -> \S+ kB, \d\.\d\d bits per weight \|", card)


def test_a_card_of_a_card_keeps_the_base_s_text_once(source: Path, tmp_path: Path) -> None:
    quantconvert.convert(source, tmp_path / "a")
    quantconvert.repack(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    quantconvert.dequantize(tmp_path / "b", tmp_path / "c", "float32")
    tail = card_of(tmp_path / "a").partition("## Card of the base model")[2]
    assert tail.count(BASE_NOTE) == 1
    for name in ("b", "c"):
        assert card_of(tmp_path / name).partition("## Card of the base model")[2] == tail
    assert "\nquantconvert repack SRC OUT --format compressed-tensors\n" in card_of(tmp_path / "b")
    assert "\nquantconvert dequantize SRC OUT --dtype float32\n" in card_of(tmp_path / "c")
    assert "## Quality" not in card_of(tmp_path / "b")


def test_quality_is_the_report_s(source: Path, tmp_path: Path) -> None:
    result = quantconvert.convert(source, tmp_path / "out")
    assert result.quality
    found = quantconvert.verify(tmp_path / "out", source).errors
    sqnr = [error.sqnr for error in found if error.sqnr is not None]
    assert result.quality.num_weights == len(sqnr) == 14
    assert result.quality.mean_sqnr == pytest.approx(sum(sqnr) / len(sqnr), abs=0.01)
    assert (result.quality.worst_sqnr, result.quality.worst_name) == min((e.sqnr, e.name) for e in found if e.sqnr)
    assert f"| mean of 14 weights | {result.quality.mean_sqnr:.1f} dB |" in card_of(tmp_path / "out")


def test_quality_of_exact_weights() -> None:
    assert Quality.of([]) is None
    assert Quality.of([TensorError("x", "", 0.0, 0.0, None)]) is None


def test_the_base_model_is_a_repository_or_nothing(source: Path, tmp_path: Path) -> None:
    quantconvert.convert(source, tmp_path / "a")
    assert "base_model" not in card_of(tmp_path / "a")
    quantconvert.convert(source, tmp_path / "b", base_model="org/model")
    card = card_of(tmp_path / "b")
    assert "\nbase_model: org/model\n" in card
    assert "base_model_relation: quantized" in card
    assert headings(card, 1) == ["model, quantized"]
    assert "\nquantconvert SRC OUT --base-model org/model\n" in card


def test_the_command_asks_again_what_a_quantized_source_needs(source: Path, tmp_path: Path) -> None:
    quantconvert.convert(source, tmp_path / "eight", bits=8)
    assert command_of(quantconvert.plan(source, requantize=True)) == "quantconvert SRC OUT"
    plan = quantconvert.plan(tmp_path / "eight", requantize=True)
    assert command_of(plan) == "quantconvert SRC OUT --requantize"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# A\n## B", "### A\n#### B"),
        ("### A\n#### B", "### A\n#### B"),
        ("A\n---\ntext", "### A\ntext"),
        ("- a\n---\n\n---\ntext", "- a\n---\n\n---\ntext"),
        ("| a |\n|---|\n", "| a |\n|---|"),
        ("~~~\n# a\n```\n~~~\n# b", "~~~\n# a\n```\n~~~\n### b"),
        ("###### deep\n# top", "###### deep\n### top"),
        ("#hashtag", "#hashtag"),
    ],
)
def test_demoted(text: str, expected: str) -> None:
    assert demoted(text, 3) == expected
