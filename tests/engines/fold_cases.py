"""How many vectors of each kind factors can move at in each tiny model: what gives them, relative to its layer.

Read in transformers' model files, model by model; `VARIANTS` are models whose config builds them otherwise.
"""

from __future__ import annotations

from typing import Any

from tests.engines import dense_families, encoder_families, moe_families, multimodal_families
from tests.engines.families import Case

NORMS = {"input_layernorm": 2, "post_attention_layernorm": 2}
V, UP = {"self_attn.v_proj": 2}, {"mlp.up_proj": 2}
PRE_NORM = NORMS | V | UP
PARALLEL = {"input_layernorm": 2} | V | UP
GEMMA = {"input_layernorm": 2, "pre_feedforward_layernorm": 2} | V | UP
FUSED_UP = {"mlp.gate_up_proj": 2}
LATENT = NORMS | {"self_attn.q_a_layernorm": 2, "self_attn.kv_a_layernorm": 2}
# the first layer dense, the second with experts
HALF = {"mlp.up_proj": 1, "mlp.experts.N.up_proj": 4}
SHARED = HALF | {"mlp.shared_expert.up_proj": 1}
SHARED_EXPERTS = HALF | {"mlp.shared_experts.up_proj": 1}
# the first layer with a state, the second with attention
DELTA = NORMS | {"linear_attn.norm": 1, "self_attn.v_proj": 1}
LFM = {"operator_norm": 2, "ffn_norm": 2, "conv.in_proj": 1, "self_attn.v_proj": 1}
LONGCAT = {
    "input_layernorm.N": 2, "post_attention_layernorm.N": 2, "self_attn.N.q_a_layernorm": 2,
    "self_attn.N.kv_a_layernorm": 2, "mlps.N.up_proj": 2, "mlp.experts.N.up_proj": 4,
}  # fmt: skip
MPNET, DISTILBERT, DEBERTA = {"attention.attn.v": 2}, {"attention.v_lin": 2}, {"attention.self.value_proj": 2}
MAMBA = {"norm": 2}
BERT, MODERNBERT = {"attention.self.value": 2}, {"attn_norm": 1, "mlp_norm": 2, "mlp.Wi": 2}
T5 = {"layer.N.layer_norm": 10, "layer.N.SelfAttention.v": 4, "layer.N.EncDecAttention.v": 2}
GATED_T5 = T5 | {"layer.N.DenseReluDense.wi_1": 4}
VALUES = {"self_attn.v_proj": 4, "encoder_attn.v_proj": 2}
BART = VALUES | {"self_attn_layer_norm": 4, "encoder_attn_layer_norm": 2, "final_layer_norm": 4}
OPT = {"self_attn_layer_norm": 2, "final_layer_norm": 2} | V
LN = {"ln_1": 2, "ln_2": 2}
GRANITE = NORMS | V | {"block_sparse_moe.experts.N.up_proj": 8}

