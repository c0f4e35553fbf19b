"""The plan of a 689 GB checkpoint from its headers alone: complete, and small in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quantconvert
from tests.deepseek import NUM_TENSORS, write_deepseek_v3


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek_v3(tmp_path_factory.mktemp("large") / "DeepSeek-V3")


def test_plan_of_deepseek_v3(deepseek: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """91,991 tensors: each in exactly one place, in less than 400 MB; the time is printed, not asserted."""
    command = [sys.executable, "-m", "quantconvert", "plan", str(deepseek), "--requantize"]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shown = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    with capsys.disabled():
        seconds, peak = time.perf_counter() - begin, usage.ru_maxrss / 1000
        print(f"\nplan of DeepSeek-V3: {seconds:.1f} s, {usage.ru_utime:.1f} s of CPU, {peak:.0f} MB")
    assert usage.ru_maxrss * 1024 < 400_000_000
    assert f"{NUM_TENSORS} in the source: 45808 partners, 44849 quantized, 959 decoded, 375 copied" in shown
    plan = quantconvert.plan(deepseek, requantize=True).to_json()
    assert plan["num_tensors"] == NUM_TENSORS == sum(plan["accounts"].values())
    assert plan["accounts"] == {"quantized": 44_849, "decoded": 959, "partners": 45_808, "copied": 375}
    kept = {task["name"].partition("self_attn.")[2] for task in plan["tensors"] if task["reason"] == "family"}
    assert kept == {"q_a_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight"}
    mtp = [task for task in plan["tensors"] if ".layers.61." in task["name"]]
    assert {task["reason"] for task in mtp} == {"mtp"}
