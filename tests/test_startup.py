"""What makes start-up and planning quick, without a clock: what is imported, and how often something is decided."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import quantconvert
from quantconvert.cli.failures import Session
from quantconvert.cli.words import COMPLETE, Command, given, read_plain
from quantconvert.families import Classifier
from quantconvert.planning import decide, lower
from quantconvert.sources import sites
from tests.builders import write_checkpoint
from tests.raw_files import write_headers

HEAVY = {"torch", "numpy", "rich", "tqdm", "yaml", "huggingface_hub", "pydantic", "quantconvert.observation"}
# Prints what is imported when the command line ends.
CHILD = """
import atexit, sys
from quantconvert.cli.entry import run
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
sys.argv[0] = "quantconvert"
run()
"""


def imported(*words: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.process
def test_help_imports_the_parser_and_the_options() -> None:
    found = imported("--help")
    assert "typer" in found
    assert not found & {*HEAVY, "quantconvert.api", "quantconvert.planning", "quantconvert.families.tables"}


@pytest.mark.process
def test_plan_imports_neither_the_parser_nor_what_runs_it(tmp_path: Path) -> None:
    found = imported("plan", str(write_checkpoint(tmp_path / "model")), "--bits", "4")
    assert "quantconvert.planning" in found
    unwanted = {"typer", "click", "quantconvert.conversion", "quantconvert.verification", "quantconvert.run.execute"}
    assert not found & (HEAVY | unwanted)


# Words that are read without the parser

PLAIN: Sequence[list[str]] = (
    ["plan", "SRC"],
    ["plan", "SRC", "OUT", "--bits", "4", "--group-size", "-1"],
    ["plan", "--bits=8", "SRC", "--json", "-v", "--explain"],
    ["SRC", "OUT", "--no-equalize", "--ignore", "*.a", "--ignore=re:b", "--rule", "*.q_proj=W8A16", "-q"],
    ["convert", "SRC", "OUT", "--asymmetric", "--bits", "4", "--bits", "8"],
    ["SRC", "OUT", "--ignore", ""],
    ["verify", "OUT", "--source", "SRC"],
    ["inspect", "DIR", "--revision", "main"],
    ["finish", "OUT", "--verify", "--workers", "2"],
    ["observe", "SRC", "STATS", "--self", "--tokens", "12"],
    ["repack", "SRC", "OUT", "--format", "gptq"],
    ["dequantize", "SRC", "OUT", "--dtype", "float16", "--overwrite"],
)  # fmt: skip
Heard = tuple[str, tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Heard]:
    """What commands are called with, in place of calling them."""
    found: list[Heard] = []

    def run(self: Command, session: Session, words: dict[str, Any]) -> int:
        found.append((self.name, tuple(words[a.name] for a in self.arguments), given(self.options, words)))
        return 0

    monkeypatch.setattr(Command, "run", run)
    return found


@pytest.mark.parametrize("args", PLAIN, ids=" ".join)
def test_plain_words_mean_what_the_parser_takes_them_for(args: list[str], heard: list[Heard]) -> None:
    from quantconvert.cli.parser import app

    plain = read_plain(args)
    assert plain is not None
    plain[0].run(Session(), plain[1])
    app(args, prog_name="quantconvert", obj=Session(), standalone_mode=False)
    assert heard[0] == heard[1]


@pytest.mark.parametrize(
    "words",
    ["", "--help", "--version", "plan", "plan --help", "plan A B C", "plan A --bist 4", "plan A --bits",
     "plan A --bits --json", "plan A --json=yes", "plan A -qv", "plan -- A", "plan A --ignore -x", "plan A \udcff"],
)  # fmt: skip
def test_other_words_are_the_parsers(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_plain(words.split()) is None
    monkeypatch.setenv(COMPLETE, "complete_bash")
    assert read_plain(["plan", "A"]) is None


# Decisions


def write_experts(folder: Path, layers: int, experts: int) -> Path:
    """A Qwen3-MoE of which only the headers take room."""
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": layers, "num_experts": experts, "hidden_size": 256,
        "moe_intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    }  # fmt: skip
    tensors = {"model.embed_tokens": (512, 256), "model.norm": (256,), "lm_head": (512, 256)}
    for layer in (f"model.layers.{i}" for i in range(layers)):
        tensors |= {f"{layer}.{norm}": (256,) for norm in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {f"{layer}.self_attn.{name}": (128, 256) for name in ("k_proj", "v_proj")}
        tensors |= {f"{layer}.self_attn.{name}": (256, 256) for name in ("q_proj", "o_proj")}
        tensors[f"{layer}.mlp.gate"] = (experts, 256)
        for expert in (f"{layer}.mlp.experts.{i}" for i in range(experts)):
            tensors |= {f"{expert}.gate_proj": (128, 256), f"{expert}.up_proj": (128, 256)}
            tensors[f"{expert}.down_proj"] = (256, 128)
    file = [(f"{name}.weight", "BF16", shape) for name, shape in tensors.items()]
    return write_headers(folder, {"model-00001-of-00001.safetensors": file}, config)


@pytest.mark.parametrize("options", [{}, {"group_size": -1, "bits": 8}, {"format": "gptq"}], ids=str)
def test_what_alike_tensors_share_is_decided_once(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of decisions grows neither with layers nor with experts."""
    calls: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **more: Any) -> Any:
            calls[name] += 1
            return real(*args, **more)

        monkeypatch.setattr(owner, name, call)

    counted(Classifier, "_classify")
    counted(Classifier, "_kind_of")
    counted(decide, "_fate")
    counted(sites, "_look")
    counted(lower, "cut")
    few = quantconvert.plan(write_experts(tmp_path / "few", 2, 4), **options)
    first = calls.copy()
    calls.clear()
    many = quantconvert.plan(write_experts(tmp_path / "many", 5, 24), **options)
    first["_kind_of"] = calls["_kind_of"] = 12  # a router has as many rows as there are experts
    assert calls == first
    assert len(few.quantized) == 2 * (4 + 3 * 4)
    assert len(many.quantized) == 5 * (4 + 3 * 24)
    assert max(calls.values()) < 16
