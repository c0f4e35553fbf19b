"""vLLM 0.32. Read in its loaders (`vllm/model_executor/...`), and run by hand on a CPU where a row says so."""

from __future__ import annotations

from quantconvert.engines.row import FLOAT_WIDTHS, KERNEL_GROUPS, PLAIN, Engine, Row, When

_AWQ = "layers/quantization/auto_awq.py"
_GPTQ = "layers/quantization/auto_gptq.py"
_PACKED = "layers/quantization/compressed_tensors/compressed_tensors.py"
_SCHEMES = "schemes/compressed_tensors"
_KERNELS = "kernels/linear/mixed_precision"
CT = ("compressed-tensors",)
CODES = ("awq", *CT, "gptq", "rtn", "fp8")

VLLM = Engine(
    name="vllm",
    title="vLLM",
    version="0.32",
    load="vllm serve {out}",
    serves=True,
    usual=True,
    signed=("awq", *CT, "gptq"),  # Marlin's and Machete's kernels multiply by scales; AutoRound's are of either sign
    rows=(
        Row(When((PLAIN,)), "loads", "model_loader/default_loader.py"),
        Row(When(("awq",), 4, groups=KERNEL_GROUPS), "loads", f"{_AWQ}; run on a CPU", short="CPU too"),
        Row(
            When(("awq",), 4, ("channel",)), "loads", f"{_AWQ}; run on a CPU",
            "AWQ per channel fails with experts or tensor parallelism", "one rank",
        ),
        Row(When(("awq",), 4, ("channel",), experts=True), "refuses", _AWQ),
        Row(
            When(("awq",), other_groups=KERNEL_GROUPS), "refuses", f"{_KERNELS}/marlin.py",
            "AWQ kernels read group sizes 32, 64 and 128, not {width}",
        ),
        Row(
            When(CT, 4, ("group", "channel"), symmetric=True, activations=False), "loads", f"{_PACKED}; run on a CPU",
            short="CPU too",
        ),
        Row(When(CT, 4, ("group", "channel"), symmetric=False), "loads", f"{_PACKED}; run on a CPU"),
        Row(
            When(CT, 8, ("group", "channel"), symmetric=True, activations=False), "loads", f"{_KERNELS}/marlin.py",
            "a CPU has no int8 weight-only kernel", "GPU only",
        ),
        Row(
            When(CT, 8, ("group", "channel"), symmetric=False), "loads", f"{_KERNELS}/machete.py",
            "asymmetric int8 weights run on Hopper only", "Hopper only",
        ),
        Row(
            When(CT, other_groups=KERNEL_GROUPS), "loads", f"{_KERNELS}/marlin.py",
            "the Marlin kernel reads group sizes 32, 64, 128 and -1, not {width}",
        ),
        Row(
            When(CT, strategies=("tensor",), activations=False), "refuses", "schemes/compressed_tensors_wNa16.py",
            "weight-only per-tensor scales are rejected (group or channel is required)",
        ),
        Row(
            When(CT, 8, activations=True), "loads", f"{_PACKED}; run on a CPU", short="CPU too",
        ),
        Row(
            When(CT, 8, activations=True, experts=True), "loads", "compressed_tensors_moe_w8a8_int8.py",
            "W8A8 experts load on a GPU only",
        ),
        Row(
            When(CT, 4, ("group", "channel"), activations=True, experts=False, inputs="int"), "loads",
            "schemes/compressed_tensors_wNa8.py",
            "of its kernels only Humming rounds W4A8's activations, others compute them in 16 bits",
            "activations rounded by Humming alone",
        ),
        Row(
            When(CT, 4, ("group",), (128,), activations=True, inputs="float"), "loads",
            f"{_SCHEMES}_w4a8_fp8.py", "W4AFP8 needs a Hopper GPU", "Hopper only",
        ),
        Row(
            When(CT, 4, activations=True, experts=True, inputs="int"), "refuses", "compressed_tensors_moe.py",
            "packed W4A8 experts do not load",
        ),
        Row(
            When(CT, 8, FLOAT_WIDTHS, activations=True, type="float"), "loads", f"{_SCHEMES}_w8a8_fp8.py",
            "float8 activations need a GPU of compute capability 8.9; older ones compute in 16 bits",
            "older GPUs weight-only",
        ),
        Row(
            When(CT, 8, FLOAT_WIDTHS, activations=False, type="float"), "loads", f"{_SCHEMES}_w8a16_fp8.py",
            "weight-only float8 needs a GPU", "GPU only",
        ),
        Row(
            When(("gptq",), 4, groups=KERNEL_GROUPS, symmetric=True), "loads", f"{_GPTQ}; run on a CPU",
            short="CPU too",
        ),
        Row(When(("gptq",), strategies=("channel",), symmetric=True), "loads", _GPTQ),
        Row(
            When(("gptq",), 8, symmetric=True), "loads", _GPTQ, "a CPU has no int8 weight-only kernel", "GPU only",
        ),
        Row(When(("gptq",), symmetric=False), "refuses", f"{_GPTQ}; run", "asymmetric GPTQ is rejected"),
        Row(
            When(("gptq",), other_groups=KERNEL_GROUPS), "refuses", _GPTQ,
            "GPTQ group sizes 32, 64, 128 and -1 are read, not {width}",
        ),
        Row(
            When(CT, 4, ("group",), (16,), type="float"), "loads", f"{_SCHEMES}_w4a16_nvfp4.py",
            "NVFP4 needs a GPU", "GPU only",
        ),
        Row(
            When(CT, 4, ("group",), (32,), type="float"), "loads", f"{_SCHEMES}_w4a4_mxfp4.py",
            "MXFP4 needs a GPU", "GPU only",
        ),
        Row(
            When(CT, 8, ("group",), (32,), type="float"), "loads", f"{_SCHEMES}_w8a8_mxfp8.py",
            "MXFP8 needs a GPU", "GPU only",
        ),
        Row(When(("fp8",), type="float"), "loads", "layers/quantization/fp8.py", "float8 needs a GPU", "GPU only"),
        Row(When(("rtn",)), "refuses", "layers/quantization/__init__.py", "rtn is not read"),
        Row(When(families=("t5",), type=None), "refuses", "models/registry.py; run", "T5 is not among its models"),
        Row(
            When(CODES, families=("mamba",), type=None), "refuses", "layers/mamba/mamba_mixer.py",
            "Mamba's layers take no quantized weights",
        ),
        Row(
            When(CODES, families=("gpt-oss",), type=None), "wrong", "models/gpt_oss.py",
            "int4 experts of gpt-oss are read only as fused w13 and w2, and others dropped without a message: these "
            "have the names that llm-compressor writes",
        ),
    ),
)  # fmt: skip
