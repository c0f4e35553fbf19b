"""mlx-lm 0.32 with mlx 0.32, run on a CPU (`tests/engines/test_mlx.py`)."""

from __future__ import annotations

from quantconvert.engines.row import KERNEL_GROUPS, PLAIN, Engine, Row, When

_TEST = "tests/engines/test_mlx.py"
# Of its models those that were tried. It stacks experts before it unpacks AWQ, and refuses GPTQ's g_idx
# (`mlx_lm/utils.py`): silence refuses, so that nobody else reads of it.
TRIED = ("llama", "phi3", "glm", "phi", "starcoder2", "gpt-j", "mamba")
# Models of experts whose codes, scales and biases it stacks itself (`mlx_lm/models/*.py`, `sanitize`); of others it
# stacks weights alone, and refuses the rest.
STACKED = tuple(
    f"{name}ForCausalLM"
    for name in ("Mixtral", "Qwen2Moe", "Olmoe", "DeepseekV2", "DeepseekV3", "DeepseekV32", "Glm4Moe", "Glm4MoeLite")
)

MLX = Engine(
    name="mlx-lm",
    title="mlx-lm",
    version="0.32",
    load="mlx_lm.generate --model {out}",
    signed=("awq", "mlx"),  # tests/engines/test_mlx.py; its own scales are of either sign
    rows=(
        Row(When((PLAIN,)), "loads", "mlx_lm/utils.py (load_model)"),
        Row(When(("mlx",), families=TRIED, experts=False), "loads", _TEST),
        Row(When(("mlx",), architectures=STACKED), "loads", _TEST),
        Row(When(("awq",), 4, ("group",), KERNEL_GROUPS, families=TRIED, experts=False), "loads", _TEST),
    ),
)  # fmt: skip
