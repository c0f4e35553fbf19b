"""Equalization: the recipe, factors that what gives a vector takes exactly, and what a conversion promises with it."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert.errors import QuantConvertError
from quantconvert.events import Event, Progress
from quantconvert.factors import FACTORS
from quantconvert.factors.recipe import FLOAT16_ROOM, calm_norm, calm_rows, clamped, equalize, power_of_two, settled
from quantconvert.sources.steps.scale import Heads
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, weight, write_checkpoint
from tests.equalized import NORM, OPTIONS, OUT, Q, V, factors_of, loud
from tests.snapshots import digests


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("loud") / "in", loud())


# The recipe.


def by_hand(weights: list[Tensor], group: int) -> list[float]:
    """The formula of accuracy's section as loops over plain numbers."""
    rows = [[abs(float(value)) for value in row] for w in weights for row in w]
    mu = [1.0] * len(rows[0])
    for _ in range(2):
        shares = [0.0] * len(mu)
        for row in rows:
            scaled = [value / m for value, m in zip(row, mu, strict=True)]
            for j, value in enumerate(scaled):
                shares[j] += value / max(scaled[j // group * group : j // group * group + group])
        mu = [m * share / len(rows) for m, share in zip(mu, shares, strict=True)]
    return [min(100.0, max(0.01, m / median(mu))) for m in mu]


def test_the_recipe_is_the_formula():
    weights = [weight(7, 24, seed=1), weight(5, 24, seed=2) * 3]
    found = clamped(equalize(lambda: ((w.float(), 8) for w in weights), 24))
    middle = sorted(by_hand(weights, 8))
    assert found == pytest.approx(
        [value * (middle[11] + middle[12]) / 2 / middle[11] for value in by_hand(weights, 8)], rel=1e-4
    )


def test_heads_that_share_a_channel_share_its_factor():
    w = weight(6, 16, seed=3).float()  # two key-value heads of 4, each read by two query heads
    heads = Heads(4, 2, 2)
    found = equalize(lambda: [(w.clone(), 8)], 8, heads)
    columns = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7])
    assert torch.equal(heads.spread(torch.arange(8.0)), columns.float())
    mu = torch.ones(8)
    for _ in range(2):
        scaled = w.abs() / mu[columns]
        share = (scaled.view(6, 2, 8) / scaled.view(6, 2, 8).amax(-1, keepdim=True)).view(6, 16).mean(0)
        mu = mu * torch.stack([share[columns == c].mean() for c in range(8)])
    assert torch.allclose(found, mu, rtol=1e-5)


def test_columns_of_zeros_and_of_nan_leave_the_rest_alone():
    w = weight(8, 16, seed=4).float()
    w[:, 3] = 0
    found = clamped(equalize(lambda: [(w.clone(), None)], 16))
    assert bool(torch.isfinite(found).all())
    assert bool((found > 0).all())
    w[2, 5] = torch.nan
    assert bool(torch.isfinite(clamped(equalize(lambda: [(w.clone(), 8)], 16))).all())
    assert bool(torch.isfinite(clamped(equalize(lambda: [(torch.zeros(4, 16), 8)], 16))).all())


