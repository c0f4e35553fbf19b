"""Train the example checkpoint that has outlier channels: a Llama as tiny-llama's, started with wide gains.

    python examples/train_outlier_llama.py --out examples/outlier-llama

Channels of large models differ in size by an order of magnitude, and a group of weights that shares a scale is as
coarse as its loudest column asks for. In tiny-llama all columns of a weight are of one size. Here training starts from
wide ones: each vector that a linear weight reads comes from a producer (a norm's gain, v_proj's rows, up_proj's rows),
whose channels are multiplied by exp(normal * SPREAD) while the columns of its readers are divided by the same. That
leaves the function as it was, but not what the optimizer does: steps of a like size in every weight move loud columns
little for their size and quiet ones much. Then every parameter is trained, without weight decay on the gains, and what
the channels are like in the end is training's doing; `outliers` measures it on the held-out text.

Text, tokenizer and training loop are those of `train_tiny_llama.py`. The text depends on the Python version:
`--documents FILE` takes it as JSON, as `--write-documents FILE` of another Python left it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from train_tiny_llama import CONTEXT, documents, judge, save, split, tiny_config, token_stream, train
from transformers import LlamaForCausalLM

SPREAD = 0.8
# What produces a vector in a layer, and the linear weights that read it.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


def vectors(model: LlamaForCausalLM) -> Iterator[tuple[str, nn.Module, list[nn.Linear]]]:
    """(name, producer, readers) of each vector that linear weights read."""
    for i, layer in enumerate(model.model.layers):
        for producer, readers in READERS.items():
            name = f"layer {i}, {producer} -> {', '.join(r.split('.')[-1] for r in readers)}"
            yield name, layer.get_submodule(producer), [layer.get_submodule(reader) for reader in readers]


def on_columns(factors: Tensor, columns: int, head_dim: int) -> Tensor:
    """Factors of a producer's channels as those of a reader's columns: a key/value head serves several query heads."""
    return factors.view(-1, 1, head_dim).expand(-1, columns // len(factors), -1).reshape(columns)


@torch.no_grad()
def widen(model: LlamaForCausalLM, spread: float, seed: int) -> None:
    """Multiply every producer's channels by exp(normal * spread) and divide the readers' columns: the same function."""
    rng = torch.Generator().manual_seed(seed)
    for _, producer, readers in vectors(model):
        weight = producer.weight
        factors = torch.exp(spread * torch.randn(weight.shape[0], generator=rng))
        weight.mul_(factors.view(-1, *[1] * (weight.ndim - 1)))
        for reader in readers:
            reader.weight.div_(on_columns(factors, reader.in_features, model.config.head_dim))


@torch.no_grad()
def outliers(model: LlamaForCausalLM, windows: Tensor) -> dict[str, tuple[float, float, float]]:
    """How channels differ, by vector: (largest over median root mean square of the inputs, the same of the norms of the
    readers' columns, standard deviation of the logarithm of the latter). windows: token ids [N, CONTEXT].
    """
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    hooks = []
    for name, _, readers in vectors(model):

        def take(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            sums[name] = sums[name] + inputs[0].flatten(0, -2).double().square().sum(0).cpu()

        hooks.append(readers[0].register_forward_pre_hook(take))
    for ids in windows.split(16):
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, _, readers in vectors(model):
        rms = sums[name].sqrt()
        columns = torch.cat([reader.weight for reader in readers]).norm(dim=0)
        loud = [float(x.max() / x.median()) for x in (rms, columns)]
        found[name] = (loud[0], loud[1], float(columns.log().std()))
    return found


def print_outliers(folder: Path) -> None:
    """The table of `outliers` for a saved checkpoint of this shape of model, on the held-out text."""
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    held = torch.tensor(list((Path(__file__).parent / "heldout.txt").read_bytes()))
    windows = held[: len(held) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    print("largest over median channel: of the inputs, of the columns' norms; spread of the columns' logarithms")
    for name, (loud, column, spread) in outliers(saved, windows).items():
        print(f"{name:66} {loud:5.1f} {column:5.1f} {spread:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the example checkpoint that has outlier channels.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "outlier-llama", help="checkpoint folder")
    parser.add_argument("--spread", type=float, default=SPREAD, help="of the logarithm of the factors at the start")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--documents", type=Path, help="text to train on, in place of this Python's")
    parser.add_argument("--write-documents", type=Path, help="write the text of this Python there, and stop")
    parser.add_argument("--measure", type=Path, help="print the outliers of this checkpoint, and stop")
    args = parser.parse_args()
    if args.measure:
        print_outliers(args.measure)
        return
    if args.write_documents:
        args.write_documents.write_text(json.dumps(documents()))
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    train_docs, heldout = split(json.loads(args.documents.read_text()) if args.documents else documents())
    stream = token_stream(train_docs)
    print(f"{len(stream):,} training tokens in {len(train_docs)} documents, {len(heldout.encode()):,} held-out bytes")
    model = LlamaForCausalLM(tiny_config())
    widen(model, args.spread, args.seed + 1)
    train(model.to(device), stream.to(device), args.steps, args.batch_size, args.lr, args.seed)
    save(model, args.out, "5MB")
    judge(args.out, heldout)
    print_outliers(args.out)


if __name__ == "__main__":
    main()
