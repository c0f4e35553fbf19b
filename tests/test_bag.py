"""A bag of tokens: what is drawn, that the source alone decides the result, memory, faults, and factors from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert import workers as workers_module
from quantconvert.buffers import Workspace
from quantconvert.factors import bag as bag_module
from quantconvert.factors import room as room_module
from quantconvert.factors import tiles as tiles_module
from quantconvert.factors.draws import Draws, splitmix64
from quantconvert.factors.recipe import by_importance, combined, joint, smooth
from quantconvert.factors.room import bag_nbytes
from quantconvert.factors.walk import Walk
from tests.bags import Limits, importances, walk_of
from tests.builders import LLAMA_CONFIG, llama_tensors, weight, write_checkpoint

# The generator's output for this seed, as the literature on it prints it.
SEED, NUMBERS = 1234567, (
    6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
)  # fmt: skip


def unsigned(numbers: Tensor) -> list[int]:
    return [number % (1 << 64) for number in numbers.tolist()]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny model has several tiles a weight."""
    monkeypatch.setattr(room_module, "TILE_ELEMENTS", 1 << 10)
    monkeypatch.setattr(room_module, "TILE_ROWS", 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", llama_tensors(dtype=torch.float32))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """To the bit."""
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_generator_is_splitmix64():
    assert unsigned(splitmix64(SEED, 0, 5)) == list(NUMBERS)
    assert unsigned(splitmix64(SEED, 3, 2)) == list(NUMBERS[3:])


def test_ids_are_as_likely_as_their_rank_says():
    count, vocabulary = 100_000, 1000
    ids = Draws(tokens=count).ids(vocabulary)
    weights = [1 / (i + 300) for i in range(vocabulary)]
    assert min(ids) == 0
    assert max(ids) == vocabulary - 1
    for limit in (1, 10, 100, 500, 900):
        expected = sum(weights[:limit]) / sum(weights)
        got = sum(i < limit for i in ids) / count
        assert abs(got - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
    assert Draws().ids(vocabulary) == ids[:512]
    assert Draws(seed=1).ids(vocabulary) != ids[:512]


def test_attention_mixes_others():
    own, others = Draws().mixture(3, 4)
    assert own.shape == (4, 512)
    assert 0 <= own.min() < 0.01 < 0.99 < own.max() < 1
    assert abs(own.mean() - 0.5) < 0.03
    assert others.shape == (4, 512, 3)
    assert set(others.flatten().tolist()) == set(range(512))
    assert not (others == torch.arange(512)[:, None]).any()
    assert not torch.equal(own, Draws().mixture(4, 4)[0])
    assert bool((Draws(alone=True).mixture(3, 4)[0] == 1).all())


@pytest.mark.usefixtures("small_tiles")
def test_workers_and_slabs_change_no_bit(folder: Path):
    expected = importances(folder)
    for workers, slab in ((2, 1 << 20), (4, 1 << 12), (3, 1)):
        assert_same(importances(folder, execution=Limits(workers, slab)), expected)
    assert_same(importances(folder, execution=Limits(4, memory_limit=1)), expected)
    other = importances(folder, Draws(seed=5))
    assert not torch.equal(other["model.layers.0.self_attn.o_proj"], expected["model.layers.0.self_attn.o_proj"])


def test_attention_gives_a_token_its_own_value_and_those_of_others(folder: Path):
    """One layer in plain loops: two query heads share a key-value head, and each draws for itself."""
    tensors, draws = llama_tensors(dtype=torch.float32), Draws()
    x = tensors["model.embed_tokens.weight"][draws.ids(64)].double()
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * tensors["model.layers.0.input_layernorm.weight"]
    v = x @ tensors["model.layers.0.self_attn.v_proj.weight"].double().t()
    own, others = draws.mixture(0, 2)
    total = torch.zeros(128, dtype=torch.float64)
    for token in range(512):
        for head in range(2):
            r, seen = own[head, token].item(), others[head, token].tolist()
            mixed = r * v[token] + (1 - r) * (v[seen[0]] + v[seen[1]] + v[seen[2]]) / 3
            total[64 * head : 64 * head + 64] += mixed.square() / 512
    found = importances(folder)["model.layers.0.self_attn.o_proj"]
    torch.testing.assert_close(found, total.float(), rtol=1e-4, atol=0)
    assert not torch.allclose(found[:64], found[64:], rtol=1e-2)


@pytest.mark.usefixtures("small_tiles")
def test_every_module_has_importances_and_shares_them(folder: Path):
    found = importances(folder)
    assert {task.source.module for task in quantconvert.plan(folder).quantized} == set(found)
    for layer in ("model.layers.0.", "model.layers.1."):
        assert found[f"{layer}self_attn.q_proj"] is found[f"{layer}self_attn.v_proj"]
        assert found[f"{layer}mlp.gate_proj"] is found[f"{layer}mlp.up_proj"]
        assert found[f"{layer}mlp.down_proj"].shape == (256,)
    assert all(h.dtype == torch.float32 and bool((torch.isfinite(h) & (h > 0)).all()) for h in found.values())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("fmt", ["awq", "gptq", "compressed-tensors"])
def test_quantized_sources_are_read_as_what_they_stand_for(folder: Path, tmp_path: Path, fmt: str):
    quantconvert.convert(folder, tmp_path / "packed", format=fmt, group_size=32, equalize=False)
    quantconvert.dequantize(tmp_path / "packed", tmp_path / "plain", dtype="float32")
    assert_same(importances(tmp_path / "packed", execution=Limits(2)), importances(tmp_path / "plain"))


@pytest.mark.usefixtures("small_tiles")
def test_half_of_a_packed_weight_may_begin_anywhere(tmp_path: Path):
    """gate_up_proj and qkv_proj as GPTQ packs them, zero points of eight rows in a word: up begins at row 36."""
    layer, shapes = "model.layers.0.", {"self_attn.qkv_proj": (96, 64), "self_attn.o_proj": (64, 64)}
    shapes |= {"mlp.gate_up_proj": (72, 64), "mlp.down_proj": (64, 36)}
    tensors = {f"{layer}{name}.weight": weight(*shape, dtype=torch.float32) for name, shape in shapes.items()}
    tensors |= {f"{layer}{name}.weight": torch.ones(64) for name in ("input_layernorm", "post_attention_layernorm")}
    tensors |= {"model.embed_tokens.weight": weight(64, 64), "model.norm.weight": torch.ones(64)}
    sizes = {"model_type": "phi3", "hidden_size": 64, "intermediate_size": 36, "num_hidden_layers": 1}
    folder = write_checkpoint(tmp_path / "model", tensors, LLAMA_CONFIG | sizes | {"num_attention_heads": 4})
    options: dict[str, Any] = {"group_size": 32, "ignore": ("*.down_proj",), "equalize": False, "symmetric": False}
    quantconvert.convert(folder, tmp_path / "packed", format="gptq", allow_incomplete=True, **options)
    quantconvert.dequantize(tmp_path / "packed", tmp_path / "plain", dtype="float32", allow_incomplete=True)
    assert_same(importances(tmp_path / "packed"), importances(tmp_path / "plain"))


def test_memory_is_what_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Buffers that are used again hold nearly all of it."""
    sizes: dict[str, Any] = {"hidden": 256, "intermediate": 1024, "kv": 128}
    folder = write_checkpoint(tmp_path / "model", llama_tensors(**sizes), LLAMA_CONFIG)
    spaces: list[Workspace] = []

    class Recorded(Workspace):
        def __init__(self) -> None:
            super().__init__()
            spaces.append(self)

    monkeypatch.setattr(bag_module, "Workspace", Recorded)
    monkeypatch.setattr(tiles_module, "Workspace", Recorded)
    monkeypatch.setattr(room_module, "TILE_ELEMENTS", 1 << 14)
    monkeypatch.setattr(room_module, "PRODUCT_NBYTES", 0)
    walk = walk_of(folder)
    assert isinstance(walk, Walk)
    for execution in (Limits(), Limits(3)):
        spaces.clear()
        found = importances(folder, execution=execution)
        held = sum(buffer.numel() for space in spaces for buffer in space._buffers.values())
        held += sum(4 * h.numel() for h in {id(h): h for h in found.values()}.values())
        assert 0.5 * bag_nbytes(walk, execution) < held <= bag_nbytes(walk, execution)
    least = bag_nbytes(walk, Limits())
    assert bag_nbytes(walk, Limits(8)) > least
    assert bag_nbytes(walk, Limits(8, memory_limit=least)) == least


@pytest.mark.usefixtures("small_tiles")
def test_progress_is_told_and_stops_it(folder: Path):
    told: list[int] = []
    importances(folder, execution=Limits(2), advance=lambda _, nbytes: told.append(nbytes))
    walk = walk_of(folder)
    assert isinstance(walk, Walk)
    assert 0.99 * walk.read_nbytes < sum(told) <= walk.read_nbytes
    for where in ("embed_tokens", "1.self_attn.v_proj", "1.mlp.down_proj"):

        def stop(name: str, nbytes: int, where: str = where) -> None:
            if where in name:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            importances(folder, execution=Limits(2), advance=stop)


def test_what_is_no_number_counts_as_the_mean(tmp_path: Path):
    tensors = llama_tensors(dtype=torch.float32)
    sound = importances(write_checkpoint(tmp_path / "sound", tensors))
    tensors["model.layers.0.input_layernorm.weight"][3] = torch.nan
    tensors["model.layers.0.mlp.up_proj.weight"][5, 0] = torch.inf
    tensors["model.layers.0.mlp.down_proj.weight"][7, 1] = torch.nan
    tensors["model.embed_tokens.weight"][0] = torch.nan
    found = importances(write_checkpoint(tmp_path / "broken", tensors))
    assert all(bool(torch.isfinite(h).all()) for h in found.values())
    h = found["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(h[3], (h.sum() - h[3]) / (len(h) - 1))
    h = found["model.layers.0.mlp.down_proj"]
    torch.testing.assert_close(h[5], (h.sum() - h[5]) / (len(h) - 1))
    last = "model.layers.1.mlp.down_proj"
    assert 0.5 < (found[last] / sound[last]).median() < 2
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    found = importances(write_checkpoint(tmp_path / "nothing", tensors))
    assert all(bool(torch.isfinite(h).all()) for h in found.values())


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in llama_tensors().items() if key != name}


NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"
REASONS = {
    "family": (LLAMA_CONFIG | {"model_type": "nothing"}, llama_tensors(), "no family's table"),
    "type": (LLAMA_CONFIG | {"model_type": "olmo"}, llama_tensors(), "no family's table"),
    "activation": (LLAMA_CONFIG | {"hidden_act": "quick_gelu"}, llama_tensors(), "`quick_gelu` is not one of"),
    "heads": (LLAMA_CONFIG | {"num_attention_heads": 3}, llama_tensors(), "does not explain the heads"),
    "eps": (LLAMA_CONFIG | {"rms_norm_eps": "small"}, llama_tensors(), "`rms_norm_eps` as a number"),
    "layer": (LLAMA_CONFIG | {"num_hidden_layers": 10**6}, llama_tensors(), "`model.layers.2` is not there"),
    "norm": (LLAMA_CONFIG, without(NORM), f"`{NORM}` is not there"),
    "table": (LLAMA_CONFIG, without("model.embed_tokens.weight"), "no `embed_tokens.weight`"),
    "shape": (LLAMA_CONFIG, llama_tensors() | {NORM: torch.ones(7)}, "expected [128]"),
    "down": (LLAMA_CONFIG, llama_tensors() | {DOWN: torch.ones(128, 64)}, "expected [128, 256]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_why_there_is_no_walk(tmp_path: Path, case: str):
    config, tensors, reason = REASONS[case]
    walk = walk_of(write_checkpoint(tmp_path / "model", tensors, config))
    assert isinstance(walk, str)
    assert reason in walk


def test_layers_beyond_the_last_are_no_part_of_it(tmp_path: Path):
    found = importances(write_checkpoint(tmp_path / "model", llama_tensors(layers=3), LLAMA_CONFIG))
    assert not any(name.startswith("model.layers.2.") for name in found)


def test_loud_columns_become_larger():
    h = torch.tensor([1.0, 1.0, 1.0, 16.0, 0.0, torch.nan, torch.inf])
    mu = by_importance(h, 0.5)
    torch.testing.assert_close(mu[:4] / mu[0], torch.tensor([1.0, 1.0, 1.0, 0.5]))
    torch.testing.assert_close(mu[5], mu[6])
    assert mu[4] == 100
    torch.testing.assert_close(by_importance(torch.tensor([4.0, 1.0, 1.0])), torch.tensor([4**-0.125, 1.0, 1.0]))
    assert torch.equal(by_importance(torch.zeros(3)), torch.ones(3))


def test_half_of_what_weights_say():
    mu, h = torch.tensor([0.25, 1.0, 4.0]), torch.tensor([16.0, 1.0, 1.0])
    torch.testing.assert_close(combined(mu, h), torch.tensor([0.5 * 16**-0.125, 1.0, 2.0]))
    torch.testing.assert_close(combined(mu, torch.ones(3)), torch.tensor([0.5, 1.0, 2.0]))


def test_smoothing_moves_outliers_of_inputs_into_weights():
    x, w = torch.tensor([100.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 4.0, 2.0])
    torch.testing.assert_close(smooth(x, w), torch.tensor([0.1, 1.0, 2.0, 1.0]))
    torch.testing.assert_close(smooth(x, w, 1.0), torch.tensor([0.01, 1.0, 1.0, 1.0]))
    assert torch.equal(smooth(torch.zeros(2), torch.zeros(2)), torch.ones(2))


def test_several_vectors_count_alike():
    torch.testing.assert_close(joint([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])]), torch.tensor([2.0, 2.0]))


class Interrupted:
    """A pool whose user is interrupted while he waits for it; its threads go on until there is nothing left."""

    def __init__(self, *how: object, **more: object) -> None:
        self.left: list[Callable[[], None]] = []

    def __enter__(self) -> Interrupted:
        return self

    def map(self, work: Callable[[Any], None], shares: Iterable[Any]) -> Iterator[None]:
        self.left = [partial(work, share) for share in shares]
        raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        for work in self.left:
            with suppress(InterruptedError):
                work()


@pytest.mark.usefixtures("small_tiles")
def test_workers_stop_when_the_user_does(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A share of a large weight takes minutes: Ctrl-C must not wait for that."""
    monkeypatch.setattr(workers_module, "ThreadPoolExecutor", Interrupted)
    names: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        importances(folder, advance=lambda name, nbytes: names.append(name))
    assert set(names) == {"model.embed_tokens.weight"}