@pytest.mark.parametrize("plus", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_gives_a_vector_holds_its_factor_exactly(dtype: torch.dtype, plus: int):
    """Rounded once, and the columns divided by what that came to."""
    generator = torch.Generator().manual_seed(0)
    gain = (torch.randn(512, generator=generator) * 0.5 + 1 - plus).to(dtype)
    gain[:3] = torch.tensor([0.0, -plus, 1e-5])
    mu = torch.exp(torch.randn(512, generator=generator))
    factor = settled(mu, [(gain, plus)])
    stored = ((gain.float() + plus) * factor - plus).to(dtype)
    usable = (gain.double() + plus) != 0
    error = ((stored.double() + plus) / (gain.double() + plus) / factor.double() - 1)[usable].abs()
    assert error.max() < (1e-6 if plus else 3e-7) * (1 + plus / (gain.double() + plus).abs()[usable].min())
    assert torch.allclose(factor, mu, rtol=2 * torch.finfo(dtype).eps + 1e-6) or plus or dtype == torch.bfloat16


def test_a_bias_beside_it_is_rounded_little():
    generator = torch.Generator().manual_seed(0)
    gain, bias = ((torch.randn(4096, generator=generator) + 1).bfloat16() for _ in range(2))
    mu = torch.exp(torch.randn(4096, generator=generator))
    factor = settled(mu, [(gain, 0), (bias, 0)])
    product = gain.double() * factor
    assert torch.allclose(product.bfloat16().double(), product, rtol=1e-6)
    exact = bias.double() * factor
    loss = ((exact.bfloat16().double() - exact).abs() / exact.abs()).square().mean().sqrt()
    plain = bias.double() * settled(mu, [(gain, 0)])
    usual = ((plain.bfloat16().double() - plain).abs() / plain.abs()).square().mean().sqrt()
    assert loss < usual / 4
    assert (factor / mu).log().abs().max() < 0.1


def test_float16_has_room():
    mu = torch.exp(3 * torch.randn(4096, generator=torch.Generator().manual_seed(0)))
    assert calm_rows(mu).max() == 1
    assert calm_rows(mu).min() >= 1 / 256
    gain = torch.full((4096,), 40.0)
    assert (calm_norm(mu, gain) * gain).max() * 64 <= FLOAT16_ROOM * 1.001
    assert torch.equal(calm_norm(mu.clamp(max=2), torch.ones(4096)), mu.clamp(max=2))
    assert set(power_of_two(mu).log2().frac().tolist()) == {0.0}


# Conversions.


def test_every_worker_count_gives_the_same_bytes(source: Path, tmp_path: Path):
    quantconvert.convert(source, tmp_path / "a", workers=1, **OPTIONS)
    quantconvert.convert(source, tmp_path / "b", workers=4, memory_limit="12MB", **OPTIONS)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_the_error_is_smaller_where_columns_are_loud(source: Path, tmp_path: Path):
    """Judged by what a layer computes, by the independent decoder: the norm's gain times the columns."""
    lost = {}
    for name, flag in (("plain", False), ("equal", True)):
        quantconvert.convert(source, tmp_path / name, **OPTIONS | {"equalize": flag, "format": "rtn"})
        quantconvert.dequantize(tmp_path / name, tmp_path / f"{name}-floats", dtype="float32")
        before, after = read_tensors(source), read_tensors(tmp_path / f"{name}-floats")
        x = torch.randn(256, 128, generator=torch.Generator().manual_seed(7))
        exact = x * before[NORM].float() @ before[Q].float().T
        lost[name] = float((x * after[NORM].float() @ after[Q].float().T - exact).square().sum() / exact.square().sum())
    assert lost["equal"] < 0.8 * lost["plain"]


def test_the_model_is_the_same(source: Path, tmp_path: Path):
    """int8 by groups of 8 is nearly exact: what remains of norm times columns, and of v before o, is the original."""
    out, floats = tmp_path / "out", tmp_path / "floats"
    quantconvert.convert(source, out, bits=8, group_size=8, format="rtn", equalize=True)
    quantconvert.dequantize(out, floats, dtype="float32")
    before, after = read_tensors(source), read_tensors(floats)
    assert not torch.equal(before[NORM], after[NORM])
    exact, found = before[NORM].float() * before[Q].float(), after[NORM].float() * after[Q].float()
    assert torch.allclose(exact, found, atol=0.02 * float(exact.abs().max()))
    exact, found = (t[OUT].float()[:, :64] @ t[V].float() * t[NORM].float() for t in (before, after))
    assert torch.allclose(exact, found, atol=0.03 * float(exact.abs().max()))


def test_an_interrupted_run_goes_on_with_its_factors(source: Path, tmp_path: Path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    quantconvert.convert(source, whole, workers=1, **OPTIONS)
    for after in (3, 45):  # in the first pass, and after it
        interrupt(source, out, after)
    changed = (out / ".quantconvert" / FACTORS).stat().st_mtime_ns
    interrupt(source, out, 10)
    assert (out / ".quantconvert" / FACTORS).stat().st_mtime_ns == changed
    quantconvert.convert(source, out, workers=1, **OPTIONS)
    assert digests(out) == digests(whole)


def interrupt(source: Path, out: Path, after: int) -> None:
    count = 0

    def report(event: Event) -> None:
        nonlocal count
        count += isinstance(event, Progress)
        if count > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantconvert.convert(source, out, workers=1, report=report, **OPTIONS)


def test_factors_that_are_gone_are_missed(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    interrupt(source, out, 45)
    (out / ".quantconvert" / FACTORS).unlink()
    with pytest.raises(QuantConvertError, match=r"quantconvert\.factors` of the interrupted run is gone") as caught:
        quantconvert.convert(source, out, workers=1, **OPTIONS)
    assert "--restart" in str(caught.value.hint)
    quantconvert.convert(source, out, workers=1, restart=True, **OPTIONS)
    assert quantconvert.verify(out, source).is_ok


# What is equalized, and what not.


@pytest.mark.usefixtures("auto_equalize")
def test_int4_is_equalized_unless_told_otherwise(source: Path):
    assert quantconvert.plan(source).to_json()["num_equalized"] == 8
    assert quantconvert.plan(source, bits=8).factors is None
    assert quantconvert.plan(source, scheme="W8A8").factors is None
    assert quantconvert.plan(source, equalize=False).factors is None
    assert quantconvert.plan(source, bits=8, equalize=True).to_json()["num_equalized"] == 8
    mixed = quantconvert.plan(source, format="compressed-tensors", rules=["re:.*self_attn.*=W8A16:channel"])
    assert mixed.factors is not None
    assert {wanted.site.name.split(".", 3)[3] for wanted in mixed.factors.wanted} == {
        "post_attention_layernorm",
        "mlp.up_proj",
    }


def test_one_scale_for_a_whole_weight_is_not(source: Path):
    with pytest.raises(QuantConvertError, match="one scale each"):
        quantconvert.plan(source, equalize=True, group_size=0)


@pytest.mark.usefixtures("auto_equalize")
def test_a_family_without_a_graph(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in", config=LLAMA_CONFIG | {"model_type": "nothing-known"})
    plan = quantconvert.plan(source)
    assert any(note == "nothing is equalized: the family is not known" for note in plan.notes)
    with pytest.raises(QuantConvertError, match="--equalize: nothing can be"):
        quantconvert.plan(source, equalize=True)


@pytest.mark.usefixtures("auto_equalize")
def test_layers_that_are_not_those_of_the_table(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in", {"model.layers.0.self_attn.q_proj.weight": weight(128, 128)})
    plan = quantconvert.plan(source, allow_incomplete=True)
    assert "nothing is equalized: no layer has what the table of llama says of llama" in plan.notes


@pytest.mark.usefixtures("auto_equalize")
def test_a_matrix_that_may_read_the_same_stops_its_layer(tmp_path: Path):
    """Nobody says what it reads: dividing all other columns would change what it computes."""
    tensors = llama_tensors() | {"model.layers.1.self_attn.extra_proj.weight": weight(16, 128)}
    plan = quantconvert.plan(write_checkpoint(tmp_path / "in", tensors), allow_incomplete=True)
    assert plan.factors is not None
    norms = {wanted.site.name for wanted in plan.factors.wanted if wanted.site.fold.kind == "norm"}
    assert norms == {"model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"}
    (note,) = [note for note in plan.notes if note.startswith("not equalized")]
    assert "`input_layernorm` may be read by `self_attn.extra_proj`" in note
    assert "``" not in note


@pytest.mark.usefixtures("auto_equalize")
def test_a_source_that_lacks_a_reader(tmp_path: Path):
    """What is somewhere else would be read as it is, after a norm that has changed."""
    tensors = llama_tensors(layers=3)
    lost = "model.layers.1.self_attn.k_proj.weight"
    del tensors[lost], tensors["model.layers.0.mlp.down_proj.weight"]
    config = LLAMA_CONFIG | {"intermediate_size": 256, "num_hidden_layers": 3}
    plan = quantconvert.plan(write_checkpoint(tmp_path / "in", tensors, config), allow_incomplete=True)
    assert plan.factors is not None
    assert len(plan.factors.wanted) == 3 + 3 + 4
    names = {wanted.site.name for wanted in plan.factors.wanted}
    assert names.isdisjoint({"model.layers.0.mlp.up_proj", "model.layers.1.input_layernorm"})
    assert any(f"1.input_layernorm` should be read by `{lost}`, which the source lacks" in n for n in plan.notes)


def test_a_matrix_that_stays_takes_powers_of_two(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    quantconvert.convert(source, out, ignore=["*.v_proj", "*.q_proj", "*.k_proj"], verify=True, **OPTIONS)
    factors, before, after = factors_of(out), read_tensors(source), read_tensors(out)
    mu = factors["model.layers.0.self_attn.v_proj"]
    assert set(mu.log2().frac().tolist()) == {0.0}
    assert "model.layers.0.input_layernorm" not in factors  # none of its readers is quantized
    assert torch.equal(after[V].float(), before[V].float() * mu[:, None])


def test_nan_is_refused_as_before(tmp_path: Path):
    tensors = llama_tensors()
    tensors[Q][3, 5] = torch.nan
    source = write_checkpoint(tmp_path / "in", tensors)
    with pytest.raises(QuantConvertError, match=r"1 NaN, first at \[3, 5\]"):
        quantconvert.convert(source, tmp_path / "out", equalize=True)
    quantconvert.convert(source, tmp_path / "out", equalize=True, nan_policy="keep", format="compressed-tensors")
    assert read_tensors(tmp_path / "out")[Q].isnan().sum() == 1


def test_ranks_have_the_same_factors(source: Path, tmp_path: Path):
    options: dict[str, Any] = {"format": "rtn", "group_size": 32, "equalize": True}
    quantconvert.convert(source, tmp_path / "out", **options)
    whole = read_tensors(tmp_path / "out")
    for name, tensor in quantconvert.iter_quantized(source, **options):
        assert torch.equal(tensor, whole[name]), name


def test_a_result_that_is_converted_again_drops_old_factors(source: Path, tmp_path: Path):
    quantconvert.convert(source, tmp_path / "a", bits=8, equalize=True, format="rtn")
    quantconvert.convert(tmp_path / "a", tmp_path / "b", requantize=True, format="rtn", verify=True)
    assert not (tmp_path / "b" / FACTORS).exists()
