"""Options that only the command line knows: what is printed, and files of options."""

from __future__ import annotations

from typing import Annotated, TypedDict

from quantconvert.layouts import LAYOUTS
from quantconvert.options.option import Option
from quantconvert.options.table import DEFAULT_DTYPE, RULES, Activations, HubOptions, PlainDType


class ShowWords(TypedDict, total=False):
    """What is printed."""

    json: Annotated[bool, Option("One JSON object on stdout, errors too.", default=False)]
    verbose: Annotated[bool, Option("Each tensor, and why.", flags=("--verbose", "-v"), default=False)]


class QuietWords(ShowWords, total=False):
    """What is printed, or not."""

    quiet: Annotated[bool, Option("Only errors.", flags=("--quiet", "-q"), default=False)]


class RecipeWords(QuietWords, total=False):
    """A file of options."""

    recipe: Annotated[
        str | None, Option("Options and rules from a TOML file; those given here win.", metavar="FILE", panel=RULES)
    ]


class ConvertWords(RecipeWords, HubOptions, total=False):
    """Of `convert` alone."""

    dry_run: Annotated[bool, Option("Plan only; same as `quantconvert plan SRC OUT`.", default=False)]
    push_to_hub: Annotated[
        str | None,
        Option("To this repository on the Hub; without OUT each file as soon as it is complete, and none stays here.",
               metavar="REPO"),
    ]  # fmt: skip


class PlanWords(RecipeWords, total=False):
    """Of `plan` alone."""

    explain: Annotated[
        bool,
        Option("Each kind of tensor: its role, what becomes of it, and why; with --verbose each tensor, and the rule.",
               default=False),
    ]  # fmt: skip
    write_recipe: Annotated[bool, Option("Print the options as a recipe and nothing else.", default=False)]


class ReportWords(QuietWords, total=False):
    """Of `report` alone."""

    markdown: Annotated[bool, Option("Print tables in Markdown, as for the summary of a CI step.", default=False)]


class VerifyWords(QuietWords, total=False):
    """Of `verify` alone."""

    source: Annotated[str | None, Option("What it was converted from: each value is compared.", metavar="SRC")]


class CheckWords(QuietWords, total=False):
    """Of `check` alone."""

    source: Annotated[
        str | None,
        Option("What it was converted from.", metavar="SRC", shown="the repository that quantconvert.json names"),
    ]


class RepackWords(QuietWords, total=False):
    """Of `repack` alone; `format` has no default."""

    format: Annotated[str, Option("Layout to write.", metavar="|".join(LAYOUTS), suggest=lambda: LAYOUTS)]
    activations: Annotated[
        Activations | None,
        Option("Have engines quantize the inputs of quantized layers too, per token; codes and scales stay."),
    ]


class DequantizeWords(QuietWords, total=False):
    """Of `dequantize` alone."""

    dtype: Annotated[PlainDType, Option("Element type to write.", default=DEFAULT_DTYPE)]
