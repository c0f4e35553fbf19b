"""A result and its source in transformers, one after the other, on the CPU, on the same text. Imports torch.

No code of either repository runs. Outputs of the source lie in a file meanwhile, so that one model is in memory at a
time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

from quantconvert.checkpoint import Checkpoint, Repo, load_checkpoint
from quantconvert.comparison.outcome import Comparison
from quantconvert.errors import UnsupportedError, VerificationError, some
from quantconvert.events import Note, Reporter
from quantconvert.machine import available_nbytes, roomy_folder
from quantconvert.observation.windows import read_windows
from quantconvert.text import size

TEXT = Path(__file__).parent / "text.txt"
# What a model takes beside its stored bytes: activations, and weights that are decoded one at a time.
ROOM = 1.3


# What transformers says of keys, in words.
_WRONG = {"missing_keys": "lacks", "unexpected_keys": "has no place for", "mismatched_keys": "misfits"}


@dataclass(frozen=True, slots=True)
class Request:
    """text: a file; None: the built-in one. tokens: how many are read. max_kl: above it the comparison fails."""

    text: Path | None = None
    tokens: int = 2048
    max_kl: float | None = None


def check(result: Repo, source: Repo | None, request: Request, report: Reporter) -> Comparison:
    """Run both, and compare.

    Raises `VerificationError` where the result does not load, or not all of it does, in the engine's own words;
    `UnsupportedError` where transformers is missing, or there is too little memory; `CheckpointError` and `UsageError`
    for the text.
    """
    transformers = _engine()
    ours = load_checkpoint(result)
    theirs = load_checkpoint(source) if source is not None else None
    _check_memory(ours, theirs)
    folder = _folder(result)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    windows = read_windows(request.text or TEXT, folder, config, request.tokens)
    against = "" if source is None else f", {source.location} first"
    report(Note("check", f"reading {windows.numel()} tokens in {len(windows)} windows{against}"))
    with TemporaryFile(dir=roomy_folder()) as file:
        kept = _Kept(file)
        if source is not None:
            for output in _outputs(_folder(source), config, windows):
                kept.add(output)
        return _compared(_outputs(folder, config, windows), windows, kept, (result, source), request)


def _engine() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError("check needs transformers", hint="install the extra: quantconvert[engines]") from error
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def _folder(repo: Repo) -> Path:
    return repo.materialize(tuple(file.path for file in repo.files()))


def _check_memory(ours: Checkpoint, theirs: Checkpoint | None) -> None:
    """Say what it takes before anything is loaded."""
    decoded = theirs.nbytes if theirs else 4 * ours.nbytes
    needed, free = int(ROOM * max(decoded, ours.nbytes)), available_nbytes()
    if free is not None and needed > free:
        raise UnsupportedError(
            f"check needs about {size(needed)} of memory to run this model on the CPU, {size(free)} are free",
            hint="run it on a larger machine; `verify --source SRC` compares every weight in little memory",
        )


def _outputs(folder: Path, config: Any, windows: Tensor) -> Iterator[Tensor]:
    """Of each window [tokens] the logits [tokens, vocabulary], or the embedding [1, width], in float32."""
    model = _load(folder, config)
    try:
        for window in windows:
            with torch.inference_mode():
                found = model(input_ids=window[None])
            logits = getattr(found, "logits", None)
            if logits is None:
                logits = found.last_hidden_state.float().mean(1, keepdim=True)
            yield logits[0].float()
    finally:
        del model
        gc.collect()


def _load(folder: Path, config: Any) -> Any:
    """The model as its architecture says; all of its parameters must be in the files, and nothing else."""
    import transformers

    name = next(iter(config.architectures or ()), None)
    kind = getattr(transformers, name or "", None) or transformers.AutoModel
    try:
        model, info = kind.from_pretrained(
            folder, dtype="auto", device_map="cpu", output_loading_info=True, trust_remote_code=False,
            local_files_only=True,
        )  # fmt: skip
    except Exception as error:  # whatever the engine raises
        raise VerificationError(f"transformers does not load `{folder}`: {error}") from error
    for words, keys in (
        ("lacks", "missing_keys"),
        ("has no place for", "unexpected_keys"),
        ("misfits", "mismatched_keys"),
    ):
        found = sorted(map(str, info.get(keys) or ()))
        if found:
            raise VerificationError(
                f"transformers does not load all of `{folder}`: it {words} {len(found)} tensors: {some(found)}",
                hint="missing ones are random numbers" if keys == "missing_keys" else None,
            )
    return model.eval()


class _Kept:
    """Outputs of the source, in a file."""

    def __init__(self, file: Any) -> None:
        self._file, self._shapes = file, list[tuple[int, ...]]()

    def add(self, output: Tensor) -> None:
        self._shapes.append(tuple(output.shape))
        self._file.write(output.contiguous().numpy().tobytes())

    def __iter__(self) -> Iterator[Tensor]:
        self._file.seek(0)
        for shape in self._shapes:
            data = bytearray(self._file.read(4 * math.prod(shape)))
            yield torch.frombuffer(data, dtype=torch.float32).view(shape)

    def __len__(self) -> int:
        return len(self._shapes)


def _compared(
    outputs: Iterator[Tensor], windows: Tensor, kept: _Kept, repos: tuple[Repo, Repo | None], request: Request
) -> Comparison:
    theirs = iter(kept)
    kl = same = loss = source_loss = 0.0
    count = predicted = 0
    cosines: list[float] = []
    for window, mine in zip(windows, outputs, strict=True):
        other = next(theirs, None)
        if not bool(torch.isfinite(mine).all()):
            raise VerificationError(f"`{repos[0].location}` gives numbers that are none (NaN or Inf)")
        if len(mine) != len(window):
            if other is not None:
                cosines.append(float(torch.cosine_similarity(mine, other).mean()))
            count += len(window)
            continue
        log_q = mine.log_softmax(-1)
        loss += _loss(log_q, window)
        count, predicted = count + len(window), predicted + len(window) - 1
        if other is not None:
            log_p = other.log_softmax(-1)
            source_loss += _loss(log_p, window)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((mine.argmax(-1) == other.argmax(-1)).sum())
    known = len(kept) > 0
    heads = {} if not predicted else {"perplexity": math.exp(loss / predicted)}
    if predicted and known:
        heads |= {"kl": kl / count, "top1": same / count, "source_perplexity": math.exp(source_loss / predicted)}
    if cosines:
        heads |= {"cosine": sum(cosines) / len(cosines), "worst_cosine": min(cosines)}
    result, source = repos
    place = source.location if source is not None else None
    return Comparison(result.location, place, count, max_kl=request.max_kl, **heads)


def _loss(log_p: Tensor, window: Tensor) -> float:
    """The summed loss of each next token."""
    return -float(log_p[:-1].gather(-1, window[1:, None]).sum())
