"""transformers 5.23, run with compressed-tensors 0.20, optimum 2.3 and GPTQModel 7.7 on a CPU (`tests/engines`)."""

from __future__ import annotations

from quantconvert.engines.row import FLOAT_WIDTHS, PLAIN, Engine, ModelClass, Row, When

_AWQ = "tests/engines/test_gptqmodel.py"
_GPTQ = "tests/engines/test_gptq.py"
_PACKED = "tests/engines/test_transformers.py"
_W8A8 = "tests/engines/test_w8a8.py"
_FLOATS = "tests/engines/test_floats.py"
_RTN = "tests/engines/test_rtn.py"
_DENSE = "tests/engines/test_families_dense.py"
_MOE = "tests/engines/test_families_moe.py"
_BY_FAMILY = "tests/engines/test_families_gptqmodel.py"
CT, AWQ, GPTQ, RTN, FP8 = ("compressed-tensors",), ("awq",), ("gptq",), ("rtn",), ("fp8",)

DEQUANTIZE = "quantization_config=CompressedTensorsConfig(dequantize=True)"
_BESIDE_AWQ, _BESIDE_CT, _BESIDE_GPTQ = ("gptqmodel",), CT, ("optimum", "gptqmodel")
# It puts a factor behind the activation of these and wants calibration's `act.scales` in the checkpoint
# (`integrations/awq.py`); vLLM and SGLang stop at such a tensor, so that none is written.
SCALED = ("starcoder2", "gpt-j", "gpt-neox", "falcon", "bloom", "mpt")
# It initialises layers of these once more after loading and stops at those without a `weight`.
REINITIALIZED = ("gpt-bigcode", "mamba", "modernbert", "t5")
# The same for compressed-tensors; Falcon's own linear class calls `weight`.
TO_DEQUANTIZE = (*REINITIALIZED, "falcon")
# It knows the experts of these as one tensor only (`conversion_mapping.py`), and has no names for single ones.
FUSED_ONLY = (
    "gpt-oss",
    "qwen3-vl-moe",
    "granite-moe",
    "granite-hybrid",
    "aria",
    "gemma4",
    "granite-swa-moe",
    "inkling",
    "jetmoe",
    "minimax-m3-text",
    "mistral4",
    "step3",
    "zaya",
    "muse-spark",
)
# Renaming, merging or cutting stored tensors while it loads, it stops at packed ones.
UNMERGED = ("kimi-linear", "minimax-m3")
# Their `ForConditionalGeneration` sees pictures (`models/auto/modeling_auto.py`).
PICTURES = ("vision-language", "qwen3-vl-moe", "qwen3.5", "qwen3.5-moe", "llama4")
# optimum knows one stack of layers a model, under a name of its list (`gptq/constants.py`), and no encoders.
NO_BLOCKS = ("mamba", "mpt", "bert", "mpnet", "distilbert", "deberta", "albert", "t5", "whisper", "llama4")
# What it calls layers that the Hub's checkpoints call otherwise (`conversion_mapping.py`), where they stay plain.
RENAMED = (
    ("phimoe", (r"re:.*mlp\.router$",)),  # block_sparse_moe.gate
    ("blip-2", (r"re:.*language_model\.lm_head$",)),  # tied, and not stored
    (
        "mistral_large4",
        (
            r"re:.*self_attn\.(kv_a_proj_with_mqa|kv_b_proj|q_a_proj)$",  # attention.wkv_a_with_mqa and so on
            r"re:.*self_attn\.indexer\..*",
        ),
    ),
    (
        "kimi_k25",
        (
            r"re:.*vision_tower\..*",
            r"re:.*mm_projector\..*",
            r"re:.*self_attn\.(q_a_proj|kv_a_proj_with_mqa|kv_b_proj)$",  # it saves its `layers` as `blocks`
        ),
    ),
)

