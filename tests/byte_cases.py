"""What the converter has always written, as checksums: a fixed set of conversions for `test_byte_identity.py`.

Every source is made of `random.Random` bytes and exact arithmetic, so that it is the same on every processor. The
table was recorded before the joints of the program were changed. `python -m tests.byte_cases` prints that of today,
for a change of bytes that is meant; the CHANGELOG then names it.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantconvert
from quantconvert.errors import QuantConvertError
from tests.builders import LLAMA_CONFIG, write_checkpoint

TABLE = Path(__file__).parent / "golden" / "bytes.json"
# They name the program's version, command and digests, and floating-point sums; other tests hold their content.
NOT_COMPARED = {"README.md", "quantconvert.json", "quantconvert.svg"}
LAYOUTS = ("auto", "awq", "compressed-tensors", "gptq", "rtn")
WIDTHS = ("g32", "g64", "g128", "channel", "tensor")
SCHEMES = (
    *(f"{name}:{width}" for name in ("W4A16", "W4A16_ASYM", "W8A16", "W8A16_ASYM") for width in WIDTHS),
    "W8A8:channel",
    "W8A8:tensor",
)
FEW = ("W4A16:g32", "W4A16_ASYM:g32", "W8A16_ASYM:channel", "W8A8:channel")

H, I, E = 128, 256, 3  # noqa: E741
LAYER = "model.layers.{}"


def floats(seed: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Sums of three random bytes, centred, with a few large ones: exact in float32, then rounded to `dtype`."""
    count = 1
    for size in shape:
        count *= size
    raw = torch.frombuffer(bytearray(random.Random(seed).randbytes(4 * count)), dtype=torch.uint8).view(4, count)
    values = raw[:3].to(torch.int32).sum(0) - 382
    values = torch.where(raw[3] == 0, values * 8, values)
    return (values.float() / 8192).view(shape).to(dtype)


def raw_bytes(seed: str, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(random.Random(seed).randbytes(count)), dtype=torch.uint8).view(shape).clone()


