"""Peak memory of a whole process against the budget it was given."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROWS, COLUMNS = 65536, 8192  # bfloat16: 1.07 GB in one tensor
BUDGET = 300_000_000

CHILD = """
import json, resource, sys
import torch, quantconvert
import quantconvert.run.executors.threads, quantconvert.card
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
result = quantconvert.convert(sys.argv[1], sys.argv[2], format=sys.argv[3], memory_limit=int(sys.argv[4]), group_size=int(sys.argv[5]), allow_incomplete=True)
print(json.dumps({"before": before, "after": peak(), "promised": result.plan.peak_nbytes}))
"""  # noqa: E501


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is one 1.07 GB weight, written without holding it."""
    folder = tmp_path_factory.mktemp("giant")
    name, nbytes = "model.layers.0.mlp.up_proj.weight", ROWS * COLUMNS * 2
    header = json.dumps({name: {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [0, nbytes]}}).encode()
    block = bytearray(os.urandom(1 << 22))
    block[1::2] = bytes(0x3C + (b & 1) for b in block[1::2])  # exponents of ordinary weights: no NaN, no Inf
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(nbytes // len(block)):
            file.write(block)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.parametrize(
    ("fmt", "group_size"), [("awq", 128), ("compressed-tensors", 128), ("compressed-tensors", 0)], ids=str
)
def test_a_tensor_of_one_gigabyte_under_300_mb(giant: Path, tmp_path: Path, fmt: str, group_size: int):
    command = [sys.executable, "-c", CHILD, str(giant), str(tmp_path / "out"), fmt, str(BUDGET), str(group_size)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    used = measured["after"] - measured["before"]
    print(f"{fmt}: {used / 1e6:.0f} MB used, {measured['promised'] / 1e6:.0f} MB promised, {BUDGET / 1e6:.0f} allowed")
    assert used <= BUDGET
    assert measured["promised"] <= BUDGET
    # the plan's own number holds too, up to what torch's first operations load and the allocator keeps
    assert used <= measured["promised"] + 60_000_000
