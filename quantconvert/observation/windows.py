"""What the model reads: windows of token ids, from a text or from the model itself. Imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantconvert.errors import CheckpointError, UnsupportedError, UsageError

WINDOW = 512
# Bytes of text that are read for each token asked for: more than tokenizers put into one.
BYTES_PER_TOKEN = 32
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
BATCH = 8  # windows that the model writes at once


def shape_of(config: Any, tokens: int) -> tuple[int, int]:
    """Windows and tokens in each, for a model that reads so many tokens.

    The two differ, so that an axis of windows can be told from one of tokens.
    """
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or WINDOW
    length = min(WINDOW, int(known), tokens)
    count = max(1, tokens // length)
    return count - (count == length and count > 1), length


def read_windows(path: Path, folder: Path, config: Any, tokens: int) -> Tensor:
    """int64 [windows, tokens]: pieces of the text, evenly spaced, each with the marks that the tokenizer puts around.

    Of a long text the first 32 bytes for each token asked for are read. Raises `UsageError` for a text that is too
    short or no UTF-8, `CheckpointError` where the source has no tokenizer.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZERS):  # some are made up without one
        raise CheckpointError(f"the source has no tokenizer: expected one of {', '.join(_TOKENIZERS)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a tokenizer's files make transformers raise
        raise CheckpointError(f"the source has no tokenizer that transformers loads: {error}") from error
    count, length = shape_of(config, tokens)
    before, after = _marks(tokenizer)
    ids = tokenizer(_text(path, tokens), add_special_tokens=False, verbose=False)["input_ids"]
    width = length - len(before) - len(after)
    if width < 1 or not ids:
        raise UsageError(f"--text: `{path}` gives {len(ids)} tokens, of which none fits into --tokens {tokens}")
    pieces = [ids[begin : begin + width] for begin in range(0, len(ids) - width + 1, width)] or [ids]
    chosen = [pieces[i * len(pieces) // count] for i in range(count)] if len(pieces) > count else pieces
    if len(chosen) == length > 1:
        chosen.pop()
    return torch.tensor([[*before, *piece, *after] for piece in chosen])


def _text(path: Path, tokens: int) -> str:
    with path.open("rb") as file:
        raw = file.read(tokens * BYTES_PER_TOKEN)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        if error.start >= len(raw) - 3:  # cut in the middle of a character
            return raw[: error.start].decode()
        raise UsageError(f"--text: `{path}` is not UTF-8: {error.reason} at byte {error.start}") from None


def _marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(marked)) if marked[i : i + len(bare)] == bare), None)
    return ([], []) if at is None else (marked[:at], marked[at + len(bare) :])


def written_windows(folder: Path, config: Any, tokens: int, seed: int) -> Tensor:
    """int64 [windows, tokens] that the model writes from its own start token, at temperature 1.

    The whole model is in memory meanwhile, in the dtype of the checkpoint. Raises `UnsupportedError` for one that does
    not write.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        how = {"dtype": "auto", "trust_remote_code": False, "local_files_only": True}
        model, info = auto.from_pretrained(folder, output_loading_info=True, **how)
    except Exception as error:  # whatever a config makes transformers raise
        message = f"--self: transformers loads no model that writes text: {error}"
        raise UnsupportedError(message, hint="--text FILE") from error
    if missing := sorted(info["missing_keys"]):
        message = f"--self: the source writes no text: it has no `{missing[0]}`"
        raise UnsupportedError(message, hint="--text FILE")
    model.eval()
    start = next((id for id in _starts(model, config) if isinstance(id, int)), None)
    if start is None:
        raise UnsupportedError("--self: the config names no token to begin with", hint="--text FILE")
    count, length = shape_of(config, tokens)
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "num_beams": 1}
    found = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for begin in range(0, count, BATCH):
            ids = torch.full((min(BATCH, count - begin), 1), start)
            more = {"max_new_tokens": length - 1, "min_new_tokens": length - 1, "pad_token_id": start}
            found.append(
                model.generate(ids, attention_mask=torch.ones_like(ids), **drawn, **more) if length > 1 else ids
            )
    return torch.cat(found)


def _starts(model: Any, config: Any) -> list[Any]:
    """Ids that a text may begin with, the likeliest first."""
    own = model.generation_config
    text = config.get_text_config()
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return [own.bos_token_id, getattr(text, "bos_token_id", None), *ends, getattr(text, "eos_token_id", None)]
