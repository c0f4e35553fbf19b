"""Every option, declared once; commands pick from here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantconvert.layouts import LAYOUTS
from quantconvert.planning.rules import PRESETS
from quantconvert.schemes import SCHEMES

_SCHEME, _RULES, _LIMITS = "Scheme", "What stays in high precision", "Limits"

Source = Annotated[
    str,
    typer.Argument(metavar="SRC", help="Local folder, or a Hub repository id such as org/model.", show_default=False),
]
Out = Annotated[
    Path,
    typer.Argument(
        metavar="OUT", help="Folder for the result: new, empty, or of an interrupted run.", show_default=False
    ),
]
MaybeOut = Annotated[
    Path | None,
    typer.Argument(metavar="[OUT]", help="Where the result would go: checked too when given.", show_default=False),
]
Converted = Annotated[Path, typer.Argument(metavar="OUT", help="A converted checkpoint.", show_default=False)]
Folder = Annotated[
    str, typer.Argument(metavar="DIR", help="A checkpoint: local folder or Hub repository id.", show_default=False)
]

Quantized = Annotated[
    str,
    typer.Argument(metavar="SRC", help="A quantized checkpoint: folder or Hub id.", show_default=False),
]
Layout = Annotated[str, typer.Option("--format", metavar="|".join(LAYOUTS), help="Layout to write.")]
DType = Annotated[str, typer.Option("--dtype", metavar="bfloat16|float16|float32", help="Element type to write.")]

Bits = Annotated[
    int | None, typer.Option("--bits", metavar="4|8", help="Bits a weight. [default: 4]", rich_help_panel=_SCHEME)
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        help="Columns that share a scale; -1 = one scale a row (channel), 0 = one a tensor. [default: 128]",
        rich_help_panel=_SCHEME,
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="Without or with zero points. [default: what the format does best]",
        show_default=False,
        rich_help_panel=_SCHEME,
    ),
]
SchemeName = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        metavar="PRESET",
        help=f"Bits, width and symmetry at once: {', '.join(SCHEMES)}; `:g64`, `:channel` or `:tensor` may follow.",
        rich_help_panel=_SCHEME,
    ),
]
FormatName = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="|".join(("auto", *LAYOUTS)),
        help="Layout on disk. [default: auto]",
        rich_help_panel=_SCHEME,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        metavar="PATTERN",
        help="Module to leave alone: exact name, glob, or re:REGEX. Repeatable.",
        show_default=False,
        rich_help_panel=_RULES,
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="PATTERN=SCHEME",
        help="A scheme (or skip) for the modules that match; repeatable, later ones win.",
        show_default=False,
        rich_help_panel=_RULES,
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="Options and rules from a TOML file; those given here win.",
        show_default=False,
        rich_help_panel=_RULES,
    ),
]
WriteRecipe = Annotated[bool, typer.Option("--write-recipe", help="Print the options as a recipe and nothing else.")]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="|".join(PRESETS),
        help="; ".join(f"{name}: {text}" for name, (text, _) in PRESETS.items()) + ".",
        show_default=False,
        rich_help_panel=_RULES,
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel",
        metavar="N",
        help="Check every layer as an engine will shard it over N ranks. [default: 1]",
        rich_help_panel=_RULES,
    ),
]
OnIndivisible = Annotated[
    str | None,
    typer.Option(
        "--on-indivisible",
        metavar="error|skip|channel",
        help="Where the group size does not divide in_features. [default: error]",
        rich_help_panel=_RULES,
    ),
]
NanPolicy = Annotated[
    str | None,
    typer.Option(
        "--nan-policy",
        metavar="error|keep",
        help="A weight with NaN or Inf: refuse, or keep it as it is (reads the source twice). [default: error]",
        rich_help_panel=_RULES,
    ),
]
Requantize = Annotated[
    bool | None,
    typer.Option(
        "--requantize",
        help="Quantize once more, to as many bits or fewer, what SRC holds quantized; both errors add up.",
        show_default=False,
        rich_help_panel=_RULES,
    ),
]
Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict",
        help="Fail if a linear weight stays in high precision for a reason outside its family's table.",
        show_default=False,
        rich_help_panel=_RULES,
    ),
]
AllowIncomplete = Annotated[
    bool | None,
    typer.Option(
        "--allow-incomplete",
        help="Convert what is there of a source that lacks layers, embeddings or a head.",
        show_default=False,
        rich_help_panel=_RULES,
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size", metavar="SIZE", help="Largest output file. [default: 5GB]", rich_help_panel=_LIMITS
    ),
]
MemoryLimit = Annotated[
    str,
    typer.Option(
        "--memory-limit",
        metavar="SIZE",
        help="Most memory on top of Python with torch (about 260 MB).",
        rich_help_panel=_LIMITS,
    ),
]
Workers = Annotated[
    int, typer.Option("--workers", metavar="N", help="Threads; 0 = one a core.", rich_help_panel=_LIMITS)
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub repository.", show_default=False)
]
Subfolder = Annotated[
    str | None,
    typer.Option("--subfolder", metavar="DIR", help="The folder of SRC that holds the model.", show_default=False),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model", metavar="ID", help="Id for the model card, where SRC is a folder.", show_default=False
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT once the new one is complete.")
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard what an interrupted run has done; without it, the run continues.")
]
Explain = Annotated[
    bool, typer.Option("--explain", help="Each tensor: family, role, decision, and the rule that made it.")
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Check the result against SRC before it appears in OUT; exit code 6 if it fails."),
]
VerifySource = Annotated[
    str | None,
    typer.Option(
        "--source", metavar="SRC", help="What it was converted from: each value is compared.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Each tensor, and why.")]
