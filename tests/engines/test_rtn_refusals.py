"""How our integration reads the config of rtn folders, what it refuses to load, and how it is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers

import quantconvert.integrations.transformers as integration
from quantconvert.api import convert
from quantconvert.errors import QuantConvertError, UnsupportedError
from tests.builders import LLAMA_CONFIG, llama_tensors, read_tensors, weight, write_checkpoint
from tests.engines import moe
from tests.engines.common import TINY_LLAMA, load


def test_the_first_override_that_matches_the_start_of_a_name_counts():
    overrides = {"b": {"bits": 8}, r"a\.\d": {"group_size": -1}, "a.*": {"bits": 8, "group_size": 0}}
    config = integration.RtnConfig(4, 64, True, ["c$"], overrides)
    schemes = {name: config.scheme_of(name).label for name in ("a.0", "a.b", "c.b", "b")}
    assert schemes == {
        "a.0": "int4 per channel symmetric",
        "a.b": "int8 per tensor symmetric",
        "c.b": "int4 g64 symmetric",
        "b": "int8 g64 symmetric",
    }
    assert [config.is_kept(name) for name in ("c", "c.b", "a.c")] == [True, False, False]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("mixture")
    convert(moe.save(moe.qwen3_moe, work / "original"), work / "out", format="rtn", group_size=64)
    return work / "out"


def edited(folder: Path, out: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """A copy of the folder with its quantization_config and tensors changed by `edit`."""
    config, tensors = json.loads((folder / "config.json").read_text()), read_tensors(folder)
    edit(config["quantization_config"], tensors)
    return write_checkpoint(out, tensors, config)


QUERY, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.0.up_proj"


def _quantize_router(block: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    block["modules_to_not_convert"] = []
    for suffix in ("weight", "weight_scale"):
        tensors[f"model.layers.0.mlp.gate.{suffix}"] = tensors[f"{EXPERT}.{suffix}"].clone()


BROKEN: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "bits": (lambda block, _: block.update(bits=3), "expected bits 4 or 8, got 3"),
    "group size": (lambda block, _: block.update(group_size=-2), "group-size"),
    "field": (lambda block, _: block.update(order="row"), "fields that rtn does not know: order"),
    "override": (lambda block, _: block.update(overrides={".*": {"zero": 1}}), "cannot override zero"),
    "pattern": (lambda block, _: block.update(modules_to_not_convert=["("]), "no regular expression"),
    "kept": (lambda block, _: block.update(modules_to_not_convert=[".*q_proj"]), "q_proj` is quantized, but named"),
    "width": (lambda block, _: block.update(group_size=32), r"weight_scale BF16 \[128, 2\], got BF16 \[128, 1\]"),
    "8 bit": (lambda block, _: block.update(bits=8), r"expected weight I8 \[128, 64\], got U8 \[64, 64\]"),
    "symmetry": (lambda block, _: block.update(symmetric=False), r"weight_zero_point U8 \[\d+, \d\], got absent"),
    "scale": (lambda _, tensors: tensors.pop(f"{QUERY}.weight_scale"), f"`{QUERY}` .* got absent"),
    "expert": (lambda _, tensors: tensors.pop(f"{EXPERT}.weight_scale"), f"`{EXPERT}` .* got absent"),
    "plain expert": (
        lambda _, tensors: tensors.update({f"{EXPERT}.weight": weight(64, 128)}),
        "gate_up_proj` merges weights, which must share one scheme, got .* `.*0.up_proj`: not quantized",
    ),
    "router": (_quantize_router, r"`model.layers.0.mlp.gate` is quantized, but \w+Router is no ordinary linear layer"),
}


@pytest.mark.parametrize(("edit", "message"), BROKEN.values(), ids=BROKEN)
def test_refuses(mixture: Path, tmp_path: Path, edit: Callable[[Any, Any], None], message: str):
    with pytest.raises(QuantConvertError, match=message):
        load(edited(mixture, tmp_path / "out", edit))


def test_refuses_other_files_than_safetensors(mixture: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((mixture / "config.json").read_text())
    torch.save(read_tensors(mixture), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="safetensors files only"):
        load(tmp_path)


def test_refuses_a_quantized_tied_head(tmp_path: Path):
    tensors = llama_tensors() | {"lm_head.weight": torch.zeros(64, 128, dtype=torch.int8)}
    tensors["lm_head.weight_scale"] = torch.ones(64, 1, dtype=torch.bfloat16)
    block = {"quant_method": "rtn", "bits": 8, "group_size": -1, "symmetric": True}
    write_checkpoint(tmp_path, tensors, LLAMA_CONFIG | {"tie_word_embeddings": True, "quantization_config": block})
    with pytest.raises(UnsupportedError, match="`lm_head` is quantized, but the model ties it"):
        load(tmp_path)


def test_refuses_a_mapping_of_names_that_it_cannot_know(tmp_path: Path):
    convert(TINY_LLAMA, tmp_path / "out", format="rtn", bits=8, group_size=-1)
    tensors = {name.replace("mlp", "ffn"): tensor for name, tensor in read_tensors(tmp_path / "out").items()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(UnsupportedError, match="knows no key_mapping"):
        load(write_checkpoint(tmp_path / "renamed", tensors, config), key_mapping={"ffn": "mlp"})


def test_refuses_parts_of_a_model():
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=object()))
    with pytest.raises(UnsupportedError, match="tp_plan"):
        integration.RtnHfQuantizer(integration.RtnConfig(4, 128, True))._process_model_before_weight_loading(model)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_again_and_only_when_asked():
    code = """if True:
        import sys, importlib
        import quantconvert.api, quantconvert.cli.main, quantconvert.integrations
        assert "transformers" not in sys.modules
        import quantconvert.integrations.transformers as module
        importlib.reload(module)
        from transformers.quantizers import auto
        assert auto.AUTO_QUANTIZER_MAPPING["rtn"] is module.RtnHfQuantizer
        auto.AUTO_QUANTIZER_MAPPING["rtn"] = auto.AwqQuantizer
        importlib.reload(module)
    """
    done = python(code)
    assert "ImportError: transformers has a quantization method `rtn` already" in done.stderr, done.stderr


def test_old_transformers():
    code = """if True:
        import transformers.quantizers.base
        del transformers.quantizers.base.HfQuantizer.get_load_operations
        import quantconvert.integrations.transformers
    """
    expected = f"ImportError: {integration.__name__} needs transformers>={integration.MINIMUM}, found {{}}: "
    assert expected.format(transformers.__version__) in python(code).stderr
