"""The YAML of a source's model card: bounded, plain, and never the reason that a conversion fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantconvert
from quantconvert.card import render_card
from quantconvert.metadata import metadata_block, split_card
from tests.hostile.build import CONFIG, good

PAIRS = list(zip("abcdefgh", "bcdefghi", strict=True))
LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in PAIRS)
MERGES = "a: &a {k: v}\n" + "".join(f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}\n" for a, b in PAIRS)

HOSTILE = {
    "laughs": LAUGHS,
    "laughs as tags": LAUGHS + "tags: *i\n",
    "merges": MERGES,
    "python tag": "a: !!python/object/apply:os.system ['true']\n",
    "own tag": "a: !x 1\n",
    "binary": "a: !!binary aGk=\n",
    "set": "a: !!set {x, y}\n",
    "deep": "a: " + "[" * 40_000 + "\n",
    "deep enough to parse": "a: " + "[" * 25 + "]" * 25 + "\n",
    "large": "a: '" + "x " * 60_000 + "'\n",
    "many": "a: [" + "1," * 22_000 + "]\n",
    "digits": "a: " + "9" * 9000 + "\n",
    "sexagesimal": "a: 1" + ":59" * 9000 + "\n",
    "number as key": "1: a\n",
    "list as key": "? [a]\n: b\n",
    "list": "- a\n",
    "text": "model\n",
    "not YAML": "a: b: c: {\n",
    "lines": "\n" * 500_000,
    "control characters": "a: \x07\n",
}  # fmt: skip

KEPT = {
    "names of methods": ("to_dict: 1\nself: 2\nignore_metadata_errors: true\n", {"to_dict": 1, "self": 2}),
    "tags no list": ("tags: 5\n", {}),
    "tags of maps": ("tags:\n- a: 1\n- [b]\n- c\n", {"tags": ["c", "awq", "4-bit", "quantconvert"]}),
    "tags a text": ("tags: abc\n", {"tags": ["awq", "4-bit", "quantconvert"]}),
    "results": ("license: mit\nmodel-index: &a\n- x: [*a, {\nlanguage: en\n", {"license": "mit", "language": "en"}),
    "half a pair": ('license: "\\ud800"\n', {}),
    "dates": ("date: 2024-01-01\nlicense: mit\n", {"license": "mit"}),
    "base model": ("base_model:\n- a/b\n- c/d\n", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good(tmp_path_factory.mktemp("card") / "source")


def card_of(source: Path, front: str) -> str:
    """The result's card where the source's card begins with these lines."""
    (source / "README.md").write_text(f"---\n{front}---\n# Text of old\n")
    card = render_card(quantconvert.plan(source))
    card.encode()
    assert "# Text of old" in card or len(front) > 900_000
    return card


@pytest.mark.parametrize("front", HOSTILE.values(), ids=HOSTILE)
def test_metadata_that_is_not_read(source: Path, front: str) -> None:
    """The text stays, the new card's own metadata is there, and nothing of theirs."""
    assert split_card(f"---\n{front}---\n# Text")[0] == {}
    metadata, _ = split_card(card_of(source, front))
    assert metadata == {"tags": ["awq", "4-bit", "quantconvert"]}


@pytest.mark.parametrize(("front", "expected"), KEPT.values(), ids=KEPT)
def test_metadata_that_is_kept(source: Path, front: str, expected: dict[str, object]) -> None:
    metadata, _ = split_card(card_of(source, front))
    assert metadata | expected == metadata
    assert not {"base_model", "base_model_relation"} & metadata.keys()


def test_plain_metadata_goes_through() -> None:
    metadata = {
        "license": "mit",
        "language": ["en", "zh"],
        "widget": [{"text": "Zürich: *a* & b"}],
        "x": 1.5,
        "y": None,
    }
    assert split_card(f"---\n{metadata_block(metadata)}---\nText\n") == (metadata, "Text\n")
    assert split_card("\ufeff---\r\nlicense: mit\r\n---\r\nText") == ({"license": "mit"}, "Text")
    assert split_card("# No metadata\n---\na: b\n---\n") == ({}, "# No metadata\n---\na: b\n---\n")
    assert split_card("---\na: b\n") == ({}, "---\na: b\n")
    assert split_card(None) == ({}, "")


def test_a_quantized_source_cannot_write_into_the_card(tmp_path: Path) -> None:
    """`base_model` of a quantized source goes into the new card: one name, or nothing."""
    quantconvert.convert(good(tmp_path / "source"), tmp_path / "quantized")
    for name in ("a/b | x |\\n\\n# Injected", "[x](javascript:y)", "../../x", "a/b/c"):
        text = f"---\nbase_model: {json.dumps(name)}\n---\n".replace("\\\\n", "\\n")
        (tmp_path / "quantized" / "README.md").write_text(text)
        quantconvert.repack(tmp_path / "quantized", tmp_path / "out", "rtn", overwrite=True)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "Injected" not in card
        assert "| base model |" not in card
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["model_type"] == "llama"
