"""Decoders without experts."""

from __future__ import annotations

from quantconvert.families.common import FUSED_COMMON, LINEAR_ATTENTION, LINEAR_MLP
from quantconvert.families.model import Family

LLAMA = Family(
    name="llama",
    model_types=(
        "llama", "mistral", "mistral3", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3",
        "granite", "smollm3", "olmo2", "olmo3", "stablelm", "cohere", "cohere2", "seed_oss", "exaone4", "starcoder2",
    ),
    linear=(LINEAR_ATTENTION, LINEAR_MLP),
    fused=FUSED_COMMON,
)  # fmt: skip
