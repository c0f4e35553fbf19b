"""The families we know by name. A new one is a new row in the file of its kind, and its name here."""

from __future__ import annotations

from quantconvert.families.dense import GLM, LLAMA, MAMBA, PHI, PHI3, STARCODER2
from quantconvert.families.encoders import (
    ALBERT,
    BERT,
    DEBERTA,
    DISTILBERT,
    EUROBERT,
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
from quantconvert.families.model import Family
from quantconvert.families.moe import DEEPSEEK, MIXTRAL, QWEN_MOE
from quantconvert.families.seq2seq import BART, T5, WHISPER

_DENSE = (LLAMA, PHI3, GLM, PHI, STARCODER2, MAMBA)
_GPT = (GPT2, GPT_BIGCODE, GPT_NEO, GPT_J, CODEGEN, GPT_NEOX, PERSIMMON, FALCON, BLOOM, MPT, OPT, XGLM)
_MOE = (MIXTRAL, QWEN_MOE, DEEPSEEK)
_ENCODERS = (BERT, MPNET, DISTILBERT, DEBERTA, ALBERT, MODERNBERT, NOMIC_BERT, EUROBERT)
_SEQ2SEQ = (T5, BART, WHISPER)

FAMILIES: tuple[Family, ...] = (*_DENSE, *_GPT, *_MOE, *_ENCODERS, *_SEQ2SEQ)
