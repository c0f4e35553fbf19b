"""What each command does: call the library, print. Imported when a command runs, before anything may be interrupted.

A function gets the command's arguments, then the library's options that were given, then the command line's own.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantconvert import api
from quantconvert.cli.explain import print_plan
from quantconvert.cli.failures import Exit
from quantconvert.cli.lines import print_json, print_text
from quantconvert.cli.output import (
    print_comparison,
    print_inventory,
    print_observation,
    print_pipeline,
    print_published,
    print_result,
    print_verification,
    result_json,
)
from quantconvert.errors import UsageError, VerificationError
from quantconvert.events import Reporter, silent
from quantconvert.hub import checked_repo
from quantconvert.options import HubOptions, PlanOptions, read_group
from quantconvert.planning import Plan
from quantconvert.run.folder import free_nbytes

if TYPE_CHECKING:
    from quantconvert.conversion import Result
    from quantconvert.pipeline import PipelineResult


def convert(source: str, out: str | None, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """Convert SRC into OUT."""
    _check_words(words)
    shown = {name: words[name] for name in read_group(HubOptions) if name in words}
    if "push_to_hub" in words:
        checked_repo(words["push_to_hub"])
    elif shown:
        raise UsageError(f"--{next(iter(shown)).replace('_', '-')} is for --push-to-hub", hint="--push-to-hub REPO")
    elif out is None and not words.get("dry_run"):
        raise UsageError("OUT is missing", hint="a folder for the result, or --push-to-hub REPO")
    if "shards" in asked and "push_to_hub" in words and out is not None:
        raise UsageError(
            "--shards with --push-to-hub goes without OUT", hint="leave OUT out, or push when all is there"
        )
    asked = _with_recipe(asked, words)
    if words.get("dry_run"):
        known = {name: value for name, value in asked.items() if name in read_group(PlanOptions)}
        _show_plan(api.plan(source, out, **known), out, words)
        return
    where = {name: asked[name] for name in ("revision", "subfolder") if name in asked}
    if out is not None and api.is_pipeline(source, **where):
        if "shards" in asked:
            raise UsageError("--shards is for models, no pipelines", hint="--subfolder DIR")
        with _reporter(words) as report:
            whole = api.convert_pipeline(source, out, report=report, **asked)
        return _show_pipeline(whole, words)
    if "components" in asked:
        raise UsageError(f"--component is for pipelines, which `{source}` is not", hint="--subfolder DIR")
    if out is None:
        with _reporter(words) as report:
            result = api.convert_to_hub(source, words["push_to_hub"], report=report, **asked, **shown)
        return _show_result(result, words)
    with _reporter(words) as report:
        result = api.convert(source, out, report=report, **asked)
    _show_result(result, words)
    if "push_to_hub" in words:
        push(out, words["push_to_hub"], shown, words)
    return None


def finish(out: str, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """End what `--shards` began."""
    with _reporter(words) as report:
        result = api.finish(out, report=report, **asked)
    _show_result(result, words)


def plan(source: str, out: str | None, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """What a conversion would do, from headers; writes nothing."""
    _check_words(words)
    _show_plan(api.plan(source, out, **_with_recipe(asked, words)), out, words)


def verify(folder: str, where: dict[str, Any], words: dict[str, Any]) -> None:
    """Check a result: headers, config, checksums, codes, values."""
    with _reporter(words) as report:
        found = api.verify(folder, words.get("source"), report=report, **where)
    if words.get("json"):
        print_json(found.to_json())
    elif found.findings or not words.get("quiet"):
        print_verification(found, words.get("verbose", False), where.get("attest"))
    if not found.is_ok:
        raise Exit(VerificationError.exit_code)


def push(folder: str, repo: str, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """A finished result to the Hub, in one commit."""
    with _reporter(words) as report:
        done = api.push(folder, repo, report=report, **asked)
    if words.get("json"):
        print_json(asdict(done))
    if not words.get("quiet"):
        print_published(done)


def inspect(folder: str, where: dict[str, Any], words: dict[str, Any]) -> None:
    """What a checkpoint holds: dtypes, sizes, schemes."""
    inventory = api.inspect(folder, **where)
    if words.get("json"):
        print_json(inventory.to_json())
    else:
        print_inventory(inventory, words.get("verbose", False))


def check(folder: str, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """Run a result beside its source."""
    with _reporter(words) as report:
        found = api.check(folder, words.get("source"), report=report, **asked)
    if words.get("json"):
        print_json(found.to_json())
    elif not words.get("quiet"):
        print_comparison(found)
    if not found.is_ok:
        raise Exit(VerificationError.exit_code)


def report(folder: str, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """What a conversion did, for people."""
    _check_words(words)
    if words.get("markdown") and words.get("json"):
        raise UsageError("--markdown contradicts --json", hint="give one of them")
    facts = api.report(folder, **asked)
    if words.get("json"):
        print_json(facts.to_json())
    elif words.get("markdown"):
        from quantconvert.pictures.words import markdown

        print_text(markdown(facts))
    elif not words.get("quiet"):
        from quantconvert.cli.pictures import print_report

        print_report(facts, [asked[name] for name in ("html", "svg") if name in asked])


def observe(source: str, out: str, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """Run SRC in transformers; what its layers read, for --statistics."""
    with _reporter(words) as report:
        found = api.observe(source, out, report=report, **asked)
    if words.get("json"):
        print_json(found.to_json())
    if not words.get("quiet"):
        print_observation(found)


def repack(source: str, out: str, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """Another layout, the same codes, scales and zero points."""
    if "format" not in words:
        raise UsageError("--format is missing", hint="the layout to write: --format compressed-tensors, for example")
    acting = {"activations": words["activations"]} if "activations" in words else {}
    with _reporter(words) as report:
        result = api.repack(source, out, words["format"], report=report, **acting, **asked)
    _show_result(result, words)


def dequantize(source: str, out: str, asked: dict[str, Any], words: dict[str, Any]) -> None:
    """Plain again: (code - zero point) * scale, rounded once."""
    dtype = {"dtype": words["dtype"]} if "dtype" in words else {}
    with _reporter(words) as report:
        result = api.dequantize(source, out, report=report, **dtype, **asked)
    _show_result(result, words)


def _with_recipe(asked: dict[str, Any], words: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, over those of a recipe."""
    if "recipe" not in words:
        return asked
    from quantconvert.recipe import merged, read_recipe

    return merged(read_recipe(Path(words["recipe"])), asked)


