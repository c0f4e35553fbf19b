"""What a conversion writes verifies clean, whatever the weights, the layout and the source: no false alarm."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantconvert
from quantconvert.verification import Verification
from tests import inputs
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, weight, write_checkpoint
from tests.coded import awq_model, gptq_model, kimi_model
from tests.fused import LAYOUTS, Layout, every_layout, fused_tensors

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CONFIG = LLAMA_CONFIG | {"num_hidden_layers": 1}
# The smallest magnitude, and the largest that float16 scales of 4 bits can tell apart, by dtype of the weights.
REACH = {torch.bfloat16: (2.0**-130, 2.0**127), torch.float16: (2.0**-22, 60000.0), torch.float32: (1e-42, 3e38)}
F16_REACH = (2.0**-22, 60000.0)


def awkward(shape: tuple[int, int], dtype: torch.dtype, seed: int, reach: tuple[float, float]) -> Tensor:
    """Groups of 32 columns of every kind: zeros, tiny, huge, one-sided, one value, one outlier, ordinary."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(shape[0], shape[1] // 32, 32, generator=generator).clamp(-3, 3).double()
    kind = torch.randint(0, 9, blocks.shape[:2], generator=generator)
    small, large = reach
    for i, change in enumerate(
        (
            lambda x: x * 0,
            lambda x: x * small,
            lambda x: x * small * 50,
            lambda x: x / 3 * large,
            lambda x: x.abs() + 1,
            lambda x: -x.abs() * 1e-3 - 5,
            lambda x: x * 0 + 0.37,
            lambda x: torch.where(x == x.amax(-1, keepdim=True), 1000.0, x * 1e-3),
        )
    ):
        blocks[kind == i] = change(blocks[kind == i])
    return blocks.reshape(shape).to(dtype)


def awkward_llama(dtype: torch.dtype, seed: int, reach: tuple[float, float]) -> dict[str, Tensor]:
    """A layer whose linear weights are awkward each in its own way."""
    tensors = llama_tensors(layers=1, dtype=dtype)
    for i, (name, tensor) in enumerate(tensors.items()):
        if "_proj" in name:
            tensors[name] = awkward((tensor.shape[0], tensor.shape[1]), dtype, 100 * seed + i, reach)
    return tensors


def clean(out: Path, source: Path | None) -> Verification:
    """Verified without a finding; in JSON too."""
    found = quantconvert.verify(out, source)
    assert found.is_ok, found.findings[:5]
    assert found.failed is None
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["ok"] is True
    json.loads((out / "quantconvert.json").read_bytes(), parse_constant=pytest.fail)
    return found


def convert_clean(source: Path, out: Path, **options: Any) -> Verification:
    """The same verification during the conversion, after it, and without the source."""
    made = quantconvert.convert(source, out, verify=True, **options)
    assert clean(out, None).errors == ()
    found = clean(out, source)
    assert sorted(error.name for error in found.errors) == sorted(task.source.name for task in made.plan.quantized)
    assert found.num_checksums == len([path for path in out.rglob("*") if path.is_file()]) - 1
    assert all(math.isfinite(error.relative_error) and error.max_error >= 0 for error in found.errors)
    return found


def combinations() -> list[Any]:
    """Every layout with every scheme that it holds."""
    schemes = [
        f"W{bits}A16{symmetry}:{width}"
        for bits in (4, 8)
        for symmetry in ("", "_ASYM")
        for width in ("g32", "channel", "tensor")
    ]
    found = [("compressed-tensors", scheme) for scheme in (*schemes, "W8A8:channel", "W8A8:tensor", "W4A8:g32")]
    found += [("rtn", scheme) for scheme in schemes]
    found += [("gptq", scheme) for scheme in schemes if "tensor" not in scheme]
    found += [("awq", scheme) for scheme in schemes if "tensor" not in scheme and "W4" in scheme]
    return [pytest.param(*pair, id=" ".join(pair)) for pair in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("layout", "scheme"), combinations())
