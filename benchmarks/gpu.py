"""Each scheme loaded by transformers on a GPU: held-out loss and logits beside those of the same weights, decoded.

    python benchmarks/gpu.py            # needs CUDA, transformers and compressed-tensors

`examples/tiny-llama` (trained) and a random mixture of experts are converted, loaded as the engine loads them, and run
in bfloat16; the twin is what `quantconvert dequantize` makes of the same result. Where activations are rounded
(W4A8, FP8_DYNAMIC, FP8_BLOCK) the two differ by that.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import quantconvert

ROOT = Path(__file__).parents[1]
CASES: dict[str, dict[str, Any]] = {
    "W4A16, awq": {"format": "awq", "group_size": 128},
    "W4A16": {"scheme": "W4A16:g128", "format": "compressed-tensors"},
    "W4A8": {"scheme": "W4A8:g128"},
    "W4AFP8": {"scheme": "W4AFP8:g128"},
    "W8A8": {"scheme": "W8A8"},
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
    "FP8_BLOCK": {"scheme": "FP8_BLOCK"},
    "FP8_BLOCK, fp8": {"format": "fp8"},
    "NVFP4A16": {"scheme": "NVFP4A16"},
    "MXFP4A16": {"scheme": "MXFP4A16"},
}


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{'model':12} {'scheme':16} {'loss':>8} {'twin':>8} {'plain':>8} {'logits off':>10}")
    with tempfile.TemporaryDirectory() as work:
        for name, source in {
            "tiny-llama": ROOT / "examples" / "tiny-llama",
            "moe": mixture(Path(work) / "moe"),
        }.items():
            plain = loss(load(source))
            for case, options in CASES.items():
                print(f"{name:12} {case:16} {row(source, Path(work) / f'{name}-{case}', options, plain)}", flush=True)


def row(source: Path, out: Path, options: dict[str, Any], plain: float) -> str:
    """What is to be said of one case; the first line of an error where there is one."""
    try:
        result = quantconvert.convert(source, out, **options)
        warned = [note for note in result.plan.notes if note.startswith("transformers")]
        quantconvert.dequantize(out, out.with_name(out.name + "-twin"), dtype="bfloat16")
        found, twin = load(out), load(out.with_name(out.name + "-twin"))
        off = (logits(found) - logits(twin)).abs().max().item()
        return f"{loss(found):8.4f} {loss(twin):8.4f} {plain:8.4f} {off:10.4f} {'; '.join(warned)}"
    except Exception as error:  # of any of three packages
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150] if str(error).strip() else ''}"


def mixture(folder: Path) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=264, hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    model.bfloat16().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """On the GPU, every tensor in its place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cuda", output_loading_info=True
    )
    problems = {key: sorted(map(str, value))[:3] for key, value in info.items() if value}
    if problems:
        raise RuntimeError(json.dumps(problems))
    return model.eval()


def windows() -> torch.Tensor:
    """64 windows of 256 held-out bytes, which are the example's tokens."""
    text = (ROOT / "examples" / "heldout.txt").read_bytes()[: 64 * 256]
    return torch.tensor(list(text), device="cuda").view(64, 256)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=windows()[:8]).logits.float()
    return answer


def loss(model: Any) -> float:
    """Nats a token."""
    with torch.no_grad():
        answer = model(input_ids=windows()).logits.float()
    return torch.nn.functional.cross_entropy(answer[:, :-1].flatten(0, 1), windows()[:, 1:].flatten()).item()


if __name__ == "__main__":
    main()
