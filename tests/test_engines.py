"""Engines as data: what the rows say of a checkpoint, `--engine`, and that no other room names an engine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantconvert
from quantconvert.engines import ENGINES, NOBODY, Loadable, engine_notes, load_lines, snippets
from quantconvert.engines.tables import what_auto_writes
from quantconvert.families import FAMILIES, Family
from quantconvert.job import Job
from quantconvert.layouts import LAYOUTS
from quantconvert.planning.choose import choose_format
from quantconvert.planning.decision import Decision, is_kept_linear
from quantconvert.schemes import DEFAULT_REQUEST, Scheme
from quantconvert.sources import as_stored
from tests.builders import LLAMA_CONFIG, llama_tensors, weight, write_checkpoint
from tests.byte_cases import gpt_oss

PACKAGE = Path(quantconvert.__file__).parent
INT4 = Scheme(4, True, "group", 128)
INT4_ASYM = Scheme(4, False, "group", 128)
INT8 = Scheme(8, True, "channel")
W8A8 = Scheme(8, True, "channel", None, True)
W4A8 = Scheme(4, True, "group", 128, True)


def verdicts(loadable: Loadable) -> str:
    """The four engines' verdicts by first letter, in the order of the registry."""
    return "".join(engine.verdict(loadable)[0] for engine in ENGINES.values())


def literals(tree: ast.Module) -> list[str]:
    """Every string in a module but for docstrings."""
    found: list[str] = []

    class Visitor(ast.NodeVisitor):
        def visit_Expr(self, node: ast.Expr) -> None:
            if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
                self.generic_visit(node)

        def visit_Constant(self, node: ast.Constant) -> None:
            if isinstance(node.value, str):
                found.append(node.value)

    Visitor().visit(tree)
    return found


def test_no_engine_is_named_outside_its_room():
    names = [name.lower() for engine in ENGINES.values() for name in (engine.name, engine.title)]
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        for text in literals(ast.parse(path.read_text())):
            named = [name for name in names if name in text.lower()]
            if room == "pipeline.py" and text == "transformers":
                continue  # a value in diffusers' `model_index.json`: the library that loads a component
            assert not named or room in ("comparison", "engines", "integrations", "observation"), (
                f"{path.relative_to(PACKAGE)}: {text!r}"
            )
            seen += bool(named)
    assert seen > 20


def test_every_row_has_evidence_that_exists_and_a_layout_that_exists():
    root = PACKAGE.parent
    for engine in ENGINES.values():
        for row in engine.rows:
            assert row.evidence
            assert not row.evidence.startswith("tests/") or (root / row.evidence.split(";")[0]).exists(), row.evidence
            assert set(row.when.layouts) <= {*LAYOUTS, "plain"}
            assert row.verdict == "loads" or not (row.packages or row.argument or row.before)


@pytest.mark.parametrize(
    ("loadable", "expected"),
    [
        (Loadable(), "lllll"),
        (Loadable("awq", (INT4_ASYM,), "llama"), "lllll"),
        (Loadable("awq", (INT4_ASYM,), "qwen-moe", has_experts=True), "llwlr"),
        (Loadable("awq", (INT4_ASYM,), "mixtral", has_experts=True), "llwrr"),
        (Loadable("awq", (Scheme(4, False, "channel"),), "llama"), "lrllr"),
        (Loadable("compressed-tensors", (INT4,), "llama"), "lllrr"),
        (Loadable("compressed-tensors", (INT4, INT8), "llama"), "lllrr"),
        (Loadable("compressed-tensors", (INT4_ASYM,), "qwen-moe", has_experts=True), "lwrrr"),
        (Loadable("compressed-tensors", (Scheme(8, False, "channel"),), "llama"), "lrlrr"),
        (Loadable("compressed-tensors", (Scheme(4, True, "tensor"),), "llama"), "rrlrr"),
        (Loadable("compressed-tensors", (W8A8,), "llama"), "lllrr"),
        (Loadable("compressed-tensors", (W8A8,), "qwen-moe", has_experts=True), "lrrrr"),
        (Loadable("compressed-tensors", (W4A8,), "llama"), "lrlrr"),
        (Loadable("compressed-tensors", (W4A8,), "qwen-moe", has_experts=True), "rrlrr"),
        (Loadable("compressed-tensors", (W4A8, W8A8), "llama"), "lrlrr"),
        (Loadable("gptq", (INT4,), "llama"), "llllr"),
        (Loadable("gptq", (INT4_ASYM,), "llama"), "rrllr"),
        (Loadable("gptq", (INT4, INT8), "llama"), "llrlr"),
        (Loadable("mlx", (INT4_ASYM,), "llama"), "rrrrl"),
        (Loadable("mlx", (INT4_ASYM,), "bert"), "rrrrr"),
        (Loadable("rtn", (INT4,), "llama"), "rrlrr"),
        (Loadable("awq", (INT4_ASYM,), "gpt-neox"), "llwlr"),
        (Loadable("compressed-tensors", (INT4,), "gpt-oss", has_experts=True), "wrwrr"),
    ],
    ids=str,
)
def test_verdicts(loadable: Loadable, expected: str):
    assert verdicts(loadable) == expected