def test_no_false_alarm(tmp_path: Path, layout: str, scheme: str, dtype: torch.dtype):
    reach = F16_REACH if layout in ("awq", "gptq") else REACH[dtype]
    source = write_checkpoint(tmp_path / "in", awkward_llama(dtype, 1, reach), CONFIG)
    found = convert_clean(source, tmp_path / "out", format=layout, scheme=scheme)
    assert len(found.errors) == 7


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("small", [2.0**-28, 2.0**-24, 2.0**-20, 2.0**-14])
def test_scales_that_float16_holds_badly(tmp_path: Path, seed: int, small: float):
    """Scales far below the weight's own precision: rounding to float16 moves the ends of the range by whole steps."""
    for symmetric in (True, False):
        tensors = awkward_llama(torch.bfloat16, seed, (small, 1.0))
        source = write_checkpoint(tmp_path / f"in{symmetric}", tensors, CONFIG)
        convert_clean(source, tmp_path / f"{symmetric}", format="gptq", group_size=32, symmetric=symmetric)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e37])
def test_errors_of_weights_whose_squares_float32_does_not_hold(tmp_path: Path, scale: float):
    tensors = {name: (t.double() * (scale / 0.02)).float() for name, t in llama_tensors(layers=1).items()}
    ordinary = {name: t.float() for name, t in llama_tensors(layers=1).items()}
    expected = convert_clean(write_checkpoint(tmp_path / "a", ordinary, CONFIG), tmp_path / "x", format="rtn")
    found = convert_clean(write_checkpoint(tmp_path / "b", tensors, CONFIG), tmp_path / "y", format="rtn")
    quantconvert.convert(tmp_path / "b", tmp_path / "z", format="rtn")
    report = json.loads((tmp_path / "z" / "quantconvert.json").read_bytes())["tensors"]
    for one, other in zip(expected.errors, found.errors, strict=True):
        assert other.relative_error == pytest.approx(one.relative_error, rel=1e-2)
        assert report[other.name]["relative_error"] == pytest.approx(other.relative_error, rel=1e-4)


MIXED: list[dict[str, Any]] = [
    {
        "format": "compressed-tensors",
        "rules": ["*.down_proj=W8A16:g64", "*.o_proj=skip", "*.self_attn.[qkv]_proj=W4A16_ASYM:g32"],
    },
    {"format": "gptq", "rules": ["*.down_proj=W8A16:g64", "*.o_proj=skip"]},
    {"format": "rtn", "rules": ["*.down_proj=W8A16:channel", "*.o_proj=skip", "*.self_attn.[qkv]_proj=W4A16_ASYM:g32"]},
    {"format": "awq", "rules": ["*.o_proj=skip"], "group_size": 32},
    {"format": "awq", "ignore": ["re:.*layers\\.0\\."], "group_size": 32},
    {"format": "compressed-tensors", "rules": ["lm_head=W8A16:channel"]},
    {"format": "gptq", "rules": ["lm_head=W8A16:channel"]},
    {"format": "gptq", "max_shard_size": "40KB"},
    {"format": "compressed-tensors", "max_shard_size": "40KB", "workers": 3},
]


@pytest.mark.parametrize("options", MIXED, ids=lambda o: " ".join(map(str, o.values())))
def test_mixed_kept_and_sharded(tmp_path: Path, options: dict[str, Any]):
    source = write_checkpoint(tmp_path / "in", llama_tensors(), LLAMA_CONFIG, shards=3)
    (source / "tokenizer.json").write_text("{}")
    (source / "sub").mkdir()
    (source / "sub" / "vocab.txt").write_text("a")
    found = convert_clean(source, tmp_path / "out", **options)
    assert (found.num_files > 1) == ("max_shard_size" in options)
    plain = write_checkpoint(tmp_path / "one", llama_tensors(), LLAMA_CONFIG)
    assert set(clean(tmp_path / "out", plain).errors) == set(found.errors)


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "rtn", "awq"])
@pytest.mark.parametrize("policy", ["channel", "skip"])
def test_groups_that_do_not_divide(tmp_path: Path, layout: str, policy: str):
    tensors = llama_tensors(layers=1) | {
        "model.layers.0.mlp.gate_proj.weight": weight(160, 128, seed=1),
        "model.layers.0.mlp.up_proj.weight": weight(160, 128, seed=2),
        "model.layers.0.mlp.down_proj.weight": weight(128, 160, seed=3),
    }
    source = write_checkpoint(tmp_path / "in", tensors, CONFIG)
    try:
        convert_clean(source, tmp_path / "out", format=layout, group_size=128, on_indivisible=policy)
    except quantconvert.UnsupportedError:
        assert (layout, policy) == ("awq", "channel")  # one scheme for the whole model


