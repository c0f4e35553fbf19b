"""The plan of a 689 GB checkpoint from its headers alone: complete, and small in memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import quantconvert
from tests.deepseek import NUM_TENSORS, write_deepseek_v3

# The command line, which says at its end what CPU time and memory it took. (`ru_maxrss` would count the memory of the
# parent, which a child has until it starts another program.)
CHILD = """
import atexit, sys, time
from quantconvert.cli.entry import run
def usage():
    with open("/proc/self/status") as status:
        (peak,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(time.process_time(), peak, file=sys.stderr)
atexit.register(usage)
sys.argv[0] = "quantconvert"
run()
"""


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek_v3(tmp_path_factory.mktemp("large") / "DeepSeek-V3")


def test_plan_of_deepseek_v3(deepseek: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """91,991 tensors: each in exactly one place, in less than 200 MB; the time is printed, not asserted."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", CHILD, "plan", str(deepseek), "--requantize"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shown, (cpu, peak) = done.stdout, map(float, done.stderr.split())
    with capsys.disabled():
        print(f"\nplan of DeepSeek-V3: {time.perf_counter() - begin:.1f} s, {cpu:.1f} s of CPU, {peak / 1e6:.0f} MB")
    assert peak < 200_000_000
    assert (
        f"{NUM_TENSORS} in the source: 45808 partners, 44849 quantized, 959 decoded, 195 copied, 180 changed" in shown
    )
    plan = quantconvert.plan(deepseek, requantize=True).to_json()
    assert plan["num_tensors"] == NUM_TENSORS == sum(plan["accounts"].values())
    assert plan["accounts"] == {"quantized": 44_849, "decoded": 959, "partners": 45_808, "copied": 375}
    kept = {task["name"].partition("self_attn.")[2] for task in plan["tensors"] if task["reason"] == "family"}
    assert kept == {"q_a_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight"}
    mtp = [task for task in plan["tensors"] if ".layers.61." in task["name"]]
    assert {task["reason"] for task in mtp} == {"mtp"}
