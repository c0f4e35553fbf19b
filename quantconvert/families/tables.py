"""The families we know by name. A new one is a new row in the file of its kind, and its name here."""

from __future__ import annotations

from quantconvert.families.dense import LLAMA
from quantconvert.families.encoders import BERT
from quantconvert.families.model import Family
from quantconvert.families.moe import DEEPSEEK, MIXTRAL, QWEN_MOE

FAMILIES: tuple[Family, ...] = (LLAMA, MIXTRAL, QWEN_MOE, DEEPSEEK, BERT)
