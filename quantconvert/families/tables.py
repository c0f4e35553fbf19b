"""The families we know by name. A new one is a new row in the file of its kind, and its name here."""

from __future__ import annotations

from quantconvert.families.dense import GLM, LLAMA, MAMBA, PHI, PHI3, STARCODER2
from quantconvert.families.encoders import (
    ALBERT,
    BERT,
    CLIP_TEXT,
    DEBERTA,
    DISTILBERT,
    EUROBERT,
    IBERT,
    MODERNBERT,
    MPNET,
    NOMIC_BERT,
)
from quantconvert.families.gpt import (
    BLOOM,
    CODEGEN,
    FALCON,
    GPT2,
    GPT_BIGCODE,
    GPT_J,
    GPT_NEO,
    GPT_NEOX,
    MPT,
    OPT,
    PERSIMMON,
    XGLM,
)
from quantconvert.families.hybrid import GRANITE_HYBRID, LFM2, LFM3, NEMOTRON_H, QWEN3_NEXT, QWEN35, QWEN35_MOE
from quantconvert.families.latent import DEEPSEEK_V4, LONGCAT, MINICPM3
from quantconvert.families.moe import DEEPSEEK, GLM_MOE, GPT_OSS, GRANITE_MOE, LLAMA4, MIXTRAL, OLMOE, QWEN_MOE
from quantconvert.families.multimodal import GEMMA3N, QWEN3_VL_MOE, VISION_LANGUAGE
from quantconvert.families.recent import RECENT
from quantconvert.families.row import Family
from quantconvert.families.seq2seq import BART, T5, WHISPER

_DENSE = (LLAMA, PHI3, GLM, PHI, STARCODER2, MAMBA, MINICPM3)
_GPT = (GPT2, GPT_BIGCODE, GPT_NEO, GPT_J, CODEGEN, GPT_NEOX, PERSIMMON, FALCON, BLOOM, MPT, OPT, XGLM)
_MOE = (MIXTRAL, QWEN_MOE, OLMOE, DEEPSEEK, GLM_MOE, GPT_OSS, LLAMA4, GRANITE_MOE, LONGCAT, DEEPSEEK_V4)
_HYBRID = (QWEN3_NEXT, QWEN35, QWEN35_MOE, GRANITE_HYBRID, NEMOTRON_H, LFM2, LFM3)
_MULTIMODAL = (VISION_LANGUAGE, QWEN3_VL_MOE, GEMMA3N)
_ENCODERS = (BERT, MPNET, DISTILBERT, DEBERTA, ALBERT, MODERNBERT, NOMIC_BERT, EUROBERT, IBERT, CLIP_TEXT)
_SEQ2SEQ = (T5, BART, WHISPER)

# Multimodal ones first: their text_config's model_type is that of the language model inside.
FAMILIES: tuple[Family, ...] = (*_MULTIMODAL, *_MOE, *RECENT, *_HYBRID, *_DENSE, *_GPT, *_ENCODERS, *_SEQ2SEQ)