def _show_pipeline(result: PipelineResult, words: dict[str, Any]) -> None:
    made = {name: part for name, part in result.components.items() if part is not None}
    if words.get("json"):
        parts = {name: result_json(part) for name, part in made.items()}
        print_json({"out": str(result.out), "components": parts, "carried": list(result.carried)})
    if not words.get("quiet"):
        print_pipeline(result)


def _show_result(result: Result, words: dict[str, Any]) -> None:
    if words.get("json"):
        print_json(result_json(result))
    if not words.get("quiet"):
        print_result(result)


def _reporter(words: dict[str, Any]) -> AbstractContextManager[Reporter]:
    _check_words(words)
    gc.enable()
    if words.get("quiet"):
        return nullcontext(silent)
    from quantconvert.cli.progress import ProgressReporter

    return ProgressReporter(verbose=words.get("verbose", False))


def _show_plan(found: Plan, out: str | None, words: dict[str, Any]) -> None:
    if words.get("write_recipe"):
        from quantconvert.recipe import write_recipe

        print_text(write_recipe(found.job, found.format))
        return
    free = free_nbytes(Path(out) if out else Path.cwd())
    if words.get("json"):
        print_json(found.to_json() | {"free_nbytes": free})
    elif not words.get("quiet"):
        verbose = words.get("verbose", False)
        print_plan(found, free, "tensors" if verbose else "kinds" if words.get("explain") else "totals")


def _check_words(words: dict[str, Any]) -> None:
    if words.get("quiet") and words.get("verbose"):
        raise UsageError("--quiet contradicts --verbose", hint="give one of them")
