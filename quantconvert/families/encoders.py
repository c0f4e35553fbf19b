"""Encoders, encoder-decoders, speech."""

from __future__ import annotations

from quantconvert.families.model import Family, FusedSet

BERT = Family(
    name="bert",
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet", "distilbert"),
    linear=(
        r"\.attention\.(self\.(query|key|value)|output\.dense|attn\.[qkvo])$",
        r"\.attention\.(q_lin|k_lin|v_lin|out_lin)$",
        r"\.(intermediate|output)\.dense$",
        r"\.ffn\.lin[12]$",
    ),
    keep=((r"(^|\.)(pooler|cls|classifier|pre_classifier|qa_outputs|vocab_\w+)(\.|$)", "head"),),
    fused=(FusedSet("qkv_proj", ("query", "key", "value")),),
)
