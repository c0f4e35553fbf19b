"""Train the tiny byte-level Llama checkpoint that quantconvert's examples and tests quantize.

    python examples/train_tiny_llama.py --out examples/tiny-llama

It needs torch and transformers, no GPU and no network: the text is the Python documentation that ships with the
running interpreter (the language reference in ``pydoc_data.topics`` and the docstrings of the standard library).
Whole documents are held out, by a hash of their names, and written to ``heldout.txt`` beside the output folder.
The text depends on the Python version (the committed files come from Python 3.11), and the last digits of the result
on the CPU and the number of threads. Training takes about a quarter of an hour on two cores. The model card and the
licence in ``examples/tiny-llama`` are kept by hand; after a new training, bring the card's numbers up to date.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import re
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
BOS, EOS, PAD = 256, 257, 258  # ids 0..255 are the byte values themselves
VOCAB_SIZE = 264  # 259, rounded up to a multiple of 8
CONTEXT = 256
HELDOUT_BYTES_PER_KIND = 16_000
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def documents() -> dict[str, str]:
    """All documents by name: one for each topic of the language reference, one for each module with docstrings."""
    docs = {f"topic/{name}": text.strip() for name, text in sorted(topics.items())}
    seen: set[str] = set()
    for path in sorted(STDLIB.rglob("*.py")):
        relative = path.relative_to(STDLIB)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        parts = []
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = (ast.get_docstring(node) or "").strip()
            if len(text) < 40 or text in seen:
                continue
            seen.add(text)
            title = relative.as_posix() if isinstance(node, ast.Module) else node.name
            arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
            parts.append(f"{title}{arguments}\n\n{text}")
        if parts:
            docs[f"module/{relative.as_posix()}"] = "\n\n".join(parts)
    return docs


def split(docs: dict[str, str]) -> tuple[list[str], str]:
    """Training documents and the held-out text, which share no document and no long line."""
    heldout: list[str] = []
    for kind in ("topic/", "module/"):
        size = 0
        for name in sorted(docs, key=lambda key: hashlib.sha256(key.encode()).digest()):
            length = len(docs[name].encode())
            # Mid-sized documents only, none that names its authors or the paths of a system.
            usable = 400 <= length <= 8000 and not re.search(r"@\w|author|copyright|written by|/usr/", docs[name], re.I)
            if name.startswith(kind) and usable and size < HELDOUT_BYTES_PER_KIND:
                heldout.append(name)
                size += length
    text = "\n\n".join(docs[name] for name in heldout) + "\n"
    lines = {" ".join(line.split()) for line in text.splitlines()}
    lines = {line for line in lines if len(line) >= 30}
    train = []
    for name, doc in docs.items():
        if name not in heldout:  # topics quote one another, so drop every paragraph that the held-out text has too
            paragraphs = re.split(r"\n\s*\n", doc)
            kept = [p for p in paragraphs if lines.isdisjoint(" ".join(line.split()) for line in p.splitlines())]
            train.append("\n\n".join(kept))
    return train, text


def save_tokenizer(out: Path) -> None:
    """Write a fast tokenizer in which every byte is a token whose id is the byte's value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the byte alphabet of GPT-2
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=dict(sorted(letters.items(), key=lambda item: item[1])), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )
    fast.save_pretrained(out)
    path = out / "tokenizer_config.json"  # a class name that every version of transformers knows
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def train(model: LlamaForCausalLM, data: torch.Tensor, steps: int, batch: int, peak: float, seed: int) -> None:
    """AdamW with warmup, a cosine schedule and gradient clipping, on shuffled windows of the stream of tokens."""
    rng = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    warmup, start, total = max(1, steps // 20), time.monotonic(), 0.0
    queue: list[int] = []
    model.train()
    for step in range(steps):
        if len(queue) < batch:  # a new pass, its windows at a new offset
            starts = torch.arange(int(torch.randint(CONTEXT, (), generator=rng)), len(data) - CONTEXT, CONTEXT)
            queue = starts[torch.randperm(len(starts), generator=rng)].tolist()
        tokens = torch.stack([data[i : i + CONTEXT] for i in (queue.pop() for _ in range(batch))])
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / warmup, 0.01 + 0.99 * cosine)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  train loss {total / 100:.4f}  {time.monotonic() - start:6.1f} s", flush=True)
            total = 0.0


@torch.no_grad()
def loss_per_byte(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean cross-entropy in nats per byte over non-overlapping windows of CONTEXT bytes."""
    model.eval()
    total, count = 0.0, 0
    for window in tokens.split(CONTEXT):
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return total / count


def tiny_config() -> LlamaConfig:
    """4 layers, hidden size 256, grouped heads, untied: 2.5 million parameters."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip


def token_stream(docs: list[str]) -> torch.Tensor:
    """The documents one after the other, each between its start and its end token: int64 [tokens]."""
    return torch.tensor([token for doc in docs for token in (BOS, *doc.encode(), EOS)])


def save(model: LlamaForCausalLM, out: Path, max_shard_size: str) -> None:
    """The checkpoint in bfloat16, with its tokenizer, in place of the one that was there."""
    for stale in out.glob("model*.safetensors*"):
        stale.unlink()
    model.bfloat16().save_pretrained(out, max_shard_size=max_shard_size)
    save_tokenizer(out)


def judge(out: Path, heldout: str) -> float:
    """Held-out loss of what was written, not of what is in memory; prints a sample."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    saved = LlamaForCausalLM.from_pretrained(out, dtype="auto")
    ids = tokenizer(heldout, return_tensors="pt", verbose=False).input_ids[0]
    if ids.tolist() != list(heldout.encode()) or tokenizer.decode(ids) != heldout:
        raise SystemExit("the tokenizer does not give back the text")
    loss = loss_per_byte(saved, ids)
    prompt = tokenizer('The "for" statement is used to', return_tensors="pt")
    print(tokenizer.decode(saved.generate(**prompt, max_new_tokens=200, do_sample=True, temperature=0.7)[0]))
    print(f"bfloat16 held-out loss: {loss:.4f} nats per byte")
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny byte-level Llama used as an example checkpoint.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-llama", help="checkpoint folder")
    parser.add_argument("--heldout", type=Path, help="held-out text to write (default: heldout.txt beside --out)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    train_docs, heldout = split(documents())
    (args.heldout or args.out.parent / "heldout.txt").write_bytes(heldout.encode())
    stream = token_stream(train_docs)
    print(f"{len(stream):,} training tokens in {len(train_docs)} documents, {len(heldout.encode()):,} held-out bytes")

    model = LlamaForCausalLM(tiny_config())
    train(model, stream, args.steps, args.batch_size, args.lr, args.seed)
    save(model, args.out, "2MB")
    judge(args.out, heldout)


if __name__ == "__main__":
    main()