EXPECTED: dict[str, dict[str, int]] = {
    **dict.fromkeys(
        ("llama", "llama tied", "llama biases", "llama reward", "mistral", "ministral", "ministral3", "qwen2", "qwen3",
         "gemma", "granite", "smollm3", "seed_oss", "stablelm", "helium", "hunyuan_v1_dense", "ernie4_5", "cwm",
         "eurobert"),
        PRE_NORM,
    ),
    **dict.fromkeys(("gemma2", "gemma3", "vaultgemma"), GEMMA),
    **dict.fromkeys(("exaone4", "olmo", "olmo2", "olmo3"), V | UP),
    **dict.fromkeys(("cohere", "cohere2", "stablelm parallel"), PARALLEL),
    **dict.fromkeys(("nemotron", "arcee", "jais2", "starcoder2"), NORMS | V),
    "olmo clamped": UP,
    "apertus": {"attention_layernorm": 2, "feedforward_layernorm": 2} | V,
    "phi": {"input_layernorm": 2} | V,
    **dict.fromkeys(("phi3", "phi3 without groups"), NORMS | FUSED_UP | {"self_attn.qkv_proj": 2}),
    **dict.fromkeys(("glm", "glm4"), NORMS | FUSED_UP | V),
    "gemma3n": {"pre_feedforward_layernorm": 2} | UP,
    **dict.fromkeys(("minicpm3", "youtu"), LATENT | UP),
    **dict.fromkeys(("lfm2", "lfm3"), LFM | {"feed_forward.w3": 2}),
    "lfm2 with biases": {name: n for name, n in LFM.items() if name != "conv.in_proj"} | {"feed_forward.w3": 2},
    "lfm2_moe": LFM | {"feed_forward.w3": 1, "feed_forward.experts.N.w3": 4},
    **dict.fromkeys(("mamba", "falcon_mamba"), MAMBA),
    "mamba2": {"norm": 2, "mixer.norm": 2},
    **dict.fromkeys(("gpt2", "gpt_bigcode"), LN | {"attn.c_attn": 2}),
    "gpt2 with an encoder": LN | {"attn.c_attn": 2, "ln_cross_attn": 2, "crossattention.c_attn": 2},
    "gpt_bigcode by heads": LN,
    "openai-gpt": {"attn.c_attn": 2},
    "gpt_neo": LN | {"attn.attention.v_proj": 2},
    "gptj": {"ln_1": 2, "attn.v_proj": 2},
    "codegen": {"ln_1": 2},
    **dict.fromkeys(("gpt_neox", "gpt_neox in turn", "persimmon", "bloom", "falcon serial"), NORMS),
    "bloom with normed residual": {},
    "falcon": {"input_layernorm": 2, "self_attention.query_key_value": 2},
    "falcon serial with one key": NORMS | {"self_attention.query_key_value": 2},
    "falcon 40b": {"ln_attn": 2, "ln_mlp": 2},
    "falcon 40b with one norm": {"input_layernorm": 2},
    "mpt": {"norm_1": 2, "norm_2": 2, "attn.Wqkv": 2},
    "mpt clamped": {"norm_1": 2, "norm_2": 2},
    "opt": V,
    **dict.fromkeys(("opt with norms before", "xglm"), OPT),
    "mixtral": NORMS | V | {"block_sparse_moe.experts.N.w3": 8},
    "qwen2_moe": NORMS | V | SHARED,
    "qwen3_moe": NORMS | V | HALF,
    "olmoe": NORMS | V | {"mlp.experts.N.up_proj": 8},
    "olmoe clamped": NORMS | {"mlp.experts.N.up_proj": 8},
    "deepseek_v2": NORMS | {"self_attn.kv_a_layernorm": 2} | SHARED_EXPERTS,
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite"), LATENT | SHARED_EXPERTS),
    "glm4_moe": NORMS | V | SHARED_EXPERTS,
    "longcat_flash": LONGCAT,
    "longcat_flash with idle experts": LONGCAT | {"post_attention_layernorm.N": 1},
    "nemotron_h": {"norm": 4, "mixer.norm": 1, "mixer.fc1_latent_proj": 1, "mixer.v_proj": 1},
    "nemotron_h without latent": {"norm": 4, "mixer.norm": 1, "mixer.v_proj": 1},
    "qwen3_next": DELTA | SHARED,
    **dict.fromkeys(("qwen3_5_text", "qwen3_5"), DELTA | UP),
    "deepseek_v4": {"attn.q_norm": 2, "ffn_norm": 2},
    "qwen3_5_moe": DELTA | {"mlp.experts.N.up_proj": 8, "mlp.shared_expert.up_proj": 2},
    "gpt_oss": NORMS | V,
    "llama4": NORMS | V | {
        "feed_forward.up_proj": 1, "feed_forward.experts.N.up_proj": 4, "feed_forward.shared_expert.up_proj": 1,
    },
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe, saved by transformers 5"), NORMS | V | HALF),
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE | {"shared_mlp.input_linear": 2},
    "granitemoehybrid": GRANITE | {"mamba.norm": 1, "self_attn.v_proj": 1, "shared_mlp.input_linear": 2},
    **dict.fromkeys(
        ("llava", "llava_next", "llava_onevision", "pixtral", "vision mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        PRE_NORM,
    ),
    "vision gemma3": GEMMA,
    **dict.fromkeys(
        ("bert bare", "bert", "bert classifier", "bert decoder", "roberta", "xlm-roberta", "camembert", "electra",
         "electra generator", "rembert"),
        BERT,
    ),
    "bert with an encoder": BERT | {"crossattention.self.value": 2},
    **dict.fromkeys(("mpnet bare", "mpnet"), MPNET),
    **dict.fromkeys(("distilbert", "distilbert classifier"), DISTILBERT),
    "deberta": {},
    **dict.fromkeys(("deberta-v2", "deberta-v3"), DEBERTA),
    "albert": {"attention.value": 1},
    **dict.fromkeys(("modernbert", "modernbert classifier"), MODERNBERT | {"attn.Wqkv": 2}),
    "modernbert-decoder": MODERNBERT | {"attn.v_proj": 2},
    "nomic_bert": {"attn.Wqkv": 2, "mlp.fc11": 2},
    **dict.fromkeys(("t5", "t5 classifier"), T5),
    **dict.fromkeys(("t5 gated", "mt5", "umt5"), GATED_T5),
    "t5 encoder": {"layer.N.layer_norm": 4, "layer.N.SelfAttention.v": 2},
    **dict.fromkeys(("bart", "bart classifier", "marian"), VALUES),
    **dict.fromkeys(("mbart", "pegasus", "m2m_100", "whisper"), BART),
    "whisper classifier": OPT,
}  # fmt: skip

GROUPED, SIZES, OLD = dense_families.GROUPED, dense_families.SIZES, dense_families.OLD
ENCODED: dict[str, tuple[int, ...]] = {"inputs_embeds": (2, 12, 64), "encoder_hidden_states": (2, 6, 64)}


def variant(name: str, model: str = "", inputs: dict[str, tuple[int, ...]] | None = None, **config: Any) -> Case:
    """A case of the families' tests with another config; what is quantized of it is not asked here."""
    known = dense_families.CASES | dense_families.CONV1D | moe_families.CASES | encoder_families.CASES
    case = known[name]
    return Case(model or case.model, case.config | config, (), {}, inputs or {})


V4: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "o_groups": 2, "o_lora_rank": 16,
    "moe_intermediate_size": 32, "intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "hc_mult": 2, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8,
    "max_position_embeddings": 64, "layer_types": ["sliding_attention", "sliding_attention"],
    "mlp_layer_types": ["hash_moe", "moe"],
}  # fmt: skip

