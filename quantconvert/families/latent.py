"""More decoders with latent attention (MLA). What DeepSeek-V3's table says of its projections holds in all of them.

Names and shapes: transformers' model files; what engines keep in high precision: vLLM's `deepseek_v2.py` (`Indexer`),
`deepseek_v4.py` and `longcat_flash.py`, read for version 0.32.
"""

from __future__ import annotations

from quantconvert.families.common import (
    DECODER_PARTS,
    EXPERT_NAMES,
    FUSED_COMMON,
    KEEP_HEADS,
    KEEP_MTP,
    LINEAR_MLP,
)
from quantconvert.families.moe import FUSED_QKV_A, GATED, gated_dims
from quantconvert.families.row import Dims, Family, FusedSet, Part

# The same attention in front of an ordinary MLP.
MINICPM3 = Family(
    name="minicpm3",
    model_types=("minicpm3", "youtu"),
    linear=(r"\.self_attn\.(q_proj|q_b_proj|o_proj)$", LINEAR_MLP),
    keep=((r"\.self_attn\.(kv_b_proj|q_a_proj|kv_a_proj_with_mqa)$", "family"), *KEEP_HEADS),
    fused=(*FUSED_COMMON, FUSED_QKV_A),
    dims=gated_dims("mlp", "intermediate_size"),
    parts=DECODER_PARTS,
)

# Two attentions and two MLPs a layer beside its experts, of which some only pass on what they get.
LONGCAT = Family(
    name="longcat",
    model_types=("longcat_flash",),
    linear=(
        r"\.self_attn\.N\.(q_proj|q_b_proj|o_proj)$",
        rf"\.mlps\.N\.{GATED}",
        rf"\.mlp\.experts\.N\.{GATED}",
    ),
    keep=(
        *KEEP_MTP,
        (r"\.mlp\.router(\.|$)", "router"),
        (r"\.self_attn\.N\.(kv_b_proj|q_a_proj|kv_a_proj_with_mqa)$", "family"),
        *KEEP_HEADS,
    ),
    fused=(*FUSED_COMMON, FUSED_QKV_A),
    experts=EXPERT_NAMES,
    dims=(*gated_dims(r"mlps\.N", "ffn_hidden_size"), *gated_dims(r"experts\.N", "expert_ffn_hidden_size")),
    parts=DECODER_PARTS,
)

# Keys and values are one latent (wkv); wo_a is multiplied group by group. Compressors and indexers stand in some layers
# only, and the first layers look their experts up by the token (tid2eid).
DEEPSEEK_V4 = Family(
    name="deepseek-v4",
    model_types=("deepseek_v4",),
    linear=(r"\.attn\.(wq_b|wo_b)$", r"\.ffn\.(experts\.N|shared_experts)\.(w1|w2|w3)$"),
    keep=(
        *KEEP_MTP,
        (r"(^|\.)head$", "lm_head"),
        (r"(^|\.)embed$", "embedding"),
        (r"\.ffn\.gate(\.|$)", "router"),
        (r"\.attn\.(wq_a|wkv|wo_a)$", "family"),
        (r"\.(indexer|compressor)\.", "family"),
        *KEEP_HEADS,
    ),
    fused=(FusedSet("w13", ("w1", "w3")), FusedSet("fused_wqa_wkv", ("wq_a", "wkv"))),
    experts=EXPERT_NAMES,
    dims=(
        Dims(r"\.(experts\.N|shared_experts)\.(w1|w3)$", "moe_intermediate_size", "hidden_size"),
        Dims(r"\.(experts\.N|shared_experts)\.w2$", "hidden_size", "moe_intermediate_size"),
    ),
    parts=(Part("embeddings", ("embed_tokens", "embed")), Part("final norm", ("norm",))),
    uneven=(r"^(attn\.(compressor|indexer)|ffn\.gate)\.",),
)