def test_torch_source_and_tied_head(tmp_path: Path):
    tensors = llama_tensors(layers=1)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    torch.save(tensors, tmp_path / "in" / "pytorch_model.bin")
    convert_clean(tmp_path / "in", tmp_path / "out")
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")


def test_bfloat16_nan_that_is_kept(tmp_path: Path):
    tensors = llama_tensors(layers=1)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    source = write_checkpoint(tmp_path / "in", tensors, CONFIG)
    assert len(convert_clean(source, tmp_path / "out", nan_policy="keep").errors) < 7


# Weights in shapes of their own


@every_layout
@pytest.mark.parametrize("format", ["compressed-tensors", "awq"])
def test_fused_experts(tmp_path: Path, layout: Layout, format: str):
    tensors = fused_tensors(layout)
    if "gpt_oss" in str(layout.config):
        tensors |= {f"{layout.gate_up}_bias": weight(3, 192, seed=5), f"{layout.down}_bias": weight(3, 64, seed=6)}
    source = write_checkpoint(tmp_path / "in", tensors, layout.config)
    assert len(convert_clean(source, tmp_path / "out", format=format, group_size=32).errors) == 9


@pytest.mark.parametrize("kind", LAYOUTS)
def test_experts_that_are_kept_stay_whole(tmp_path: Path, kind: str):
    layout = LAYOUTS[kind]
    stem = layout.experts.rpartition(".layers.0")[0]
    tensors = fused_tensors(layout) | {f"{stem}.layers.0.self_attn.q_proj.weight": weight(64, 64)}
    if kind == "gpt_oss":
        tensors |= {f"{layout.gate_up}_bias": weight(3, 192, seed=5), f"{layout.down}_bias": weight(3, 64, seed=6)}
    source = write_checkpoint(tmp_path / "in", tensors, layout.config)
    options: dict[str, Any] = {"format": "compressed-tensors", "group_size": 32}
    quantconvert.convert(source, tmp_path / "out", ignore=[f"{layout.experts}.*"], verify=True, **options)
    assert len(clean(tmp_path / "out", source).errors) == 1
    found = read_tensors(tmp_path / "out")
    assert torch.equal(found[layout.gate_up], tensors[layout.gate_up])


