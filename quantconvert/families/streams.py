"""Residual streams that families share: what reads and writes the one vector that goes through all layers.

Read in transformers' model files. Only models whose norms divide by the root mean square and add no bias, and add what
attention and MLP give as it is (times a number at most): not those with a norm behind them (Gemma 2 and 3, OLMo 2,
GLM-4), with LayerNorm (Cohere, StableLM, Nemotron), or with more than one stream (Gemma 3n).
"""

from __future__ import annotations

from quantconvert.families.row import Stream, Values

# What stands in a layer beside weights: norms inside attention, tables of positions, biases of routers,
# and activations that are trained (Apertus).
_APART = (r"^self_attn\.(\w+\.)*\w*(norm|layernorm)\.(weight|bias)$", r"(^|\.)rotary_emb\.",
          r"\.e_score_correction_bias$", r"^mlp\.act_fn\.")  # fmt: skip
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
EXPERT_WRITERS = tuple(f"mlp.{name}.down_proj" for name in ("experts.N", "shared_expert", "shared_experts"))
# Keys and values of a head follow one another in kv_b_proj.
LATENT_VALUES = Values("self_attn.kv_b_proj", head="v_head_dim", before="qk_nope_head_dim")
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")


def stream(
    only: tuple[str, ...],
    *writers: str,
    norms: tuple[str, ...] = PRE_NORMS,
    values: Values | None = Values(),  # noqa: B008 (a value)
) -> tuple[Stream, ...]:
    """That of a pre-norm decoder under Llama's names; `writers`: beside those of attention and of a dense MLP."""
    return (Stream(only, (*_WRITERS, *writers), norms, values, _APART),)