TRANSFORMERS = Engine(
    name="transformers",
    title="transformers",
    version="5.23",
    load='{before}{model_class}.from_pretrained("{out}"{argument})',
    module="transformers",
    usual=True,
    signed=("awq", *CT, "gptq", "rtn"),  # tests/engines/test_full_range.py
    renamed=RENAMED,
    classes=(
        ModelClass("ForCausalLM", "AutoModelForCausalLM"),
        ModelClass("LMHeadModel", "AutoModelForCausalLM"),
        ModelClass("ForMaskedLM", "AutoModelForMaskedLM"),
        ModelClass("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ModelClass("ForTokenClassification", "AutoModelForTokenClassification"),
        ModelClass("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ModelClass("ForConditionalGeneration", "AutoModelForSeq2SeqLM", ("t5", "bart")),
        ModelClass("ForConditionalGeneration", "AutoModelForSpeechSeq2Seq", ("whisper",)),
        ModelClass("ForConditionalGeneration", "AutoModelForImageTextToText", PICTURES),
        ModelClass("", "AutoModel"),
    ),
    rows=(
        Row(When((PLAIN,)), "loads", _PACKED),
        Row(When(AWQ, 4, ("group",)), "loads", _AWQ, short="with gptqmodel", packages=_BESIDE_AWQ),
        Row(
            When(AWQ, 4, ("channel",)), "loads", _AWQ,
            'a CPU needs AwqConfig(backend="torch_awq") for AWQ per channel', 'CPU: `AwqConfig(backend="torch_awq")`',
            packages=_BESIDE_AWQ,
        ),
        Row(
            When(AWQ, experts=True), "wrong", _MOE,
            "experts of a mixture of experts load as random numbers from AWQ, without an error",
        ),
        Row(
            When(AWQ, families=SCALED), "wrong", _BY_FAMILY,
            "AWQ activations of this family are multiplied by tensors that are not there: random numbers",
        ),
        Row(
            When(AWQ, families=REINITIALIZED), "refuses", _BY_FAMILY,
            "packed layers of this family do not load, but from compressed-tensors with dequantize=True",
        ),
        Row(
            When(AWQ, known=False), "refuses", "8 of 41 such models, run",
            "AWQ layers of some families without a table here stop it; compressed-tensors loads",
        ),
        Row(
            When((*AWQ, *CT, *RTN), families=("nomic-bert",), type=None), "refuses", _BY_FAMILY,
            "the stored Wqkv is cut into three layers during loading, and packed words cannot be cut so",
        ),
        Row(
            When(CT, None, symmetric=True, activations=False), "loads", _PACKED, packages=_BESIDE_CT,
        ),
        Row(
            When(CT, symmetric=False, activations=False), "loads", _PACKED,
            "asymmetric weights load with dequantize=True only, not beside a second scheme", "`dequantize=True`",
            argument=DEQUANTIZE, packages=_BESIDE_CT,
        ),
        Row(
            When(CT, symmetric=True, activations=False, families=TO_DEQUANTIZE), "loads", _DENSE,
            "weights of this family load with dequantize=True only", argument=DEQUANTIZE,
        ),
        Row(
            When(CT, several=True, families=TO_DEQUANTIZE), "refuses", "integrations/compressed_tensors.py",
            "dequantize=True, which this family needs, knows one scheme a model",
        ),
        Row(When(CT, symmetric=False, several=True), "refuses", "integrations/compressed_tensors.py; run"),
        Row(
            When(CT, symmetric=False, experts=True), "refuses", "integrations/compressed_tensors.py; run",
            "asymmetric experts fail to load",
        ),
        Row(When(CT, activations=True), "loads", _W8A8, packages=_BESIDE_CT),
        Row(When(CT, 8, activations=True, experts=True), "refuses", _W8A8, "W8A8 experts do not load"),
        Row(When(CT, 8, FLOAT_WIDTHS, type="float"), "loads", _FLOATS, packages=_BESIDE_CT),
        Row(When(CT, None, ("group",), (16, 32), type="float"), "loads", _FLOATS, packages=_BESIDE_CT),
        Row(
            When(CT, 4, ("group",), (16,), experts=True, type="float"), "wrong", _FLOATS,
            "NVFP4 experts load without what divides their scales: wrong numbers, without an error",
        ),
        Row(
            When(CT, 8, ("group",), (32,), experts=True, type="float"), "refuses", _FLOATS, "MXFP8 experts do not load",
        ),
        Row(
            When(CT, 8, ("block",), experts=True, type="float"), "refuses", _FLOATS,
            "float8 experts in blocks do not load from compressed-tensors; from --format fp8 they do",
        ),
        Row(
            When(FP8, type="float"), "loads", _FLOATS, "without a GPU it decodes fp8 to bfloat16 while it loads",
            "decoded without a GPU", packages=("accelerate",),
        ),
        Row(
            When(CT, 4, activations=True, experts=True), "loads", _W8A8,
            "activations of W4A8 experts are not rounded", packages=_BESIDE_CT,
        ),
        Row(
            When((*AWQ, *GPTQ), families=("gpt2",)), "refuses", "pytorch_utils.py (Conv1D); run",
            "layers of this family (Conv1D) load from no quantized layout",
        ),
        Row(
            When((*CT, *RTN), families=("gpt2",), type=None), "wrong", "pytorch_utils.py (Conv1D); run",
            "layers of this family (Conv1D) load from no quantized layout, and from compressed-tensors as random "
            "numbers",
        ),
        Row(
            When((*CT, *RTN), experts=True, families=FUSED_ONLY, type=None), "wrong", _MOE,
            "experts of this family load as random numbers, without an error",
        ),
        Row(
            When((*CT, *RTN), families=UNMERGED, type=None), "refuses", "tests/engines/test_every_model.py",
            "stored tensors of this family are merged or cut during loading, and packed ones cannot be",
        ),
        Row(
            When(RTN, experts=True, families=("llama4",)), "wrong", _MOE,
            "experts of this family load as random numbers, without an error",
        ),
        Row(
            When(GPTQ, strategies=("group",)), "loads", _GPTQ, short="with gptqmodel", packages=_BESIDE_GPTQ,
        ),
        Row(
            When(GPTQ, strategies=("channel",)), "loads", "integrations of optimum; not run on a GPU",
            "a CPU has no kernel for GPTQ per channel", "not on a CPU", packages=_BESIDE_GPTQ,
        ),
        Row(
            When(GPTQ, families=NO_BLOCKS), "refuses", _BY_FAMILY,
            "optimum does not find the layers of this family in GPTQ",
        ),
        Row(
            When(GPTQ, families=("lfm3",)), "wrong", _BY_FAMILY,
            "a projection of this family is renamed after optimum has chosen its layers by name: random numbers",
        ),
        Row(
            When(GPTQ, families=("modernbert", "gpt-bigcode")), "refuses", _BY_FAMILY,
            "packed layers of this family do not load, but from compressed-tensors with dequantize=True",
        ),
        Row(
            When(GPTQ, families=("falcon", "bart", "nomic-bert")), "wrong", _BY_FAMILY,
            "GPTQ layers of this family load as random numbers, without an error",
        ),
        Row(
            When(GPTQ, several=True), "refuses", "optimum gptq/quantizer.py",
            "GPTQ's `dynamic` is ignored, and several schemes fail",
        ),
        Row(
            When(GPTQ, experts=True), "wrong", _MOE,
            "experts of a mixture of experts load as random numbers from GPTQ, without an error",
        ),
        Row(
            When(RTN, families=("falcon",)), "refuses", f"{_RTN}; run",
            "layers of this family are no ordinary linear ones, which rtn needs",
        ),
        Row(
            When(RTN, 4, families=("t5",)), "refuses", f"{_RTN}; run",
            "T5 casts what it multiplies to the dtype of rtn's codes, and stops",
        ),
        Row(
            When(RTN, 8, symmetric=False, families=("t5",)), "refuses", f"{_RTN}; run",
            "T5 casts what it multiplies to the dtype of rtn's codes, and stops",
        ),
        Row(
            When(RTN), "loads", _RTN,
            "rtn loads after `import quantconvert.integrations.transformers`; without it 8-bit codes are taken for "
            "weights with no more than a warning", "after `import quantconvert.integrations.transformers`",
            before="import quantconvert.integrations.transformers; ",
        ),
    ),
)  # fmt: skip