@pytest.mark.parametrize("ignore", [[], ["*.c_proj"]])
def test_gpt2_conv1d(tmp_path: Path, ignore: list[str]):
    stem = "h.0"
    shapes = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 256), "mlp.c_proj": (256, 64)}
    tensors = {f"{stem}.{name}.weight": weight(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors |= {f"{stem}.{name}.bias": weight(shape[1], seed=9) for name, shape in shapes.items()}
    tensors |= {"wte.weight": weight(48, 64), "wpe.weight": weight(16, 64), "ln_f.weight": weight(64)}
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2}
    source = write_checkpoint(tmp_path / "in", tensors, config)
    found = convert_clean(source, tmp_path / "out", format="compressed-tensors", group_size=32, ignore=ignore)
    assert len(found.errors) == (2 if ignore else 4)


# Quantized sources

MODELS: dict[str, Callable[[], inputs.Model]] = {
    "fp8": inputs.fp8_model,
    "fp8 rows": lambda: inputs.fp8_model("[O]"),
    "fp8 exponents": lambda: inputs.fp8_model(scale="F8_E8M0", block=(48, 80)),
    "mxfp4": inputs.mxfp4_model,
    "turned": inputs.turned_model,
    "fused": lambda: inputs.fused_model(False),
    "fused interleaved": lambda: inputs.fused_model(True, interleaved=True),
    "fused fp8": inputs.fused_fp8_model,
    "kimi": kimi_model,
    "awq": awq_model,
    "gptq": lambda: gptq_model(4, "gptq", False, False),
    "gptq v2 int8": lambda: gptq_model(8, "gptq_v2", False, False),
    "gptq desc_act": lambda: gptq_model(4, "gptq", True, True),
}
CODES = [kind for kind in MODELS if kind in ("kimi", "awq") or "gptq" in kind]


@pytest.mark.usefixtures("toy_families")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_requantized(tmp_path: Path, kind: str, bits: int):
    source = MODELS[kind]().write(tmp_path / "in", split=("_scale_inv", "_scales", ".scales"))
    convert_clean(source, tmp_path / "out", bits=bits, group_size=32, requantize=True, format="compressed-tensors")


@pytest.mark.usefixtures("toy_families")
@pytest.mark.parametrize("kind", ["fp8", "fp8 rows", "fused", "turned"])
def test_requantized_but_for_some(tmp_path: Path, kind: str):
    """What was quantized and is ignored comes out plain; what is stored transposed stays so."""
    source = MODELS[kind]().write(tmp_path / "in")
    ignore = ["*.experts.*" if kind == "fused" else "*.o_proj"]
    options: dict[str, Any] = {"group_size": 32, "requantize": True, "format": "compressed-tensors"}
    quantconvert.convert(source, tmp_path / "out", ignore=ignore, verify=True, **options)
    clean(tmp_path / "out", source)


@pytest.mark.usefixtures("toy_families")
def test_fp8_nan_that_is_kept(tmp_path: Path):
    model = inputs.fp8_model()
    model.tensors[f"{inputs.LAYER}.mlp.up_proj.weight"].view(torch.uint8)[200, 150] = 0x7F
    source = model.write(tmp_path / "in")
    options: dict[str, Any] = {"group_size": 32, "requantize": True, "nan_policy": "keep"}
    quantconvert.convert(source, tmp_path / "out", verify=True, **options)
    clean(tmp_path / "out", source)


@pytest.mark.usefixtures("toy_families")
@pytest.mark.parametrize("kind", [kind for kind in CODES if "desc_act" not in kind])
@pytest.mark.parametrize("layout", ["awq", "gptq", "compressed-tensors", "rtn"])
def test_repacked_from_others(tmp_path: Path, kind: str, layout: str):
    """Their codes, with scales of zero and of float16's smallest number."""
    source = MODELS[kind]().write(tmp_path / "in")
    try:
        quantconvert.repack(source, tmp_path / "out", layout, verify=True)
    except quantconvert.UnsupportedError:
        pytest.skip("the layout does not hold this scheme")
    found = clean(tmp_path / "out", source)
    assert found.errors
    assert all(error.relative_error == 0 and error.sqnr is None for error in found.errors)


@pytest.mark.usefixtures("toy_families")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", CODES)
def test_dequantized_from_others(tmp_path: Path, kind: str, dtype: Any):
    source = MODELS[kind]().write(tmp_path / "in")
    quantconvert.dequantize(source, tmp_path / "out", dtype, verify=True)
    assert clean(tmp_path / "out", source).errors == ()


def test_there_and_back(tmp_path: Path):
    source = write_checkpoint(tmp_path / "in", llama_tensors(), LLAMA_CONFIG, shards=2)
    quantconvert.convert(source, tmp_path / "a", format="awq", group_size=32)
    quantconvert.repack(tmp_path / "a", tmp_path / "b", "gptq", max_shard_size="50KB", verify=True)
    quantconvert.repack(tmp_path / "b", tmp_path / "c", "rtn", verify=True)
    quantconvert.dequantize(tmp_path / "c", tmp_path / "d", verify=True)
    errors = [quantconvert.verify(tmp_path / name, source).errors for name in "abc"]
    assert errors[0] == errors[1] == errors[2] != ()
    for out, of in (("b", "a"), ("c", "a"), ("d", "b"), ("d", "a")):
        clean(tmp_path / out, tmp_path / of)
