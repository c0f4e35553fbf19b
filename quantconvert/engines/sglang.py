"""SGLang 0.5.23, read in its loaders (`sglang/srt/layers/quantization/...`); not run."""

from __future__ import annotations

from quantconvert.engines.row import FLOAT_WIDTHS, KERNEL_GROUPS, PLAIN, Engine, Row, When

_PACKED = "compressed_tensors/compressed_tensors.py"
_WNA16 = "compressed_tensors/schemes/compressed_tensors_wNa16.py"
_MOE = "compressed_tensors/schemes/compressed_tensors_wNa16_moe.py"
_GPTQ = "gptq/gptq.py"
CT = ("compressed-tensors",)
CODES = ("awq", *CT, "gptq", "rtn", "fp8")

SGLANG = Engine(
    name="sglang",
    title="SGLang",
    version="0.5",
    load="python -m sglang.launch_server --model-path {out}",
    serves=True,
    signed=("awq", *CT, "gptq"),  # the same kernels
    rows=(
        Row(When((PLAIN,)), "loads", "srt/model_loader/loader.py"),
        Row(When(("awq",), 4, groups=KERNEL_GROUPS), "loads", "awq/awq.py"),
        Row(
            When(("awq",), strategies=("channel",)), "refuses", "awq/awq.py",
            "AWQ kernels read group sizes 32, 64 and 128, not {width}",
        ),
        Row(
            When(("awq",), other_groups=KERNEL_GROUPS), "refuses", "awq/awq.py",
            "AWQ kernels read group sizes 32, 64 and 128, not {width}",
        ),
        Row(When(CT, None, ("group", "channel"), symmetric=True, activations=False), "loads", _WNA16),
        Row(When(CT, 4, ("group", "channel"), symmetric=False), "loads", _WNA16),
        Row(
            When(CT, symmetric=False, experts=True), "wrong", _MOE, "asymmetric experts are computed wrongly",
        ),
        Row(When(CT, 8, symmetric=False), "refuses", _WNA16, "asymmetric int8 weights are not read"),
        Row(When(CT, 8, activations=True), "loads", _PACKED),
        Row(When(CT, 8, activations=True, experts=True), "refuses", _PACKED, "W8A8 experts do not load"),
        Row(When(CT, 4, activations=True), "refuses", _PACKED, "W4A8 is not read"),
        Row(
            When(CT, 8, FLOAT_WIDTHS, activations=True, type="float"), "loads",
            "compressed_tensors/schemes/compressed_tensors_w8a8_fp8.py",
            "float8 activations need a GPU of compute capability 8.9", "newer GPUs",
        ),
        Row(
            When(CT, 8, ("tensor", "channel"), activations=False, type="float"), "loads",
            "compressed_tensors/schemes/compressed_tensors_w8a16_fp8.py", "weight-only float8 needs a GPU", "GPU only",
        ),
        Row(
            When(CT, 8, ("block",), activations=False, type="float"), "refuses",
            "compressed_tensors/schemes/compressed_tensors_w8a16_fp8.py", "weight-only float8 in blocks is not read",
        ),
        Row(When(CT, several=True, experts=True), "refuses", _MOE),
        Row(When(("gptq",), symmetric=True), "loads", _GPTQ),
        Row(When(("gptq",), symmetric=False), "refuses", _GPTQ, "asymmetric GPTQ is rejected"),
        Row(
            When(("gptq",), other_groups=KERNEL_GROUPS), "refuses", _GPTQ,
            "GPTQ group sizes 32, 64, 128 and -1 are read, not {width}",
        ),
        Row(
            When(CT, 4, ("group",), (16,), type="float"), "loads",
            "compressed_tensors/schemes/compressed_tensors_w4a16_fp4.py", "NVFP4 needs a GPU", "GPU only",
        ),
        Row(When(CT, 4, ("group",), (32,), type="float"), "refuses", _PACKED, "MXFP4 is not read"),
        Row(When(CT, 8, ("group",), (32,), type="float"), "refuses", _PACKED, "MXFP8 is not read"),
        Row(When(("fp8",), type="float"), "loads", "layers/quantization/fp8.py", "float8 needs a GPU", "GPU only"),
        Row(When(("rtn",)), "refuses", "__init__.py", "rtn is not read"),
        Row(
            When(CODES, families=("gpt-oss",), type=None), "refuses", "srt/models/gpt_oss.py",
            "no int4 experts of gpt-oss are read",
        ),
    ),
)  # fmt: skip