@pytest.mark.parametrize("family", ["qwen3-vl-moe", "granite-moe", "granite-hybrid", "gpt-oss"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "rtn"])
def test_experts_that_transformers_knows_only_fused_are_told(layout: str, family: str):
    loadable = Loadable(layout, (INT4,), family, has_experts=True)
    assert ENGINES["transformers"].verdict(loadable) == "wrong"
    assert any("experts of this family load as random numbers" in note for note in engine_notes(loadable))
    assert not any("from_pretrained" in line for line in load_lines(loadable, "out"))


def test_llama4_experts_load_from_compressed_tensors_alone():
    verdict = ENGINES["transformers"].verdict
    assert verdict(Loadable("compressed-tensors", (INT4,), "llama4", has_experts=True)) == "loads"
    assert verdict(Loadable("rtn", (INT4,), "llama4", has_experts=True)) == "wrong"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpt_oss_is_loaded_by_nobody_and_that_is_said(layout: str, tmp_path: Path):
    loadable = Loadable(layout, (INT4,), "gpt-oss", has_experts=True)
    assert "l" not in verdicts(loadable)
    assert load_lines(loadable, "out") == []
    assert any(note.startswith(NOBODY) for note in engine_notes(loadable))


@pytest.mark.process
def test_a_result_that_nobody_loads_says_so_in_its_card_and_summary(tmp_path: Path):
    gpt_oss(tmp_path / "in")
    result = quantconvert.convert(tmp_path / "in", tmp_path / "out", requantize=True)
    assert any(note.startswith(NOBODY) for note in result.plan.notes)
    card = (tmp_path / "out" / "README.md").read_text()
    assert NOBODY in card
    assert "vllm serve" not in card
    command = [sys.executable, "-m", "quantconvert", str(tmp_path / "in"), str(tmp_path / "again"), "--requantize"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.search(rf"^load it +{NOBODY}$", shown, re.M)


PACKED = "compressed-tensors"
DEQUANTIZE = ", quantization_config=CompressedTensorsConfig(dequantize=True))  # transformers + compressed-tensors"


@pytest.mark.parametrize(
    ("family", "architecture", "expected"),
    [
        ("falcon", "FalconForCausalLM", ["vllm serve out", 'AutoModelForCausalLM.from_pretrained("out"' + DEQUANTIZE]),
        ("mamba", "Mamba2ForCausalLM", ['AutoModelForCausalLM.from_pretrained("out"' + DEQUANTIZE]),
        ("t5", "T5ForConditionalGeneration", ['AutoModelForSeq2SeqLM.from_pretrained("out"' + DEQUANTIZE]),
    ],
)
def test_lines_for_families_that_must_be_dequantized(family: str, architecture: str, expected: list[str]):
    assert load_lines(Loadable(PACKED, (INT4,), family, architecture=architecture), "out") == expected
    assert ENGINES["transformers"].verdict(Loadable(PACKED, (INT4, INT8), family)) == "refuses"
    assert ENGINES["transformers"].line(Loadable(PACKED, (W8A8,), family), "out").count("dequantize") == 0


@pytest.mark.parametrize(
    ("family", "architecture", "name"),
    [
        ("vision-language", "Gemma3ForConditionalGeneration", "AutoModelForImageTextToText"),
        ("llama4", "Llama4ForConditionalGeneration", "AutoModelForImageTextToText"),
        ("llama4", "Llama4ForCausalLM", "AutoModelForCausalLM"),
        ("whisper", "WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
        ("bert", "BertModel", "AutoModel"),
        ("llama", "", "AutoModelForCausalLM"),
    ],
)
def test_the_class_has_the_head_that_the_model_has(family: str, architecture: str, name: str):
    assert load_lines(Loadable(PACKED, (INT4,), family, architecture=architecture), "out")[-1].startswith(f"{name}.")


@pytest.mark.parametrize("family", ["falcon", "bart", "bert", "mpt", "t5", "mamba", "whisper"])
def test_gptq_that_transformers_does_not_load_is_told(family: str):
    loadable = Loadable("gptq", (INT4,), family)
    assert not any("from_pretrained" in line for line in load_lines(loadable, "out"))
    assert any(note.startswith("transformers: ") and "GPTQ" in note for note in engine_notes(loadable))


def test_engines_that_say_the_same_are_joined():
    notes = engine_notes(Loadable("gptq", (INT4_ASYM,), "llama"))
    assert notes == ["vLLM and SGLang: asymmetric GPTQ is rejected"]


def test_an_engine_that_was_asked_for_is_not_silent():
    loadable = Loadable("compressed-tensors", (INT4,), "llama")
    assert engine_notes(loadable) == []
    assert engine_notes(loadable, ["gptqmodel"]) == [
        "GPTQModel: compressed-tensors is not read with int4 g128 symmetric"
    ]


def test_lines_are_those_of_engines_that_load_it():
    assert load_lines(Loadable("awq", (INT4_ASYM,), "llama", architecture="LlamaForCausalLM"), "out") == [
        "vllm serve out",
        'AutoModelForCausalLM.from_pretrained("out")  # transformers + gptqmodel',
    ]
    asymmetric = Loadable("compressed-tensors", (INT4_ASYM,), "llama", architecture="LlamaForCausalLM")
    assert load_lines(asymmetric, "out")[1] == (
        'AutoModelForCausalLM.from_pretrained("out", quantization_config=CompressedTensorsConfig(dequantize=True))'
        "  # transformers + compressed-tensors"
    )
    experts = Loadable("gptq", (INT4_ASYM,), "qwen-moe", has_experts=True)
    assert load_lines(experts, "out") == ['GPTQModel.load("out")']
    assert load_lines(Loadable("awq", (INT4,), "llama"), "out", ["sglang"]) == [
        "python -m sglang.launch_server --model-path out"
    ]


def test_an_unknown_family_is_written_where_transformers_can_load_it(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model", config=LLAMA_CONFIG | {"model_type": "never_heard_of"})
    plan = quantconvert.plan(source)
    assert plan.format == "compressed-tensors"
    assert "without a table" in plan.format_reason
    assert quantconvert.plan(source, engines=["vllm"]).format == "awq"


def test_a_preset_that_makes_no_difference_says_so(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model")
    note = "--preset experts-4-rest-8 makes no difference here: every quantized weight is int8 g128 symmetric"
    assert note in quantconvert.plan(source, preset="experts-4-rest-8").notes
    assert not any("no difference" in note for note in quantconvert.plan(source, preset="down-8").notes)


@pytest.mark.parametrize("layout", ["gptq", "rtn"])
def test_activations_that_a_layout_drops_are_told(layout: str, tmp_path: Path):
    quantconvert.convert(write_checkpoint(tmp_path / "model"), tmp_path / "w8a8", scheme="W8A8")
    made = quantconvert.repack(tmp_path / "w8a8", tmp_path / "out", format=layout)
    assert any("quantize their activations too" in note for note in made.plan.notes)
    same = quantconvert.repack(tmp_path / "w8a8", tmp_path / "same", format="compressed-tensors")
    assert not any("activations" in note for note in same.plan.notes)


MOE = LLAMA_CONFIG | {
    "model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": 1, "moe_intermediate_size": 128,
}  # fmt: skip


def experts() -> dict:
    return llama_tensors(layers=1) | {
        f"model.layers.0.mlp.experts.0.{name}.weight": weight(128, 128)
        for name in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize(
    ("engines", "options", "expected"),
    [
        (["vllm"], {}, ("awq", "int4 g128 asymmetric")),
        (["gptqmodel"], {"group_size": -1}, ("awq", "int4 per channel asymmetric")),
        (["sglang"], {"group_size": -1}, ("compressed-tensors", "int4 per channel symmetric")),
        (["gptqmodel"], {"bits": 8}, ("gptq", "int8 g128 symmetric")),
        (["transformers"], {"bits": 8}, ("compressed-tensors", "int8 g128 symmetric")),
        (["transformers", "gptqmodel"], {"bits": 8}, ("gptq", "int8 g128 symmetric")),
        (["transformers"], {"group_size": 0, "symmetric": False}, ("compressed-tensors", "int4 per tensor asymmetric")),
    ],
    ids=str,
)
def test_auto_is_the_first_layout_that_the_engines_load(tmp_path: Path, engines, options, expected):
    plan = quantconvert.plan(write_checkpoint(tmp_path / "model"), engines=engines, **options)
    assert plan.scheme
    assert (plan.format, plan.scheme.label) == expected
    assert "the first layout that" in plan.format_reason


@pytest.mark.parametrize(
    ("engines", "expected"),
    [(["vllm"], "awq"), (["vllm", "gptqmodel"], "awq"), (["transformers"], "compressed-tensors"), ([], None)],
)
def test_auto_of_experts(tmp_path: Path, engines, expected):
    source = write_checkpoint(tmp_path / "model", experts(), config=MOE)
    assert quantconvert.plan(source, engines=engines).format == (expected or "compressed-tensors")


def test_no_layout_for_the_engines_is_refused_with_every_reason(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model", experts(), config=MOE)
    with pytest.raises(quantconvert.QuantConvertError) as caught:
        quantconvert.plan(source, engines=["transformers", "gptqmodel"])
    assert caught.value.exit_code == 4
    lines = caught.value.message.splitlines()
    assert lines[0] == "no layout of these weights loads in transformers and GPTQModel:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(LAYOUTS)
    assert lines[1].startswith("  awq: transformers: experts of a mixture of experts load as random numbers from AWQ")
    assert lines[2] == "  compressed-tensors: GPTQModel: compressed-tensors is not read with int4 g128 symmetric"


def test_a_format_that_is_named_stays_and_the_engine_s_answer_is_told(tmp_path: Path):
    plan = quantconvert.plan(write_checkpoint(tmp_path / "model"), format="rtn", engines=["vllm"])
    assert plan.format == "rtn"
    assert "vLLM: rtn is not read" in plan.notes


def test_an_unknown_engine_is_a_mistake(tmp_path: Path):
    with pytest.raises(quantconvert.UsageError, match="--engine: unknown engine `ollama`"):
        quantconvert.plan(write_checkpoint(tmp_path / "model"), engines=["ollama"])


def test_engines_change_no_digest_beside_the_layout(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model")
    plain, asked = quantconvert.plan(source), quantconvert.plan(source, engines="vllm")
    assert plain.digest == asked.digest


def test_snippets_import_what_they_name():
    """Python of a card runs as it stands: each name is imported."""
    schemes = [Scheme(bits, symmetric, "group", 128) for bits in (4, 8) for symmetric in (True, False)]
    pairs = [(layout, scheme) for layout in LAYOUTS for scheme in schemes]
    loadables = [Loadable(layout, (scheme,), "llama", False, "LlamaForCausalLM") for layout, scheme in pairs]
    found = [pair for loadable in loadables for pair in snippets(loadable, "PATH", tuple(ENGINES))]
    python = [ast.parse(code) for language, code in found if language == "python"]
    assert len(python) > 10
    assert ("bash", "vllm serve PATH") in found
    for tree in python:
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported = {alias.name for node in imports for alias in node.names}
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert used <= imported
        assert used


@pytest.mark.parametrize(
    ("name", "reason", "expected"),
    [
        ("model.layers.0.conv.in_proj.weight", "conv", True),
        ("encoder.embedding_hidden_mapping_in.weight", "embedding", True),
        ("model.altup_unembed_projections.0.weight", "embedding", True),
        ("time_embed.0.weight", "embedding", True),
        ("electra.embeddings_project.weight", "embedding", True),
        ("model.embed_tokens.weight", "embedding", False),
        ("model.embed_tokens_per_layer.weight", "embedding", False),
        ("bert.embeddings.word_embeddings.weight", "embedding", False),
        ("transformer.wte.weight", "embedding", False),
        ("gpt_neox.embed_in.weight", "embedding", False),
        ("shared.weight", "embedding", False),
        ("block.0.SelfAttention.relative_attention_bias.weight", "embedding", False),
        ("model.embed_tokens.scale", "embedding", False),
        ("model.norm.weight", "norm", False),
        ("lm_head.weight", "lm_head", True),
        ("model.layers.0.mlp.up_proj.weight", None, False),
    ],
)
def test_what_is_kept_and_a_linear_layer_to_engines(name: str, reason, expected: bool):
    assert is_kept_linear(name, 2, reason) == expected
    assert not is_kept_linear(name, 3, reason)


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.experts], ids=lambda f: f.name)
def test_the_table_names_the_families_that_auto_makes_an_exception_for(family: Family, tmp_path: Path):
    config = LLAMA_CONFIG | {"model_type": family.model_types[0]}
    checkpoint = quantconvert.plan(write_checkpoint(tmp_path / "model")).checkpoint
    model = Loadable("plain", (), family.name)
    reads = [as_stored(ref) for ref in checkpoint.tensors if "_proj" in ref.name]
    decisions = [Decision(read, None, "", request=DEFAULT_REQUEST) for read in reads]
    choice = choose_format(Job.from_options({}), decisions, config, [], model)
    named = re.findall(r"[\w.-]+", what_auto_writes().split("without a table; ")[1].split("|")[0])
    assert (choice.format.name == "compressed-tensors") == (family.name in named)
