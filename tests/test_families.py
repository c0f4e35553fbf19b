"""Which tensors are quantized and why the others are not, by family and by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantconvert
from quantconvert.families import REASON_TEXT, REASONS, Classifier
from quantconvert.planning import Plan
from tests.builders import LLAMA_CONFIG, llama_tensors, write_checkpoint

W = torch.zeros(64, 128, dtype=torch.bfloat16)
V = torch.zeros(128, dtype=torch.bfloat16)


def planned(tmp_path: Path, config: dict, names: dict[str, torch.Tensor], **options) -> Plan:
    own = {name: tensor.clone() for name, tensor in names.items()}  # safetensors refuses shared memory
    return quantconvert.plan(write_checkpoint(tmp_path / "model", own, config), allow_incomplete=True, **options)


def decisions(plan: Plan) -> dict[str, str]:
    return {task.source.name: task.reason or "quantized" for task in plan.tasks}


def test_llama_with_biases_and_tied_head(tmp_path: Path):
    tensors = llama_tensors(layers=1)
    del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = V
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    plan = planned(tmp_path, LLAMA_CONFIG | {"tie_word_embeddings": True}, tensors)
    found = decisions(plan)
    assert found["model.embed_tokens.weight"] == "embedding"
    assert found["model.layers.0.self_attn.q_proj.bias"] == "bias"
    assert found["model.layers.0.self_attn.rotary_emb.inv_freq"] == "embedding"
    assert "lm_head.weight" not in plan.weight_map
    assert sum(v == "quantized" for v in found.values()) == 7
    assert plan.quantization_config
    assert plan.quantization_config["modules_to_not_convert"] == ["lm_head"]


MIXTRAL = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.0.block_sparse_moe.gate.weight": "router",
    "model.layers.0.block_sparse_moe.experts.0.w1.weight": "quantized",
    "model.layers.0.block_sparse_moe.experts.0.w2.weight": "quantized",
    "model.layers.0.block_sparse_moe.experts.0.w3.weight": "quantized",
    "model.layers.0.self_attn.q_proj.weight": "quantized",
    "lm_head.weight": "lm_head",
}
QWEN_MOE = {
    "model.layers.0.mlp.gate.weight": "router",
    "model.layers.0.mlp.shared_expert_gate.weight": "router",
    "model.layers.0.mlp.shared_expert.gate_proj.weight": "quantized",
    "model.layers.0.mlp.shared_expert.up_proj.weight": "quantized",
    "model.layers.0.mlp.shared_expert.down_proj.weight": "quantized",
    "model.layers.0.mlp.experts.11.gate_proj.weight": "quantized",
    "model.layers.0.mlp.experts.11.up_proj.weight": "quantized",
    "model.layers.0.mlp.experts.11.down_proj.weight": "quantized",
    "model.layers.0.self_attn.q_norm.weight": "norm",
    "lm_head.weight": "lm_head",
}
DEEPSEEK = {
    "model.layers.0.self_attn.q_a_proj.weight": "family",
    "model.layers.0.self_attn.q_a_layernorm.weight": "norm",
    "model.layers.0.self_attn.q_b_proj.weight": "quantized",
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": "family",
    "model.layers.0.self_attn.kv_b_proj.weight": "family",
    "model.layers.0.self_attn.o_proj.weight": "quantized",
    "model.layers.0.mlp.gate_proj.weight": "quantized",
    "model.layers.0.mlp.up_proj.weight": "quantized",
    "model.layers.1.mlp.gate.weight": "router",
    "model.layers.1.mlp.gate.e_score_correction_bias": "router",
    "model.layers.1.mlp.experts.255.down_proj.weight": "quantized",
    "model.layers.1.mlp.shared_experts.down_proj.weight": "quantized",
    "model.layers.2.mlp.experts.0.down_proj.weight": "mtp",
    "model.layers.2.eh_proj.weight": "mtp",
    "model.layers.2.shared_head.head.weight": "mtp",
}
BERT = {
    "embeddings.word_embeddings.weight": "embedding",
    "embeddings.LayerNorm.weight": "norm",
    "encoder.layer.0.attention.self.query.weight": "quantized",
    "encoder.layer.0.attention.self.key.weight": "quantized",
    "encoder.layer.0.attention.self.value.weight": "quantized",
    "encoder.layer.0.attention.output.dense.weight": "quantized",
    "encoder.layer.0.attention.output.LayerNorm.weight": "norm",
    "encoder.layer.0.intermediate.dense.weight": "quantized",
    "encoder.layer.0.output.dense.weight": "quantized",
    "pooler.dense.weight": "head",
}
VISION = {
    "model.visual.blocks.0.attn.qkv.weight": "vision",
    "model.visual.merger.mlp.0.weight": "vision",
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": "vision",
    "multi_modal_projector.linear_1.weight": "vision",
    "audio_tower.layers.0.fc1.weight": "audio",
    "model.language_model.layers.0.self_attn.o_proj.weight": "quantized",
}
# Names that Hub checkpoints have and transformers does not write: without its prefix, tied tables stored all the same,
# heads of models that it no longer has a class for.
HUB = {
    "bloom": {
        "word_embeddings.weight": "embedding",
        "word_embeddings_layernorm.weight": "norm",
        "h.0.self_attention.query_key_value.weight": "quantized",
        "h.0.mlp.dense_4h_to_h.weight": "quantized",
        "lm_head.weight": "lm_head",
    },
    "falcon": {"transformer.h.0.self_attention.dense.weight": "quantized", "lm_head.weight": "lm_head"},
    "qwen3": {"embed_tokens.weight": "embedding", "layers.0.self_attn.q_proj.weight": "quantized"},
    "llama": {"model.layers.0.mlp.up_proj.weight": "quantized", "v_head.summary.weight": "head"},
    "opt": {"decoder.layers.0.fc1.weight": "quantized", "decoder.project_in.weight": "head"},
    "t5": {
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "quantized",
        "encoder.embed_tokens.weight": "embedding",
        "decoder.embed_tokens.weight": "embedding",
        "lm_head.weight": "lm_head",
    },
    "roberta": {
        "roberta.encoder.layer.0.output.dense.weight": "quantized",
        "roberta.pooler.dense.weight": "head",
        "lm_head.decoder.weight": "lm_head",
    },
    "bert": {
        "bert.encoder.layer.0.crossattention.self.query.weight": "quantized",
        "cls.predictions.decoder.weight": "head",
    },
    "electra": {
        "generator.encoder.layer.0.intermediate.dense.weight": "quantized",
        "generator_lm_head.weight": "head",
    },
    "distilbert": {
        "distilbert.transformer.layer.0.ffn.lin1.weight": "quantized",
        "vocab_projector.weight": "head",
    },
    "deberta-v2": {
        "deberta.encoder.layer.0.attention.self.query_proj.weight": "quantized",
        "lm_predictions.lm_head.dense.weight": "head",
        "mask_predictions.dense.weight": "head",
        "mask_predictions.classifier.weight": "head",
    },
    "deberta": {
        "deberta.encoder.layer.0.attention.self.in_proj.weight": "quantized",
        "deberta.embeddings.embed_proj.weight": "head",
    },
    "albert": {
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": "quantized",
        "albert.pooler.weight": "head",
        "sop_classifier.classifier.weight": "head",
        "predictions.decoder.weight": "head",
    },
    "modernbert": {"model.layers.0.mlp.Wi.weight": "quantized", "decoder.weight": "head"},
    "nomic_bert": {
        "encoder.layers.0.mlp.fc11.weight": "quantized",
        "cls.predictions.transform.dense.weight": "head",
    },
    "eurobert": {"model.layers.0.mlp.up_proj.weight": "quantized", "dense.weight": "head"},
    "whisper": {
        "model.encoder.layers.0.self_attn.out_proj.weight": "quantized",
        "model.decoder.layers.0.encoder_attn.k_proj.weight": "quantized",
        "proj_out.weight": "lm_head",
    },
}
UNKNOWN = {
    "backbone.wte.weight": "embedding",
    "backbone.blocks.0.mixer.lin_x.weight": "quantized",
    "backbone.blocks.0.mixer.conv1d.weight": "conv",
    "backbone.blocks.0.mixer.A_log": "state-space",
    "backbone.blocks.0.mixer.dt_proj.weight": "state-space",
    "backbone.blocks.0.ln_1.weight": "norm",
    "backbone.blocks.0.table": "not a weight",
    "backbone.head.weight": "head",
    "backbone.blocks.0.moe.router.weight": "router",
    "mtp.layers.0.mlp.up_proj.weight": "mtp",
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "mixtral"}, MIXTRAL),
        ({"model_type": "qwen3_moe"}, QWEN_MOE),
        ({"model_type": "deepseek_v3", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}, DEEPSEEK),
        ({"model_type": "bert"}, BERT),
        ({"model_type": "some_vl", "text_config": {"model_type": "llama"}}, VISION),
        ({"model_type": "never_heard_of"}, UNKNOWN),
    ],
    ids=["mixtral", "qwen3_moe", "deepseek_v3", "bert", "vision", "unknown"],
)
def test_decisions(tmp_path: Path, config: dict, expected: dict[str, str]):
    tensors = {name: V if "norm" in name.lower() or "ln_" in name else W for name in expected}
    plan = planned(tmp_path, config, tensors, group_size=64)
    assert decisions(plan) == expected
    assert len(plan.tasks) == len(tensors), "every source tensor is accounted for exactly once"


@pytest.mark.parametrize(("model_type", "expected"), HUB.items(), ids=HUB)
def test_hub_names(tmp_path: Path, model_type: str, expected: dict[str, str]):
    tensors = {name: V if "norm" in name else W for name in expected}
    plan = planned(tmp_path, {"model_type": model_type}, tensors, group_size=64)
    assert decisions(plan) == expected
    classifier = Classifier(plan.checkpoint)
    roles = [classifier.role(ref) for ref in plan.checkpoint.tensors]
    assert all(role.by_table or role.reason in ("embedding", "norm") for role in roles)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
def test_tied_heads_are_ignored_by_name(tmp_path: Path, stored: bool):
    """Engines build `vocab_projector` as a linear layer even where the checkpoint has only the embeddings."""
    names = dict.fromkeys(["distilbert.transformer.layer.0.ffn.lin1.weight"], W)
    names |= {"vocab_projector.weight": W} if stored else {}
    plan = planned(tmp_path, {"model_type": "distilbert"}, names, format="compressed-tensors")
    expected = "re:.*vocab_projector$" if stored else "vocab_projector"
    assert plan.quantization_config
    assert plan.quantization_config["ignore"] == ["lm_head", expected]


def test_unknown_family_is_said(tmp_path: Path):
    plan = planned(tmp_path, {"model_type": "never_heard_of"}, {"x.0.lin.weight": W})
    assert any("unknown family (never_heard_of)" in note for note in plan.notes)
    assert plan.tasks[0].evidence == "unknown family: a 2-D `.weight` in a numbered layer"


def test_moe_goes_to_compressed_tensors_and_ignores_the_router(tmp_path: Path):
    tensors = dict.fromkeys(MIXTRAL, W)
    plan = planned(tmp_path, {"model_type": "mixtral"}, tensors)
    assert plan.format == "compressed-tensors"
    assert "mixture of experts" in plan.format_reason
    assert plan.quantization_config
    assert plan.quantization_config["ignore"] == ["lm_head", r"re:.*layers\.\d+\.block_sparse_moe\.gate$"]


def test_every_reason_has_its_text():
    assert set(REASON_TEXT) == set(REASONS)


DEEPSEEK_V4 = {
    "embed.weight": "embedding",
    "layers.0.attn.wq_a.weight": "family",
    "layers.0.attn.wq_b.weight": "quantized",
    "layers.0.attn.wkv.weight": "family",
    "layers.0.attn.wo_a.weight": "family",
    "layers.0.attn.wo_b.weight": "quantized",
    "layers.0.attn.compressor.wkv.weight": "family",
    "layers.0.attn.indexer.weights_proj.weight": "family",
    "layers.0.ffn.gate.weight": "router",
    "layers.0.ffn.experts.0.w1.weight": "quantized",
    "layers.0.ffn.experts.0.w2.weight": "quantized",
    "layers.0.ffn.experts.0.w3.weight": "quantized",
    "layers.0.ffn.shared_experts.w1.weight": "quantized",
    "layers.0.hc_attn_fn": "not a weight",
    "norm.weight": "norm",
    "head.weight": "lm_head",
}


def test_deepseek_v4_by_the_names_of_the_hub(tmp_path: Path):
    tensors = {name: V if "norm" in name else W for name in DEEPSEEK_V4}
    assert decisions(planned(tmp_path, {"model_type": "deepseek_v4"}, tensors, group_size=64)) == DEEPSEEK_V4


@pytest.mark.parametrize("stem", ["encoder.block.1.layer.1.mlp", "model.encoder.layers.3.ffn"], ids=["switch", "nllb"])
def test_experts_with_a_word_before_their_number_are_experts(tmp_path: Path, stem: str):
    """Switch Transformers and NLLB-MoE, which AWQ would be chosen for if they passed for dense."""
    names = {f"{stem}.experts.expert_{i}.{name}.weight": W for i in range(2) for name in ("wi", "wo")}
    names["encoder.layers.0.fc1.weight"] = W
    plan = planned(tmp_path, {"model_type": "never_heard_of"}, names, preset="experts-4-rest-8")
    assert plan.format == "compressed-tensors"
    bits = {task.source.name: task.scheme.num_bits for task in plan.quantized if task.scheme}
    assert bits == {name: 4 if "experts" in name else 8 for name in names}


def test_quantlinear_of_i_bert_is_no_linear_layer(tmp_path: Path):
    names = {"ibert.encoder.layer.0.intermediate.dense.weight": W, "ibert.embeddings.word_embeddings.weight": W}
    with pytest.raises(quantconvert.UnsupportedError, match=r"no weight to quantize: .*\(embedding, family\)"):
        planned(tmp_path, {"model_type": "ibert"}, names)
