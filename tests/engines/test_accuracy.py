"""The accuracy benchmark: figures that stand in the order that theory gives them, rows that a version lacks by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import accuracy
from tests.engines.common import EXAMPLES, TINY_LLAMA

OUTLIERS = EXAMPLES / "outlier-llama"
FEW = ("--windows", "6")


def measured(model: Path, tmp_path: Path, *words: str):
    """What the benchmark writes as JSON of one model."""
    accuracy.main([str(model), "--json", str(tmp_path / "found.json"), *words])
    return json.loads((tmp_path / "found.json").read_text())[str(model)]


def test_int8_loses_less_than_int4_and_more_with_its_activations_rounded(tmp_path: Path, capsys):
    rows = ("int8 per channel, RTN", "W8A8, RTN")
    found = measured(TINY_LLAMA, tmp_path, *FEW, *(word for row in rows for word in ("--only", row)))["rows"]
    kl = [found[name]["kl"][0] for name in (*rows, accuracy.BASELINE.name)]
    assert 0 < kl[0] < kl[1] / 4 < kl[2] / 4
    assert found[rows[0]]["of_rtn"][0] == pytest.approx(kl[0] / kl[2])
    assert all(0 < found[name]["kl"][1] < found[name]["kl"][0] / 2 for name in found)
    assert [round(found[name]["bits_per_weight"], 2) for name in found] == [4.16, 8.06, 8.06]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["method", *found]


def test_equalizing_removes_what_outliers_cost(tmp_path: Path):
    """Issue's bound: at most 0.6 of round-to-nearest where there are outlier channels; nothing where there are none."""
    row = "int4 asymmetric, equalize"
    ratios = [measured(m, tmp_path, *FEW, "--only", row)["rows"][row]["of_rtn"] for m in (OUTLIERS, TINY_LLAMA)]
    assert ratios[0][0] + 2 * ratios[0][1] < 0.6
    assert abs(ratios[1][0] - 1) < 0.2


def test_rows_that_this_version_lacks_are_named(tmp_path: Path, capsys, monkeypatch):
    rows = (
        accuracy.BASELINE,
        accuracy.Row("of a later version", {"scheme": "W4A16", "no_such_option": True}),
        accuracy.Row("of another kind", {"scheme": "W4A16", "method": "no_such_method"}),
        accuracy.Row("with text", {"scheme": "W4A16"}, "text"),
    )
    monkeypatch.setattr(accuracy, "ROWS", rows)
    found = measured(TINY_LLAMA, tmp_path, *FEW)
    assert list(found["rows"]) == [accuracy.BASELINE.name]
    assert list(found["left_out"]) == [row.name for row in rows[1:]]
    assert "no_such_option" in found["left_out"]["of a later version"]
    out = capsys.readouterr().out
    assert all(f"- {name}: {reason}" in out for name, reason in found["left_out"].items())


def test_a_row_that_does_not_exist_is_refused():
    with pytest.raises(SystemExit, match="no row is named so"):
        accuracy.main([str(TINY_LLAMA), "--only", "int3"])


def test_too_little_text_is_refused(tmp_path: Path):
    (tmp_path / "text").write_text("too little")
    with pytest.raises(SystemExit, match="10 tokens of text are less than two windows of 256"):
        accuracy.main([str(TINY_LLAMA), "--text", str(tmp_path / "text")])


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A random model of 192 columns, which 128 does not divide, whose tokenizer puts a start token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=192, intermediate_size=256, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=3, bos_token_id=256, eos_token_id=257, pad_token_id=258, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "narrow")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, tmp_path / "narrow")
    path = tmp_path / "narrow" / "tokenizer.json"
    pieces = [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|bos|>": {"id": "<|bos|>", "ids": [256], "tokens": ["<|bos|>"]}}
    processor = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    return tmp_path / "narrow"


def test_narrow_layers_get_groups_of_64_and_windows_a_start_token(narrow: Path, tmp_path: Path):
    ids = accuracy.cut(narrow, "ab" * 64, 32, 3)
    assert ids.shape == (3, 33)
    assert ids[:, 0].tolist() == [256] * 3
    assert bytes(ids[0, 1:].tolist()) == b"ab" * 16
    found = measured(narrow, tmp_path, "--windows", "2", "--only", "defaults")
    # q, k, v, o (192^2 each) and gate, up (192 * 256 each) in groups of 64, down in groups of 128: a scale of 16 bits
    # and a zero point of 4 a group; padding of packed zero points not counted
    weights, wide = 4 * 192**2 + 3 * 192 * 256, 192 * 256
    expected = 4 + 20 * ((weights - wide) / 64 + wide / 128) / weights
    assert found["rows"][accuracy.BASELINE.name]["bits_per_weight"] == pytest.approx(expected, rel=0.01)


def test_what_is_kept_changes_no_figure(monkeypatch):
    text = (EXAMPLES / "heldout.txt").read_text()
    kept = accuracy.Reference(TINY_LLAMA, text, 64, 3, "cpu")
    monkeypatch.setattr(accuracy.Reference, "KEPT", 0)
    anew = accuracy.Reference(TINY_LLAMA, text, 64, 3, "cpu")
    other = accuracy.load(OUTLIERS, "cpu")
    scores = [reference.compare(other) for reference in (kept, kept, anew)]
    assert torch.equal(scores[0].kl_N, scores[1].kl_N)
    assert torch.equal(scores[0].kl_N, scores[2].kl_N)
    assert kept.nll() == anew.nll()
    again = kept.compare(kept.model)
    assert again.kl_N.abs().max() < 1e-6
    assert again.extra_nll_N.abs().max() < 1e-6


def test_the_ratio_has_an_error_of_its_own():
    """Of two rows that lose the same on each window, twice as much: exactly 2."""
    base = accuracy.Scores(torch.tensor([1.0, 2.0, 3.0]).double(), torch.zeros(3))
    twice = accuracy.Scores(2 * base.kl_N, torch.zeros(3))
    other = accuracy.Scores(torch.tensor([3.0, 4.0, 5.0]).double(), torch.zeros(3))
    assert twice.ratio(base) == (2.0, 0.0)
    # residuals 3 - 2, 4 - 4, 5 - 6: deviation 1, over the root of 3 and the base's mean 2
    assert other.ratio(base) == pytest.approx((2.0, 1 / 3**0.5 / 2))
    assert accuracy.with_error(0.12345, 0.00678) == "0.1235 ± 0.0068"
    assert accuracy.with_error(12.3, 14.0) == "12 ± 14"
