"""Each malformed checkpoint of `cases.py` is refused with its own message, by a process that stays small."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.build import Case, good
from tests.hostile.cases import CASES

MAX_RSS_NBYTES = 300_000_000
IS_SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")  # whose shadow is memory too
KILL_SECONDS = 20  # against a hang, not a measure of speed

# One process imports the library; a fork of it plans each case, so that each begins with the same 20 MB. Not
# ru_maxrss: that begins with the memory of the process that started this one.
CHILD = r"""
import json, os, re, sys, time, traceback
import quantconvert
from quantconvert.errors import QuantConvertError

def plan(source, options):
    start = time.perf_counter()
    try:
        quantconvert.plan(source, **options)
        found = {"kind": "accepted", "message": ""}
    except QuantConvertError as error:
        found = {"kind": type(error).__name__, "message": error.message, "code": error.exit_code}
    except BaseException:
        found = {"kind": "crash", "message": traceback.format_exc()}
    peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]
    return found | {"seconds": time.perf_counter() - start, "rss": 1024 * int(peak)}

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        print(json.dumps(plan(*json.loads(line))), flush=True)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        print(json.dumps({"kind": "died"}), flush=True)
"""

Ask = Callable[[Path, dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """What `plan` says in a process of its own, and what it took."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdin
    answers = child.stdout
    assert answers

    def send(source: Path, options: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps([str(source), options]), file=child.stdin, flush=True)
        if not select.select([answers], [], [], KILL_SECONDS)[0]:
            os.killpg(child.pid, signal.SIGKILL)
            pytest.fail(f"no answer in {KILL_SECONDS} s")
        found: dict[str, Any] = json.loads(answers.readline())
        return found

    with child:
        yield send
        child.stdin.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, tmp_path: Path, ask: Ask) -> None:
    source = good(tmp_path / "source")
    case.spoil(source)
    found = ask(source, case.options)
    message = found["message"]
    print(f"{found['seconds']:.3f} s, {found['rss'] / 1e6:.0f} MB: {case.name}: {message[:200]}")
    assert (found["kind"], found.get("code")) == (case.kind, 3)
    assert case.says.replace("{source}", str(source)) in message
    assert len(message) < 5000
    assert all(c == "\n" or c.isprintable() for c in message)
    assert found["rss"] < MAX_RSS_NBYTES or IS_SANITIZED


def test_the_good_one_is_accepted(tmp_path: Path, ask: Ask) -> None:
    """Every case is this checkpoint with something wrong."""
    assert ask(good(tmp_path / "source"), {})["kind"] == "accepted"


def test_there_are_enough_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60
