"""Whole pipelines of diffusers: a folder with `model_index.json`, of which the text encoders are converted.

What transformers loads and a table knows is converted, each component into its own folder; everything else (the VAE,
schedulers, tokenizers, and diffusion models, of which diffusers reads no layout of ours; other engines may, so that a
component is converted where it is asked for) is carried over as it is. All of it is built in a hidden folder beside OUT
and gets OUT's name at last; the same call continues an interrupted one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from quantconvert.checkpoint import Checkpoint, LocalFolder, Repo, RepoFile, load_checkpoint, open_subfolder
from quantconvert.checkpoint.files import PIPELINE_NAME, check_files, kind_of
from quantconvert.checkpoint.header import parse_object
from quantconvert.checkpoint.ranges import Files
from quantconvert.conversion import SMALL_FILES_NBYTES, Result, Target, is_result, run
from quantconvert.errors import CheckpointError, OutputError, QuantConvertError, UnsupportedError, UsageError, raise_all
from quantconvert.events import Note
from quantconvert.families import find_family
from quantconvert.planned import Builder, planned
from quantconvert.planning import Plan
from quantconvert.run.disk import copy_file, fsync_folder
from quantconvert.run.folder import check_disk, check_output, check_place, exists_error

MAX_INDEX_NBYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """What became of a pipeline: the conversion of each component (None: an earlier run had done it), and the files
    that were carried over.
    """

    out: Path
    components: dict[str, Result | None]
    carried: tuple[str, ...]


def component_names(repo: Repo) -> tuple[str, ...]:
    """The folders of `model_index.json` that transformers loads and a table knows."""
    return tuple(name for name, checkpoint in _checkpoints(repo) if find_family(checkpoint))


def _asked(repo: Repo, names: Sequence[str]) -> tuple[str, ...]:
    """Folders that the user named, diffusion models too, of which names say what is linear."""
    having = sorted({file.path.split("/")[0] for file in repo.files() if file.path.count("/") == 1})
    having = [name for name in having if _has_weights(repo, name)]
    strange = [name for name in names if name not in having]
    if strange:
        raise UsageError(
            f"--component: `{repo.location}` has no folder `{strange[0]}` with a config and weights",
            hint=f"it has {', '.join(having) or 'none'}",
        )
    return tuple(dict.fromkeys(names))


def convert_pipeline(
    repo: Repo, builder: Callable[[Repo], Builder], target: Target, asked: Sequence[str] = ()
) -> PipelineResult:
    """Convert the components that can be, or those that are asked for, and carry over what stands beside them.

    builder: that of the plan of a component. Raises what planning them raises, all at once, and what conversions do.
    """
    names = _asked(repo, asked) if asked else component_names(repo)
    if not names:
        raise UnsupportedError(
            f"`{repo.location}` is a pipeline without a component that can be converted",
            hint="--component NAME converts one of its folders, whatever it is",
        )
    parts = {name: open_subfolder(repo, name) for name in names}
    plans = _plans(parts, builder)
    carried = [file for file in repo.files() if _is_carried(file, names)]
    stage = _stage(target.out)
    _check(repo, target, plans, sum(file.nbytes for file in carried), stage)
    if target.restart:
        shutil.rmtree(stage, ignore_errors=True)
    made: dict[str, Result | None] = {}
    for name, part in parts.items():
        target.report(Note("pipeline", f"{name}: {plans[name].checkpoint.model_type}"))
        made[name] = None
        if not _is_done(stage / name, plans[name]):
            made[name] = run(part, builder(part), Target(stage / name, False, False, target.verify, target.report))
    repo.prepare(tuple(file.path for file in carried))
    with closing(Files(repo)) as files:
        for file in carried:
            place = stage / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            copy_file(files.reader(file.path), place)
    _move(stage, target.out)
    return PipelineResult(target.out, made, tuple(file.path for file in carried))


def _checkpoints(repo: Repo) -> Iterator[tuple[str, Checkpoint]]:
    """The components that transformers loads, with what is in them."""
    file = next(file for file in repo.files() if file.path == PIPELINE_NAME)
    if file.nbytes > MAX_INDEX_NBYTES:
        raise CheckpointError(
            f"`{PIPELINE_NAME}` is too large: expected at most {MAX_INDEX_NBYTES} bytes, got {file.nbytes}"
        )
    index = parse_object(repo.read(PIPELINE_NAME, 0, file.nbytes), f"`{PIPELINE_NAME}`")
    check_files(repo.files(), repo.location)
    folders = {file.path.split("/")[0] for file in repo.files() if file.path.count("/") == 1}
    for name, value in index.items():
        library = value[0] if isinstance(value, list) and len(value) == 2 else None
        if library == "transformers" and name in folders and _has_weights(repo, name):
            yield name, load_checkpoint(open_subfolder(repo, name))


def _has_weights(repo: Repo, folder: str) -> bool:
    """Tokenizers and processors are of transformers too."""
    names = {file.path for file in repo.files()}
    return f"{folder}/config.json" in names and any(
        name.startswith(f"{folder}/") and name.endswith((".safetensors", ".bin")) for name in names
    )


def _plans(parts: dict[str, Repo], builder: Callable[[Repo], Builder]) -> dict[str, Plan]:
    plans: dict[str, Plan] = {}
    errors: list[QuantConvertError] = []
    for name, part in parts.items():
        try:
            plans[name] = planned(part, builder(part))
        except QuantConvertError as error:
            error.add_note(f"component {name}")
            errors.append(error)
    raise_all(errors)
    return plans


def _is_carried(file: RepoFile, names: tuple[str, ...]) -> bool:
    return file.path.split("/")[0] not in names and kind_of(file.path) != "hidden"


def _stage(out: Path) -> Path:
    """Where it is built: a folder that nobody takes for a model."""
    return out.with_name(f".{out.name}.quantconvert")


def _check(repo: Repo, target: Target, plans: dict[str, Plan], nbytes: int, stage: Path) -> None:
    """Every refusal about the place at once."""
    source = repo.path if isinstance(repo, LocalFolder) else None
    errors = check_place(target.out)
    if not errors:
        errors += check_output(target.out, source, overwrite=False)
    if target.overwrite:
        errors.append(OutputError("--overwrite replaces checkpoints, no pipelines", hint="give another OUT"))
    needed = nbytes + SMALL_FILES_NBYTES + sum(plan.output_nbytes + plan.scratch_nbytes for plan in plans.values())
    left = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file()) if stage.is_dir() else 0
    errors += check_disk(target.out, max(0, needed - left))
    raise_all(errors)


def _is_done(folder: Path, plan: Plan) -> bool:
    """Whether an earlier run has made this component, of the same source and options."""
    if not (folder / "config.json").is_file():
        return False
    if not is_result(folder, plan):
        raise OutputError(
            f"`{folder.parent}` holds an interrupted conversion of another kind", hint="--restart starts over"
        )
    return True


def _move(stage: Path, out: Path) -> None:
    """The finished folder under its name, which an empty folder may bear."""
    try:
        if out.is_dir():
            out.rmdir()
        stage.rename(out)
        fsync_folder(out.resolve().parent)
    except OSError as error:
        if out.is_dir():
            raise exists_error(out) from error
        raise OutputError(f"cannot rename `{stage}` to `{out}`: {error.strerror}") from error
