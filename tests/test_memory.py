"""Peak memory of a whole process against the budget it was given."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from quantconvert.kernels import kernel_label

ROWS, COLUMNS = 65536, 8192  # bfloat16: 1.07 GB in one tensor
BUDGET = 300_000_000

ROTATED = (8192, 32768)  # 0.54 GB in one tensor whose rows a rotation mixes, 1.07 GB as float32
ROTATED_BUDGET = 100_000_000

CHILD = '''
import json, resource, sys
import torch, quantconvert
import quantconvert.run.executors.threads, quantconvert.card
def peak():
    """Of this process alone: what getrusage says includes that of the process which started it (Linux)."""
    try:
        lines = open("/proc/self/status").read().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
result = quantconvert.convert(sys.argv[1], sys.argv[2], memory_limit=int(sys.argv[3]), **json.loads(sys.argv[4]))
assert bool(result.factors) == json.loads(sys.argv[4]).get("equalize", False)
print(json.dumps({"before": before, "after": peak(), "promised": result.plan.peak_nbytes}))
'''


def measure(source: Path, out: Path, budget: int, **options: Any) -> dict[str, int]:
    """Resident memory of a conversion's process before it and at its peak, and what the plan promised, in bytes."""
    command = [sys.executable, "-c", CHILD, str(source), str(out), str(budget), json.dumps(options)]
    found: dict[str, int] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def assert_within(measured: dict[str, int], budget: int) -> None:
    used = measured["after"] - measured["before"]
    print(f"{used / 1e6:.0f} MB used, {measured['promised'] / 1e6:.0f} MB promised, {budget / 1e6:.0f} allowed")
    assert used <= budget
    assert measured["promised"] <= budget
    # the plan's own number holds too, up to what torch's first operations load and the allocator keeps
    assert used <= measured["promised"] + 60_000_000


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is one 1.07 GB weight and the norm that it reads, written without holding it."""
    folder = tmp_path_factory.mktemp("giant")
    nbytes, norm = ROWS * COLUMNS * 2, COLUMNS * 2
    entries = {
        "model.layers.0.mlp.up_proj.weight": {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [0, nbytes]},
        "model.layers.0.post_attention_layernorm.weight": {
            "dtype": "BF16", "shape": [COLUMNS], "data_offsets": [nbytes, nbytes + norm],
        },
    }  # fmt: skip
    header = json.dumps(entries).encode()
    block = bytearray(os.urandom(1 << 22))
    block[1::2] = bytes(0x3C + (b & 1) for b in block[1::2])  # exponents of ordinary weights: no NaN, no Inf
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(nbytes // len(block)):
            file.write(block)
        file.write(block[:norm])
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.parametrize(
    ("fmt", "group_size", "equalize"),
    [("awq", 128, True), ("compressed-tensors", 128, True), ("awq", 128, False), ("compressed-tensors", 0, False)],
    ids=str,
)
def test_a_tensor_of_one_gigabyte_under_300_mb(giant: Path, tmp_path: Path, fmt: str, group_size: int, equalize: bool):
    options = {"format": fmt, "group_size": group_size, "equalize": equalize, "allow_incomplete": True}
    assert_within(measure(giant, tmp_path / "out", BUDGET, **options), BUDGET)


PLAIN_CHILD = """
import sys
import quantconvert
how = {"equalize": False, "allow_incomplete": True, "workers": 2, "verify": True}
quantconvert.convert(sys.argv[1], sys.argv[2], format=sys.argv[3], **how)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("torch" in sys.modules, peak)
"""


@pytest.mark.skipif(kernel_label() == "torch" or not Path("/proc/self/status").exists(), reason="C kernel, Linux")
@pytest.mark.parametrize("fmt", ["awq", "compressed-tensors", "gptq", "rtn"])
def test_a_plain_conversion_under_100_mb_of_process(giant: Path, tmp_path: Path, fmt: str):
    """All of it, Python and verification included."""
    command = [sys.executable, "-c", PLAIN_CHILD, str(giant), str(tmp_path / "out"), fmt]
    imported, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    print(f"{fmt}: {int(peak) / 1e6:.0f} MB")
    assert imported == "False"
    assert int(peak) < 100_000_000


def test_a_tensor_of_which_all_rows_mix_under_100_mb(tmp_path: Path):
    """It lies in a scratch file, and the disk is asked for that."""
    hidden, wide = ROTATED
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (16, hidden), "lm_head.weight": (16, hidden), "model.norm.weight": (hidden,),
        f"{layer}.input_layernorm.weight": (hidden,), f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.self_attn.o_proj.weight": (hidden, wide), f"{layer}.mlp.down_proj.weight": (hidden, 64),
    }  # fmt: skip
    shapes |= {f"{layer}.self_attn.{name}_proj.weight": (128, hidden) for name in "qkv"}
    shapes |= {f"{layer}.mlp.{name}_proj.weight": (64, hidden) for name in ("gate", "up")}
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)  # zeros, which take no room on the disk
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1,
              "hidden_size": hidden, "intermediate_size": 64, "num_attention_heads": wide // 128}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"scheme": "W8A8", "rotate": "r1"}
    measured = measure(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", ROTATED_BUDGET, **options)
    assert_within(measured, ROTATED_BUDGET)
    plan = quantconvert.plan(tmp_path, memory_limit=ROTATED_BUDGET, **options)
    assert plan.scratch_nbytes >= 4 * hidden * wide > 10 * ROTATED_BUDGET
