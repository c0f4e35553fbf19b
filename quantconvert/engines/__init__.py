"""Which engines load what: rows of facts, one file an engine. A new engine is a file and a line here.

The plan's notes, the lines that load a result, `--format auto` and the README's tables come from the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantconvert.engines.gptqmodel import GPTQMODEL
from quantconvert.engines.mlx import MLX
from quantconvert.engines.row import PLAIN, Engine, Loadable, Row, Verdict, When, filled
from quantconvert.engines.sglang import SGLANG
from quantconvert.engines.transformers import TRANSFORMERS
from quantconvert.engines.vllm import VLLM
from quantconvert.registry import Registry

__all__ = [
    "ENGINES", "NOBODY", "PLAIN", "Engine", "Loadable", "Row", "Verdict", "When", "engine_notes", "get_engines",
    "load_lines", "own_names", "snippets", "titles",
]  # fmt: skip

ENGINES: Registry[Engine] = Registry("engine", VLLM, SGLANG, TRANSFORMERS, GPTQMODEL, MLX)

NOBODY = "no engine loads this result as it is"


def get_engines(names: Sequence[str]) -> tuple[Engine, ...]:
    """The engines of these names, all where there are none; raises `UsageError` for an unknown one."""
    return tuple(ENGINES.find(name) for name in dict.fromkeys(names)) or tuple(ENGINES.values())


def titles(engines: Sequence[Engine]) -> str:
    """`vLLM, SGLang and transformers`."""
    names = [engine.title for engine in engines]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def engine_notes(loadable: Loadable, asked: Sequence[str] = ()) -> list[str]:
    """What engines refuse of a checkpoint, load wrongly, or need to be told; engines that say the same are joined.

    asked: engines that the user named, of which silence is no answer.
    """
    found: dict[str, list[Engine]] = {}
    for engine in get_engines(asked):
        said = [filled(row.note, scheme) for row, scheme in engine.found(loadable) if row.note]
        if asked and not said and not engine.loads(loadable):
            said = [engine.why_not(loadable)]
        for text in said:
            found.setdefault(text, []).append(engine)
    notes = [f"{titles(list(dict.fromkeys(engines)))}: {text}" for text, engines in found.items()]
    if not any(engine.loads(loadable) for engine in ENGINES.values()):
        notes.append(f"{NOBODY}: {titles(list(ENGINES.values()))} were looked at")
    return notes


def load_lines(loadable: Loadable, out: str, asked: Sequence[str] = ()) -> list[str]:
    """The lines that load `out`: of the engines asked for, else of the usual ones, else of any that load it."""
    return [engine.line(loadable, out) for engine in _shown(loadable, asked)]


def snippets(loadable: Loadable, out: str, asked: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The same for a model card: language and code, Python with its imports."""
    return [engine.snippet(loadable, out) for engine in _shown(loadable, asked)]


def _shown(loadable: Loadable, asked: Sequence[str]) -> list[Engine]:
    able = [engine for engine in get_engines(asked) if engine.loads(loadable)]
    return able if asked else [engine for engine in able if engine.usual] or able


def own_names(model_type: str) -> tuple[str, ...]:
    """Patterns (`re:...`) of the names that engines give to layers that stay plain, where the checkpoint's differ."""
    rows = (row for engine in ENGINES.values() for row in engine.renamed)
    return tuple(pattern for own, patterns in rows if own == model_type for pattern in patterns)