def attention(i: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    shapes = {"q_proj": (H, H), "k_proj": (64, H), "v_proj": (64, H), "o_proj": (H, H)}
    layer = LAYER.format(i)
    return {f"{layer}.self_attn.{n}.weight": floats(f"{n}{i}", *s, dtype=dtype) for n, s in shapes.items()} | {
        f"{layer}.input_layernorm.weight": floats(f"norm{i}", H, dtype=dtype)
    }


def mlp(i: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    shapes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    return {f"{LAYER.format(i)}.mlp.{n}.weight": floats(f"{n}{i}", *s, dtype=dtype) for n, s in shapes.items()}


def rest() -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": floats("embed", 64, H),
        "model.norm.weight": floats("norm", H),
        "lm_head.weight": floats("head", 64, H),
    }


def config(model_type: str, layers: int, **more: Any) -> dict[str, Any]:
    architectures = {"llama": "LlamaForCausalLM"}.get(model_type, "ForCausalLM")
    return (
        LLAMA_CONFIG | {"model_type": model_type, "num_hidden_layers": layers, "architectures": [architectures]} | more
    )


def plain(folder: Path) -> None:
    """A Llama, a layer in each float type, over two files."""
    tensors = rest()
    for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
        tensors |= attention(i, dtype) | mlp(i, dtype)
    write_checkpoint(folder, tensors, config("llama", 3), shards=2)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def fp8(folder: Path) -> None:
    """Blocks of 128 x 128, the last ones partial."""
    tensors = rest() | attention(0) | mlp(0)
    for name, t in list(tensors.items()):
        if "_proj" in name:
            codes = raw_bytes(name, *t.shape)
            codes = codes.masked_fill_((codes & 127) == 127, 1).view(torch.float8_e4m3fn)
            scale = (raw_bytes("scale" + name, -(-t.shape[0] // 128), -(-t.shape[1] // 128)).float() + 1) / 4096
            tensors |= {name: codes, name + "_scale_inv": scale}
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_checkpoint(folder, tensors, config("llama", 1, quantization_config=block))


def granite(folder: Path) -> None:
    """All experts of a layer in one tensor, gate before up."""
    tensors = rest() | attention(0)
    stem = f"{LAYER.format(0)}.block_sparse_moe"
    tensors |= {
        f"{stem}.input_linear.weight": floats("in", E, 2 * I, H),
        f"{stem}.output_linear.weight": floats("out", E, H, I),
        f"{stem}.router.layer.weight": floats("router", E, H),
    }
    write_checkpoint(folder, tensors, config("granitemoe", 1, num_local_experts=E))


def llama4(folder: Path) -> None:
    """Experts stored [in, out]."""
    tensors = rest() | attention(0)
    stem = f"{LAYER.format(0)}.feed_forward"
    tensors |= {
        f"{stem}.experts.gate_up_proj": floats("in", E, H, 2 * I),
        f"{stem}.experts.down_proj": floats("out", E, I, H),
        f"{stem}.router.weight": floats("router", E, H),
    }
    write_checkpoint(folder, tensors, config("llama4_text", 1, num_local_experts=E))


def gpt_oss(folder: Path) -> None:
    """MXFP4 experts, gate and up in turn, with biases."""
    tensors = rest() | attention(0)
    stem = f"{LAYER.format(0)}.mlp"
    tensors |= {f"{stem}.router.weight": floats("router", E, H)}
    for name, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        tensors |= {
            f"{stem}.experts.{name}_blocks": raw_bytes(f"{name}b", E, rows, columns // 32, 16),
            f"{stem}.experts.{name}_scales": 110 + raw_bytes(f"{name}s", E, rows, columns // 32) % 20,
            f"{stem}.experts.{name}_bias": floats(f"{name}bias", E, rows),
        }
    block = {"quant_method": "mxfp4"}
    write_checkpoint(folder, tensors, config("gpt_oss", 1, num_local_experts=E, quantization_config=block))


def gpt2(folder: Path) -> None:
    """Linear weights stored [in, out]."""
    shapes = {"attn.c_attn": (H, 3 * H), "attn.c_proj": (H, H), "mlp.c_fc": (H, I), "mlp.c_proj": (I, H)}
    tensors = {f"h.0.{n}.weight": floats(n, *s, dtype=torch.float32) for n, s in shapes.items()}
    tensors |= {"wte.weight": floats("embed", 64, H), "h.0.ln_1.weight": floats("norm", H)}
    write_checkpoint(folder, tensors, {"model_type": "gpt2", "n_embd": H, "n_inner": I, "n_layer": 1})


def codes(layout: str, scheme: str) -> Callable[[Path], None]:
    """A source in one of our own layouts."""

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as parent:
            source = Path(parent, "plain")
            plain(source)
            quantconvert.convert(source, folder, scheme=scheme, format=layout, ignore=("*.layers.1.self_attn.*",))
        for name in NOT_COMPARED:
            (folder / name).unlink()

    return build


SOURCES: dict[str, Callable[[Path], None]] = {
    "plain": plain, "fp8": fp8, "granite": granite, "llama4": llama4, "gpt-oss": gpt_oss, "gpt2": gpt2,
    "codes-ct8": codes("compressed-tensors", "W8A16:g64"), "codes-awq": codes("awq", "W4A16_ASYM:g32"),
    "codes-gptq": codes("gptq", "W4A16:g128"), "codes-rtn": codes("rtn", "W8A16_ASYM:channel"),
    "codes-w8a8": codes("compressed-tensors", "W8A8:channel"),
}  # fmt: skip
# By more than scheme and layout: rules, shards, and memory so small that everything is cut.
OTHERS: dict[str, dict[str, Any]] = {
    "plain defaults": {},
    "plain mixed": {"scheme": "W4A16:g32", "rules": ("*.down_proj=W8A16:channel", "*.layers.2.*=skip")},
    "plain mixed gptq": {"scheme": "W4A16:g32", "rules": ("*.down_proj=W8A16:g32",), "format": "gptq"},
    "plain preset": {"preset": "first-last-8"},
    "plain shards": {"max_shard_size": 60_000},
    "plain awq cut": {"format": "awq", "memory_limit": "12MB", "workers": 1},
    "plain ranks": {"tensor_parallel": 2, "group_size": 32},
    "llama4 cut": {"format": "gptq", "memory_limit": "12MB", "workers": 2},
    "gpt-oss shards": {"max_shard_size": 40_000, "requantize": True},
    "granite kept": {"ignore": ("*.experts.*",)},
    "fp8 kept": {"ignore": ("*.down_proj",), "bits": 8, "requantize": True},
}


def cases() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(name, source, what to do, options) of every case."""
    for layout in LAYOUTS:
        for scheme in SCHEMES:
            yield f"plain {layout} {scheme}", "plain", "convert", {"format": layout, "scheme": scheme}
        for source in SOURCES:
            for scheme in FEW if source != "plain" else ():
                options = {"format": layout, "scheme": scheme, "requantize": True, "allow_incomplete": source == "gpt2"}
                yield f"{source} {layout} {scheme}", source, "convert", options
    for name, options in OTHERS.items():
        yield name, name.split()[0], "convert", options
    for source in ("fp8", *(name for name in SOURCES if name.startswith("codes"))):
        for layout in LAYOUTS[1:]:
            yield f"{source} repack {layout}", source, "repack", {"format": layout}
        for dtype in ("bfloat16", "float32"):
            yield f"{source} dequantize {dtype}", source, "dequantize", {"dtype": dtype}


@cache
def source_folder(parent: Path, name: str) -> Path:
    SOURCES[name](parent / name)
    return parent / name


def checksums(parent: Path, out: Path, source: str, what: str, options: dict[str, Any]) -> dict[str, str] | str:
    """The first 16 digits of each file's sha256, or `refused`."""
    try:
        getattr(quantconvert, what)(source_folder(parent, source), out, **options)
    except QuantConvertError:
        return "refused"
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in NOT_COMPARED)
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}


def record() -> dict[str, Any]:
    """The table of today."""
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder)
        return {
            name: checksums(parent, parent / "out" / str(i), source, what, options)
            for i, (name, source, what, options) in enumerate(cases())
        }


if __name__ == "__main__":
    print("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in record().items()) + "\n}")
