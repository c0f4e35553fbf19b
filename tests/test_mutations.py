"""One thing wrong with a checkpoint: refused while planning, by the tensor's name, never copied as if it were plain."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import quantconvert
from tests.builders import read_tensors, weight
from tests.inputs import LAYER, SHAPES, Model, config, fp8_model, fused_model, mxfp4_model, plain_rest

pytestmark = pytest.mark.usefixtures("toy_families")
Tensors = dict[str, torch.Tensor]


def _codes(folder: Path, format: str) -> Model:
    """A decoder layer as our own writer has it; its layouts are proven elsewhere."""
    sizes = {"hidden_size": 160, "intermediate_size": 224}
    tensors = plain_rest(160)
    for i, (module, shape) in enumerate(SHAPES.items()):
        tensors[f"{LAYER}.{module}.weight"] = weight(*shape, seed=i)
    source = Model(tensors, config("toy_dense", **sizes)).write(folder / "plain")
    quantconvert.convert(source, folder / "codes", group_size=32, format=format)
    return Model(read_tensors(folder / "codes"), json.loads((folder / "codes" / "config.json").read_text()))


MLP, EXPERTS = f"{LAYER}.mlp", f"{LAYER}.mlp.experts"
UP, DOWN, Q, K = f"{MLP}.up_proj", f"{MLP}.down_proj", f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.k_proj"
# Of each kind: what belongs to one weight, and the same of another weight of another shape.
PARTS: dict[str, tuple[list[str], list[str]]] = {
    "fp8": ([f"{UP}.weight", f"{UP}.weight_scale_inv"], [f"{K}.weight", f"{K}.weight_scale_inv"]),
    "fp8 channel": ([f"{UP}.weight", f"{UP}.weight_scale"], [f"{Q}.weight", f"{Q}.weight_scale"]),
    "mxfp4": ([f"{EXPERTS}.gate_up_proj_{x}" for x in ("blocks", "scales", "bias")],
              [f"{EXPERTS}.down_proj_{x}" for x in ("blocks", "scales", "bias")]),
    "compressed-tensors": ([f"{UP}.weight_{x}" for x in ("packed", "scale", "shape")],
                           [f"{DOWN}.weight_{x}" for x in ("packed", "scale", "shape")]),
    "gptq": ([f"{UP}.{x}" for x in ("qweight", "qzeros", "scales", "g_idx")],
             [f"{DOWN}.{x}" for x in ("qweight", "qzeros", "scales", "g_idx")]),
    "awq": ([f"{UP}.{x}" for x in ("qweight", "qzeros", "scales")],
            [f"{DOWN}.{x}" for x in ("qweight", "qzeros", "scales")]),
    "fused": ([f"{EXPERTS}.gate_up_proj"], [f"{EXPERTS}.down_proj"]),
    "fused turned": ([f"{EXPERTS}.gate_up_proj"], [f"{EXPERTS}.down_proj"]),
    "fused fp8": ([f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.gate_up_proj_scale"],
                  [f"{EXPERTS}.down_proj", f"{EXPERTS}.down_proj_scale"]),
}  # fmt: skip


def _fused_fp8() -> Model:
    """All experts in one float8 tensor, with a scale for each row."""
    model = fused_model(False)
    for name in ("gate_up_proj", "down_proj"):
        w = model.tensors[f"{EXPERTS}.{name}"]
        scale = w.abs().amax(-1, keepdim=True) / 448
        model.tensors[f"{EXPERTS}.{name}"] = (w / scale).to(torch.float8_e4m3fn)
        model.tensors[f"{EXPERTS}.{name}_scale"] = scale
    model.config["quantization_config"] = {"quant_method": "fp8"}
    return model


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made = {
        "fp8": fp8_model,
        "fp8 channel": lambda: fp8_model("[O]", suffix="_scale"),
        "mxfp4": mxfp4_model,
        "fused": lambda: fused_model(False),
        "fused turned": lambda: fused_model(True),
        "fused fp8": _fused_fp8,
    }

    @cache
    def build(kind: str) -> Model:
        return made[kind]() if kind in made else _codes(tmp_path_factory.mktemp("codes"), kind)

    def fresh(kind: str) -> Model:
        model = build(kind)
        return Model(dict(model.tensors), dict(model.config), model.expected)

    return fresh


def plan(source: Path) -> quantconvert.Plan:
    return quantconvert.plan(source, group_size=32, requantize=True, format="rtn")


def check_refused(model: Model, folder: Path, *names: str) -> None:
    """Planning raises, and says one of `names` in backticks, whole or as the module of it."""
    source = model.write(folder)
    with pytest.raises(quantconvert.QuantConvertError) as info:
        plan(source)
    message = str(info.value)
    assert any(f"`{name}" in message for name in names), message
    with pytest.raises(quantconvert.QuantConvertError):
        quantconvert.convert(source, folder.parent / "out", group_size=32, requantize=True, format="rtn")
    assert not (folder.parent / "out").exists()


def stem_of(name: str) -> str:
    """What a refusal may call the whole that a tensor belongs to."""
    tails = "_blocks _scales _bias _scale_inv _scale .weight_packed .weight_shape .qweight .qzeros .scales .g_idx"
    for tail in (".weight_scale", *tails.split()):
        name = name.removesuffix(tail)
    return name


def cases(which: str = "all") -> list[Any]:
    return [
        pytest.param(kind, name, id=f"{kind} {name.removeprefix(LAYER + '.')}")
        for kind, (names, _) in PARTS.items()
        for name in names
        if which == "all" or len(names) > 1
    ]


@pytest.mark.parametrize("kind", PARTS)
def test_unchanged_ones_are_planned(tmp_path: Path, model_of: Callable[[str], Model], kind: str):
    """Otherwise everything below would be refused for no reason."""
    model = model_of(kind)
    made = plan(model.write(tmp_path / "model"))
    assert made.quantized
    assert sum(made.accounts.values()) == len(model.tensors)


# Without these nothing is wrong: the rest says the same (compressed-tensors' shape, GPTQ's trivial order), or the layer
# has no bias.
OPTIONAL = ("weight_shape", "g_idx", "_bias")


@pytest.mark.parametrize(("kind", "name"), cases("partners"))
def test_dropping_one(tmp_path: Path, model_of: Callable[[str], Model], kind: str, name: str):
    model = model_of(kind)
    del model.tensors[name]
    if name.endswith(OPTIONAL):
        assert plan(model.write(tmp_path / "model")).quantized
    else:
        check_refused(model, tmp_path / "model", stem_of(name))


@pytest.mark.parametrize(("kind", "name"), cases("partners"))
def test_renaming_one(tmp_path: Path, model_of: Callable[[str], Model], kind: str, name: str):
    if name.endswith("_bias"):
        pytest.skip("a tensor of another name is another tensor")
    model = model_of(kind)
    new = name.replace(".mlp.", ".mlp2.")
    model.tensors[new] = model.tensors.pop(name)
    check_refused(model, tmp_path / "model", stem_of(name), stem_of(new))


@pytest.mark.parametrize(("kind", "name"), cases("partners"))
def test_misspelling_one(tmp_path: Path, model_of: Callable[[str], Model], kind: str, name: str):
    if name.endswith(OPTIONAL):
        pytest.skip("as if it were not there; copied under its own name")
    model = model_of(kind)
    model.tensors[f"{name}x"] = model.tensors.pop(name)
    check_refused(model, tmp_path / "model", stem_of(name))


@pytest.mark.parametrize("kind", [kind for kind, (names, _) in PARTS.items() if len(names) > 1])
@pytest.mark.parametrize("i", [0, 1, 2, 3])
def test_swapping_one_between_modules(tmp_path: Path, model_of: Callable[[str], Model], kind: str, i: int):
    names, others = PARTS[kind]
    if i >= len(names):
        pytest.skip("fewer tensors a weight")
    model = model_of(kind)
    one, other = names[i], others[i]
    assert model.tensors[one].shape != model.tensors[other].shape or "shape" in one
    model.tensors[one], model.tensors[other] = model.tensors[other], model.tensors[one]
    check_refused(model, tmp_path / "model", stem_of(one), stem_of(other))


@pytest.mark.parametrize("change", ["rows", "last", "axis"])
@pytest.mark.parametrize(("kind", "name"), cases())
def test_changing_a_shape(tmp_path: Path, model_of: Callable[[str], Model], kind: str, name: str, change: str):
    model = model_of(kind)
    tensor = model.tensors[name]
    if change == "rows":
        changed = tensor[:-1] if tensor.shape[0] > 1 else torch.cat((tensor, tensor))
    elif change == "last":
        changed = tensor[..., :-1] if tensor.shape[-1] > 1 else torch.cat((tensor, tensor), -1)
    else:
        changed = tensor.unsqueeze(0)
    model.tensors[name] = changed.contiguous()
    check_refused(model, tmp_path / "model", stem_of(name))


def other_dtypes(tensor: torch.Tensor) -> list[torch.dtype]:
    """Types that mean something else; a float scale may have any float type."""
    if tensor.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return [torch.int32, torch.int8, torch.float64]
    return [torch.bfloat16, torch.int16, torch.int8 if tensor.dtype == torch.uint8 else torch.uint8]


@pytest.mark.parametrize("i", [0, 1, 2])
@pytest.mark.parametrize(("kind", "name"), cases("partners"))
def test_changing_a_dtype(tmp_path: Path, model_of: Callable[[str], Model], kind: str, name: str, i: int):
    model = model_of(kind)
    tensor = model.tensors[name]
    model.tensors[name] = tensor.float().to(other_dtypes(tensor)[i])
    check_refused(model, tmp_path / "model", stem_of(name))


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize("kind", PARTS)
def test_a_config_of_other_sizes(tmp_path: Path, model_of: Callable[[str], Model], kind: str, factor: float):
    model = model_of(kind)
    dense = "mlp.experts" not in PARTS[kind][0][0]
    for i, key in enumerate(("intermediate_size",) if dense else ("moe_intermediate_size", "num_experts")):
        changed = Model(model.tensors, model.config | {key: int(model.config[key] * factor)})
        source = changed.write(tmp_path / f"model{i}")
        with pytest.raises(quantconvert.QuantConvertError, match=rf"tensor `{MLP}\..*from config\.json .*{key}"):
            plan(source)


@pytest.mark.parametrize("key", ["num_experts", "moe_intermediate_size", "hidden_size"])
@pytest.mark.parametrize("value", [None, 0, -3, "3", 3.0, True])
def test_a_config_that_does_not_say_the_sizes(tmp_path: Path, model_of: Callable[[str], Model], key: str, value: Any):
    model = model_of("fused")
    model.config[key] = value
    with pytest.raises(quantconvert.QuantConvertError, match=rf"`{EXPERTS}\.\w+.*expected `{key}` in config\.json"):
        plan(model.write(tmp_path / "model"))


@pytest.mark.parametrize(("kind", "name"), cases())
def test_the_same_name_in_two_files(tmp_path: Path, model_of: Callable[[str], Model], kind: str, name: str):
    model = model_of(kind)
    source = model.write(tmp_path / "model")
    save_file({name: model.tensors[name]}, source / "more.safetensors")
    (source / "model.safetensors").rename(source / "rest.safetensors")
    with pytest.raises(quantconvert.CheckpointError, match=f"tensor `{name}` exists twice"):
        plan(source)


def test_an_expert_of_its_own_beside_the_fused_ones(tmp_path: Path, model_of: Callable[[str], Model]):
    model = model_of("fused")
    name = f"{EXPERTS}.1.up_proj.weight"
    model.tensors[name] = weight(96, 64)
    check_refused(model, tmp_path / "model", name)


@pytest.mark.parametrize("kind", ["fp8", "compressed-tensors", "gptq", "awq"])
def test_a_plain_weight_beside_its_quantized_form(tmp_path: Path, model_of: Callable[[str], Model], kind: str):
    model = model_of(kind)
    if kind == "fp8":
        model.tensors[f"{UP}.weight_scale"] = model.tensors[f"{UP}.weight_scale_inv"].clone()
    else:
        model.tensors[f"{UP}.weight"] = weight(224, 160)
    check_refused(model, tmp_path / "model", UP)
