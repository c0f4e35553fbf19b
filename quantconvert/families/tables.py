"""The families we know by name. A new one is a new row in the file of its kind, and its name here."""

from __future__ import annotations

from quantconvert.families.dense import LLAMA
from quantconvert.families.encoders import BERT
from quantconvert.families.hybrid import GRANITE_HYBRID, QWEN3_NEXT, QWEN35, QWEN35_MOE
from quantconvert.families.model import Family
from quantconvert.families.moe import DEEPSEEK, GLM_MOE, GPT_OSS, GRANITE_MOE, LLAMA4, MIXTRAL, OLMOE, QWEN_MOE
from quantconvert.families.multimodal import QWEN3_VL_MOE, VISION_LANGUAGE

_MOE = (MIXTRAL, QWEN_MOE, OLMOE, DEEPSEEK, GLM_MOE, GPT_OSS, LLAMA4, GRANITE_MOE)
_HYBRID = (QWEN3_NEXT, QWEN35, QWEN35_MOE, GRANITE_HYBRID)
_MULTIMODAL = (VISION_LANGUAGE, QWEN3_VL_MOE)

# Multimodal ones first: their text_config's model_type is that of the language model inside.
FAMILIES: tuple[Family, ...] = (*_MULTIMODAL, *_MOE, *_HYBRID, LLAMA, BERT)
