"""One observation: refuse early, load the model's skeleton, run it over the windows, write what was seen."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantconvert.checkpoint import Checkpoint, Repo, load_checkpoint, reader_of
from quantconvert.checkpoint.ranges import Files
from quantconvert.errors import QuantConvertError, UnsupportedError, raise_all
from quantconvert.events import Finished, Note, Progress, Reporter, Started
from quantconvert.families import Classifier
from quantconvert.lazy import load_torch
from quantconvert.observation.request import Request, problems, source_problems, text_sha256
from quantconvert.observation.write import StatisticsFile
from quantconvert.patterns import WEIGHT_SUFFIX, template_of
from quantconvert.sources import Read, find_sources
from quantconvert.statistics import fingerprint
from quantconvert.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from quantconvert.observation.model import Layer, Watchable, Weights
    from quantconvert.observation.passes import Take
    from quantconvert.observation.watch import Sums


# Roles of matrices that no linear layer of the layers has; the head lies behind what is run.
_NOT_LINEAR = ("embedding", "norm", "conv", "not a weight", "lm_head")


@dataclass(frozen=True, slots=True)
class Observation:
    """What was observed: layers, inputs that are not the same, linear layers with and without one, tokens; the module
    with the largest number in its input, and that number. by_layers: whether one layer was in memory at a time.
    """

    out: Path
    num_layers: int
    num_inputs: int
    num_modules: int
    num_tokens: int
    largest: tuple[str, float]
    unobserved: tuple[str, ...]
    by_layers: bool
    nbytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        module, largest = self.largest
        return asdict(self) | {"out": str(self.out), "largest": {"module": module, "max": largest}}


def observe(repo: Repo, asked: Request, report: Reporter) -> Observation:
    """Run the model of `repo` and write its statistics to `asked.out`.

    Raises every refusal at once; then `CheckpointError` and `UnsupportedError` for a model that transformers does not
    build, load or run, `OutputError` for the disk. Nothing is written unless all of it is.
    """
    begin = time.perf_counter()
    errors: list[QuantConvertError] = list(problems(asked))
    try:
        checkpoint = load_checkpoint(repo)
    except QuantConvertError as error:
        raise_all([*errors, error])
        raise
    errors += source_problems(checkpoint)
    raise_all(errors)
    reads = _linear(checkpoint, repo)
    report(Started(len(checkpoint.tensors), checkpoint.nbytes, "observing"))
    files = Files(repo)
    try:
        _prepare_libraries()
        return _Run(asked, checkpoint, repo, files, reads, report).done(begin)
    except QuantConvertError:
        raise
    except Exception as error:  # whatever transformers raises
        raise UnsupportedError(f"transformers does not run this model: {type(error).__name__}: {error}") from error
    except BaseException as stop:
        stop.add_note("nothing was written")
        raise
    finally:
        files.close()


def _prepare_libraries() -> None:
    """Import what runs models; its progress bars and advice are not ours."""
    load_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as theirs
    logging: Any = theirs
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _linear(checkpoint: Checkpoint, repo: Repo) -> list[Read]:
    """Every weight of two axes that multiplies, as conversions name them."""
    errors: list[QuantConvertError] = []
    classifier = Classifier(checkpoint)
    sources = find_sources(checkpoint, classifier.family, reader_of(repo), errors)
    raise_all(errors)
    matrices = [read for read in sources.reads if len(read.shape) == 2 and read.name.endswith(WEIGHT_SUFFIX)]
    return [read for read in matrices if classifier.role(read).reason not in _NOT_LINEAR]


def reserve(names: Mapping[str, str], unobserved: Iterable[str]) -> int:
    """Bytes that the header takes at most: four entries an input, in JSON inside JSON each module and its input, and
    the kinds without. A character takes six bytes at most as an escape, one more in JSON inside JSON.
    """

    def text(name: str) -> int:
        return len(json.dumps(name).encode()) + name.count("\\") + len(json.dumps(json.dumps(name)))

    entries = sum(4 * (len(key.encode()) + 160) for key in set(names.values()))
    pairs = sum(text(module) + text(key) + 8 for module, key in names.items())
    return 4096 + entries + pairs + sum(text(kind) + 8 for kind in unobserved)


@dataclass(slots=True)
class _Run:
    """The parts of one observation."""

    asked: Request
    checkpoint: Checkpoint
    repo: Repo
    files: Files
    reads: Sequence[Read]
    report: Reporter
    largest: tuple[str, float] = ("", 0.0)
    _told: set[str] = field(default_factory=set)

    def done(self, begin: float) -> Observation:
        """Layer by layer, or else whole."""
        from quantconvert.observation.model import Weights, build, watchable

        folder = self._folder()
        config = _config_of(folder)
        windows = self._windows(folder, config)
        weights = Weights(build(config), self.checkpoint.tensors, self.files, self._advance)
        layers = weights.layers()
        self._load_rest(weights, layers)
        found = watchable(weights, self.reads)
        inputs, by_layers = self._tried(partial(self._attempt, weights, layers, windows, found))
        out = self.asked.out
        self.report(Finished(str(out)))
        counts = len(layers), len(set(inputs.values())), len(inputs), windows.numel()
        more = by_layers, out.stat().st_size, time.perf_counter() - begin
        return Observation(out, *counts, self.largest, self._unobserved(inputs), *more)

    def _tried(self, attempt: Callable[[bool, frozenset[str]], dict[str, str]]) -> tuple[dict[str, str], bool]:
        """The input of each linear layer that was observed, and whether the model ran layer by layer."""
        from quantconvert.observation.watch import SharedNotAlways

        by_layers, alone = True, frozenset[str]()
        while True:
            try:
                return attempt(by_layers, alone), by_layers
            except QuantConvertError:
                raise
            except SharedNotAlways as found:
                if found.kind in alone:
                    raise
                alone |= {found.kind}
            except Exception as error:  # whatever a layer raises that gets one window, or less than it counts on
                if not by_layers:
                    raise
                self._note(f"not layer by layer, but with the whole model in memory (4 bytes a parameter): {error}")
                by_layers = False

    def _attempt(
        self,
        weights: Weights,
        layers: Sequence[Layer],
        windows: Tensor,
        found: Watchable,
        by_layers: bool,
        alone: frozenset[str],
    ) -> dict[str, str]:
        """One run of the model, and its file; the input of each linear layer that was observed."""
        from quantconvert.observation.passes import run_by_layers, run_whole
        from quantconvert.observation.watch import Watch

        run = run_by_layers if by_layers else run_whole
        watch, self.largest = Watch(self.asked.moments, alone), ("", 0.0)
        room = reserve(found.names, {template_of(read.module) for read in self.reads})
        handles = watch.add(found.modules)
        try:
            with StatisticsFile(self.asked.out, room, self.asked.overwrite) as file:
                run(weights, layers, windows, watch, self._take(file))
                inputs = {module: watch.inputs[key] for module, key in found.names.items() if key in watch.inputs}
                if not inputs:
                    raise UnsupportedError("none of the model's linear layers ran", hint="is it a model of text?")
                file.finish(self._metadata(windows, inputs))
        finally:
            for handle in handles:
                handle.remove()
        return inputs

    def _note(self, message: str) -> None:
        self.report(Note("observe", message))

    def _advance(self, name: str, nbytes: int) -> None:
        if name not in self._told:
            self._told.add(name)
            self.report(Progress(name, nbytes))

    def _folder(self) -> Path:
        """Where every file of the source is, on this machine."""
        checkpoint = self.checkpoint
        files = (*checkpoint.weight_files, *checkpoint.side_files, *checkpoint.rewritten_files)
        paths = tuple(file.path for file in files)
        self.repo.prepare(paths)
        return self.repo.materialize(paths)

    def _windows(self, folder: Path, config: Any) -> Tensor:
        from quantconvert.observation.windows import read_windows, written_windows

        asked = self.asked
        if asked.text is None:
            self._note(f"the model writes {asked.tokens} tokens first, whole in memory")
            return written_windows(folder, config, asked.tokens, asked.seed)
        windows = read_windows(asked.text, folder, config, asked.tokens)
        if windows.numel() < asked.tokens * 9 // 10:
            self._note(f"`{asked.text}` gives {windows.numel()} of {asked.tokens} tokens")
        return windows

    def _load_rest(self, weights: Weights, layers: Iterable[Layer]) -> None:
        """Embeddings, norms and whatever else lies outside the layers; what the source has not is zero."""
        import torch

        inside = {ref.name for layer in layers for ref in layer.tensors}
        weights.load(ref for ref in weights.refs.values() if ref.name not in inside)
        weights.model.tie_weights()
        names = {layer.name for layer in layers}
        missing = []
        for name, param in list(weights.model.named_parameters()):
            parts = name.split(".")
            if param.is_meta and not any(".".join(parts[:i]) in names for i in range(len(parts))):
                owner, _, last = name.rpartition(".")
                zeros = torch.nn.Parameter(torch.zeros(param.shape), requires_grad=False)
                weights.model.get_submodule(owner)._parameters[last] = zeros
                missing.append(name)
        if missing:
            self._note(f"{len(missing)} parameters are not in the source and count as zero, such as `{missing[0]}`")

    def _take(self, file: StatisticsFile) -> Take:
        from quantconvert.buffers import bytes_of

        def take(sums: dict[str, Sums]) -> None:
            for name, found in sums.items():
                for kind, tensor in found.tensors(name).items():
                    file.add(f"{name}.{kind}", tuple(tensor.shape), bytes_of(tensor.contiguous()))
                    if kind == "max":
                        self.largest = max(self.largest, (name, float(tensor)), key=lambda pair: pair[1])

        return take

    def _unobserved(self, inputs: Mapping[str, str]) -> tuple[str, ...]:
        """Kinds of linear layers without statistics."""
        return tuple(dict.fromkeys(template_of(read.module) for read in self.reads if read.module not in inputs))

    def _metadata(self, windows: Tensor, inputs: Mapping[str, str]) -> dict[str, str]:
        asked = self.asked
        text = {"self": "true"} if asked.text is None else {"text_sha256": text_sha256(asked.text)}
        return {
            "quantconvert_version": __version__,
            "model_type": self.checkpoint.model_type,
            "fingerprint": fingerprint(self.checkpoint.tensors, reader_of(self.repo)),
            "num_tokens": str(windows.numel()),
            **text,
            "seed": str(asked.seed),
            "inputs": json.dumps(inputs),
            "unobserved": json.dumps(self._unobserved(inputs)),
        }


def _config_of(folder: Path) -> Any:
    """The config as transformers reads it, without a cache of keys and values; no code of the source runs."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a config makes transformers raise
        raise UnsupportedError(f"transformers does not know this model: {error}") from error
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.use_cache = False
    return config