VARIANTS: dict[str, Case] = {
    "ministral": Case("MinistralForCausalLM", GROUPED | {"head_dim": 16}, (), {}),
    "stablelm parallel": variant("stablelm", use_parallel_residual=True),
    "olmo clamped": variant("olmo", clip_qkv=0.3),
    "olmoe clamped": variant("olmoe", clip_qkv=0.3),
    "phi3 without groups": variant("phi3", num_key_value_heads=4),
    "lfm2 with biases": variant("lfm2", conv_bias=True),
    "gpt2 with an encoder": variant("gpt2", inputs=ENCODED, add_cross_attention=True),
    "gpt_bigcode by heads": variant("gpt_bigcode", multi_query=False),
    "gpt_neox in turn": variant("gpt_neox", use_parallel_residual=False),
    "bloom with normed residual": variant("bloom", apply_residual_connection_post_layernorm=True),
    "falcon serial": variant("falcon", parallel_attn=False, multi_query=False),
    "falcon serial with one key": variant("falcon", parallel_attn=False),
    "falcon 40b with one norm": variant("falcon 40b", num_ln_in_parallel_attn=1),
    "mpt clamped": variant("mpt", attn_config={"clip_qkv": 0.3}),
    "opt with norms before": variant("opt", do_layer_norm_before=True),
    "longcat_flash with idle experts": variant("longcat_flash", zero_expert_num=2),
    "nemotron_h without latent": variant("nemotron_h", moe_latent_size=None),
    "bert with an encoder": variant("bert decoder", inputs=ENCODED, add_cross_attention=True),
    "deepseek_v4": Case("DeepseekV4ForCausalLM", V4, (), {}),
}

# Two names are those of language models too.
CASES: dict[str, Case] = {
    **dense_families.CASES, **dense_families.CONV1D, **moe_families.CASES, **encoder_families.CASES,
    **{f"vision {name}" if name in ("gemma3", "mistral3") else name: case
       for name, case in multimodal_families.CASES.items()},
    **VARIANTS,
}  # fmt: skip
