"""The families we know by name. A new one is a new row (or a file of its own once it needs more than a screen)."""

from __future__ import annotations

from quantconvert.families.common import EXPERT_NAMES, FUSED_COMMON, LINEAR_ATTENTION, LINEAR_MLP
from quantconvert.families.model import Family, FusedSet

LLAMA = Family(
    name="llama",
    model_types=(
        "llama", "mistral", "mistral3", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3",
        "granite", "smollm3", "olmo2", "olmo3", "stablelm", "cohere", "cohere2", "seed_oss", "exaone4", "starcoder2",
    ),
    linear=(LINEAR_ATTENTION, LINEAR_MLP),
    fused=FUSED_COMMON,
)  # fmt: skip

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    linear=(LINEAR_ATTENTION, r"\.block_sparse_moe\.experts\.N\.(w1|w2|w3)$"),
    keep=((r"\.block_sparse_moe\.gate$", "router"),),
    fused=(*FUSED_COMMON, FusedSet("w13", ("w1", "w3"))),
    experts=EXPERT_NAMES,
)

QWEN_MOE = Family(
    name="qwen-moe",
    model_types=("qwen2_moe", "qwen3_moe", "olmoe"),
    linear=(LINEAR_ATTENTION, LINEAR_MLP, r"\.mlp\.(experts\.N|shared_expert)\.(gate_proj|up_proj|down_proj)$"),
    keep=((r"\.mlp\.gate$", "router"), (r"\.mlp\.shared_expert_gate$", "router")),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
)

# kv_b_proj stays dense: SGLang reads it only as a plain or AWQ weight; q_a/kv_a are fused by every engine, and
# SGLang joins packed ones along the wrong axis (`deepseek_weight_loader.py`).
DEEPSEEK = Family(
    name="deepseek",
    model_types=("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"),
    linear=(
        r"\.self_attn\.(q_proj|q_b_proj|o_proj)$",
        r"\.mlp\.(gate_proj|up_proj|down_proj)$",
        r"\.mlp\.(experts\.N|shared_experts)\.(gate_proj|up_proj|down_proj)$",
    ),
    keep=(
        (r"\.mlp\.gate$", "router"),
        (r"\.self_attn\.(kv_b_proj|q_a_proj|kv_a_proj_with_mqa)$", "family"),
        (r"\.indexer\.", "family"),
        (r"\.(eh_proj|shared_head\.head)$", "mtp"),
    ),
    fused=FUSED_COMMON,
    experts=EXPERT_NAMES,
)

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

FAMILIES: tuple[Family, ...] = (LLAMA, MIXTRAL, QWEN_MOE, DEEPSEEK, BERT)
