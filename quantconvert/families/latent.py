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
from quantconvert.families.folds import FOLD_UP, OUTS, gated, pre_norm, under
from quantconvert.families.moe import FOLDS_LATENT, FUSED_QKV_A, GATE_UP, GATED, MLA, gated_dims
from quantconvert.families.row import Dims, Family, Fold, FusedSet, Part
from quantconvert.families.streams import LATENT_VALUES, stream

# The same attention in front of an ordinary MLP.
MINICPM3 = Family(
    name="minicpm3",
    model_types=("minicpm3", "youtu"),
    linear=(r"\.self_attn\.(q_proj|q_b_proj|o_proj)$", LINEAR_MLP),
    keep=((r"\.self_attn\.(kv_b_proj|q_a_proj|kv_a_proj_with_mqa)$", "family"), *KEEP_HEADS),
    fused=(*FUSED_COMMON, FUSED_QKV_A),
    dims=gated_dims("mlp", "intermediate_size"),
    parts=DECODER_PARTS,
    folds=(*pre_norm(attention=MLA), *FOLDS_LATENT, FOLD_UP),
    unfolded=OUTS,
    streams=stream(("minicpm3", "youtu"), values=LATENT_VALUES),
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
    folds=(
        Fold("input_layernorm.N", under("self_attn.N", "q_proj", "q_a_proj", "kv_a_proj_with_mqa")),
        # Experts that only pass on what they get pass on what this norm gives
        Fold(
            "post_attention_layernorm.0",
            (*under("mlps.0", *GATE_UP), "mlp.router.classifier", *under("mlp.experts.N", *GATE_UP)),
            where=("zero_expert_num", (None, 0)),
        ),
        Fold("post_attention_layernorm.1", under("mlps.1", *GATE_UP)),
        Fold("self_attn.N.q_a_layernorm", ("self_attn.N.q_b_proj",)),
        Fold("self_attn.N.kv_a_layernorm", ("self_attn.N.kv_b_proj",)),
        *gated("mlps.N", "mlp.experts.N"),
    ),
    unfolded=(*OUTS, r"^(mlps\.N|mlp\.experts\.N)\.(gate_proj|up_proj)$", r"^mlp\.router\.classifier$"),
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
    # What w3 gives is clamped. What reads the norm before attention stays in high precision
    folds=(
        Fold("attn.q_norm", ("attn.wq_b", "attn.indexer.wq_b")),
        Fold(
            "ffn_norm",
            ("ffn.gate", *under("ffn.experts.N", "w1", "w3"), *under("ffn.shared_experts", "w1", "w3")),
        ),
    ),
    unfolded=(r"^attn\.", r"\.w2$", r"^hc_"),
)
