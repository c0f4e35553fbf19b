"""One tiny random model a family: what of it is quantized, and whether engines read the result.

A `Case` says literally what must happen to each tensor of two or more dimensions, by name template, so that the
expectation shares nothing with the tables. Models are built and saved by transformers' own classes, under Hub names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import quantconvert
from quantconvert.checkpoint import Checkpoint
from quantconvert.families import Classifier
from quantconvert.patterns import template_of
from tests.builders import decode_awq, read_tensors
from tests.engines.common import load, write_reference
from tests.engines.decoding import decode_all

# What name rules may decide in any family; everything else is the family's table to say.
NOT_LINEAR = {"embedding", "norm", "conv", "bias", "one-dimensional", "not 2-D", "not a weight"}
TOLERANCE = 1e-4  # of outputs that int4 moves by more than 100 times as much; measured: 0 but for the order of sums


@dataclass(frozen=True)
class Case:
    """`model`: transformers' class. `quantized`: templates of modules. `kept`: template of a tensor to its reason.

    `inputs`: shapes of floating-point inputs by name, where the model reads no token ids. `loads`: how transformers
    reads packed weights of the family; with `CompressedTensorsConfig(dequantize=True)` it multiplies in the stored
    dtype.
    """

    model: str
    config: dict[str, Any]
    quantized: tuple[str, ...]
    kept: dict[str, str]
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    loads: Literal["packed", "with dequantize", "never"] = "packed"


def each(stem: str, *names: str) -> tuple[str, ...]:
    """`stem` with every one of `names` after it."""
    return tuple(f"{stem}.{name}" for name in names)


def random_model(case: Case) -> Any:
    """The model in float32, every matrix and bias random and large enough to show in the outputs."""
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, case.model)
    model = model_class(model_class.config_class(**case.config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(std=0.15)
    return model


def save(case: Case, folder: Path) -> Path:
    """Such a model in bfloat16."""
    random_model(case).bfloat16().save_pretrained(folder)
    return folder


def assert_selection(case: Case, source: Path, **options: Any) -> None:
    """Exactly the expected modules are quantized, and the family's table says so of every linear weight."""
    plan = quantconvert.plan(source, **options)
    wide = [task for task in plan.tasks if len(task.source.shape) > 1]
    assert {template_of(t.source.name) for t in wide if not t.reason} == {f"{name}.weight" for name in case.quantized}
    assert {template_of(t.source.name): t.reason for t in wide if t.reason} == case.kept
    classifier = Classifier(plan.checkpoint)
    roles = {ref.name: classifier.role(ref) for ref in plan.checkpoint.tensors}
    guessed = {name for name, role in roles.items() if not role.by_table and role.reason not in NOT_LINEAR}
    assert not guessed, guessed
    # Mamba2's config has no inner width, Gemma 3n's a list of them
    assert assert_dims(classifier, plan.checkpoint) or case.model in ("Mamba2ForCausalLM", "Gemma3nForCausalLM")


def assert_dims(classifier: Classifier, checkpoint: Checkpoint) -> int:
    """What the family's table says of shapes is what transformers built from this config; how often it said so."""
    family, config = classifier.family, checkpoint.text_config
    assert family
    checked = 0
    for ref in checkpoint.tensors:
        module = template_of(ref.name).removesuffix(".weight")
        stored_turned = any(re.search(pattern, module) for pattern in family.transposed)
        shape = ref.shape[::-1] if stored_turned else ref.shape
        for dims in family.dims if classifier.role(ref).reason is None else ():
            said = config.get(dims.out_features), config.get(dims.in_features)
            if re.search(dims.pattern, module) and None not in said:
                assert shape == said, (module, dims)
                checked += 1
    return checked


def convert(source: Path, folder: Path, **options: Any) -> Path:
    quantconvert.convert(source, folder, group_size=32, **options)
    return folder


def assert_loads(case: Case, source: Path, work: Path) -> None:
    """transformers reads the compressed-tensors folder as it reads a plain one of the decoded weights."""
    folder = convert(source, work / "packed", format="compressed-tensors")
    decoded = decode_all(folder, torch.float32 if case.loads == "packed" else None)
    reference = write_reference(source, folder, work / "reference", decoded)
    if case.loads == "never":
        return assert_close(source, decoded, read_tensors(folder), "weight_scale")
    found = outputs(case, load(folder, case.model, **load_options(case)))
    expected = outputs(case, load(reference, case.model))
    original = outputs(case, load(source, case.model))
    assert any((a - b).abs().max() > 100 * TOLERANCE for a, b in zip(original, expected, strict=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def load_options(case: Case) -> dict[str, Any]:
    import transformers

    return (
        {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
        if case.loads == "with dequantize"
        else {}
    )


def assert_awq_is_close(source: Path, folder: Path, transposed: Iterable[str] = ()) -> None:
    tensors = read_tensors(folder)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    decoded = {module: decode_awq(tensors, module) for module in modules}
    scales = {f"{module}.scales": tensors[f"{module}.scales"].t() for module in modules}
    assert_close(source, decoded, scales, "scales", transposed)


def assert_close(
    source: Path, decoded: dict[str, Tensor], scales: dict[str, Tensor], suffix: str, transposed: Iterable[str] = ()
) -> None:
    """Every decoded weight lies within half a step of the source's, where a step is the group's scale [O, G].

    And an eighth: range, scale and zero point of a group are rounded to bfloat16 first, 15 steps by 2^-8 and the zero
    point by 2^-4 (measured: 0.62 in all).
    """
    originals = read_tensors(source)
    assert decoded
    for module, weight in decoded.items():
        original = originals[f"{module}.weight"].float()
        original = original.t() if module.rpartition(".")[2] in transposed else original
        step = scales[f"{module}.{suffix}"].float().repeat_interleave(32, 1)
        off = ((weight.float() - original).abs() / step).max()
        assert 0.4 < off < 0.63, (module, off)


def outputs(case: Case, model: Any) -> list[Tensor]:
    """Every floating-point tensor that the model answers with."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 96, (2, 12), generator=generator)
    ids[:, -1] = getattr(model.config, "eos_token_id", None) or ids[:, -1]  # BART's classifier looks for it
    given = {name: torch.randn(shape, generator=generator) for name, shape in case.inputs.items()}
    if not given:
        given["input_ids"] = ids
    if model.config.is_encoder_decoder and model.can_generate():
        given["decoder_input_ids"] = ids[:, :6]
    with torch.no_grad():
        answer = model(**given, return_dict=True)
    return [value.float() for value in answer.values() if isinstance(value, Tensor) and value.is_floating_point()]
