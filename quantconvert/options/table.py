"""Every option of the command line, the library and recipes, declared once.

A new option is a line here. Where the library works with it, `quantconvert.job.Job` has a field of the same name (a
test compares the two); what only the command line knows stands in `words`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypedDict

from quantconvert.engines import ENGINES
from quantconvert.layouts import LAYOUTS
from quantconvert.methods import DEFAULT_METHOD, METHODS
from quantconvert.options.option import Option
from quantconvert.rules import PRESETS, Rule
from quantconvert.schemes import SCHEMES

SCHEME, RULES, LIMITS = "Scheme", "What stays in high precision", "Limits"

OnIndivisible = Literal["error", "skip", "channel"]
NanPolicy = Literal["error", "keep"]
PlainDType = Literal["bfloat16", "float16", "float32"]
Activations = Literal["int8"]
DEFAULT_DTYPE: PlainDType = "bfloat16"


class SourceOptions(TypedDict, total=False):
    """Where in the source the model is."""

    revision: Annotated[str | None, Option("Branch, tag or commit of a Hub repository.", metavar="REV")]
    subfolder: Annotated[str | None, Option("The folder inside the checkpoint that holds the model.", metavar="DIR")]


class OutputOptions(TypedDict, total=False):
    """What may be replaced."""

    overwrite: Annotated[bool, Option("Replace the checkpoint in OUT once the new one is complete.", default=False)]


class StreamingOptions(TypedDict, total=False):
    """How a source that is not on this machine comes."""

    stream: Annotated[
        bool | None,
        Option("Fetch ranges of SRC as they are needed, so that it is never whole on the disk.", negative="--no-stream",
               negative_help="Download SRC into the cache first.", shown="where there is no room for SRC, or no OUT",
               panel=LIMITS),
    ]  # fmt: skip
    disk_limit: Annotated[
        int | str | None,
        Option("Most room on the disk, for the result and what comes of SRC.", metavar="SIZE",
               shown="80 % of what is free, where SRC comes by ranges", panel=LIMITS),
    ]  # fmt: skip


class RunOptions(OutputOptions, StreamingOptions, total=False):
    """How a conversion is carried out."""

    restart: Annotated[
        bool, Option("Discard what an interrupted run has done; without it, the run continues.", default=False)
    ]
    verify: Annotated[
        bool,
        Option("Check the result against SRC before it appears in OUT; exit code 6 if it fails.", default=False),
    ]


class PartOptions(TypedDict, total=False):
    """Which part of a conversion is one process's."""

    shards: Annotated[
        str | None,
        Option("Make the K-th of N parts of the files alone, while other processes, on other machines too, make the "
               "rest; `finish OUT`, or the same command without it, ends it.", metavar="K/N", panel=LIMITS),
    ]  # fmt: skip


class LimitOptions(TypedDict, total=False):
    """What may change the speed, never a byte."""

    memory_limit: Annotated[
        int | str,
        Option("Most memory on top of Python with torch (about 260 MB).", metavar="SIZE", default=2_000_000_000,
               shown="2GB", panel=LIMITS),
    ]  # fmt: skip
    workers: Annotated[
        int, Option("Threads; 0 = one a core, at most 8.", metavar="N", default=0, panel=LIMITS, least=0)
    ]
    executor: Annotated[
        str,
        Option("Who carries out tasks: threads here, or a Ray cluster that shares OUT.", metavar="threads|ray",
               default="threads", panel=LIMITS, suggest=lambda: ("threads", "ray")),
    ]  # fmt: skip


class StreamOptions(LimitOptions, total=False):
    """Keyword arguments of everything that writes a checkpoint."""

    max_shard_size: Annotated[
        int | str,
        Option("Largest output file.", metavar="SIZE", default=5_000_000_000, shown="5GB", panel=LIMITS, changes=True,
               in_recipe=True),
    ]  # fmt: skip
    base_model: Annotated[
        str | None,
        Option("Id for the model card, where SRC is a folder.", metavar="ID", changes=True, in_recipe=True),
    ]
    allow_incomplete: Annotated[
        bool,
        Option("Convert what is there of a source that lacks layers, embeddings or a head.", default=False,
               panel=RULES, in_recipe=True),
    ]  # fmt: skip
    allow_kept_experts: Annotated[
        bool,
        Option("Leave fused experts that no table knows in high precision; refused without.", default=False,
               panel=RULES, in_recipe=True),
    ]  # fmt: skip


class JobOptions(StreamOptions, total=False):
    """What to write, as keyword arguments of `quantconvert.plan` and `quantconvert.convert`; each is optional.

    A `scheme` sets bits, group_size and symmetric at once. `symmetric` None means what the format does best.
    """

    bits: Annotated[
        int | None,
        Option("Bits a weight.", metavar="4|8", shown="4", panel=SCHEME, in_recipe=True, suggest=lambda: ("4", "8")),
    ]
    group_size: Annotated[
        int | None,
        Option("Columns that share a scale; -1 = one scale a row (channel), 0 = one a tensor.", metavar="N",
               shown="128", panel=SCHEME, in_recipe=True, suggest=lambda: ("32", "64", "128", "-1")),
    ]  # fmt: skip
    symmetric: Annotated[
        bool | None,
        Option("Without zero points.", negative="--asymmetric", negative_help="With zero points.",
               shown="what the format does best", panel=SCHEME, in_recipe=True),
    ]  # fmt: skip
    scheme: Annotated[
        str | None,
        Option(f"Bits, width and symmetry at once: {', '.join(SCHEMES)}; `:g64`, `:channel` or `:tensor` may follow.",
               metavar="NAME", panel=SCHEME, in_recipe=True, suggest=lambda: SCHEMES),
    ]  # fmt: skip
    format: Annotated[
        str,
        Option("Layout on disk.", metavar="|".join(("auto", *LAYOUTS)), default="auto", panel=SCHEME, changes=True,
               in_recipe=True, suggest=lambda: ("auto", *LAYOUTS)),
    ]  # fmt: skip
    engines: Annotated[
        Sequence[str],
        Option("An engine that has to load the result; chooses the format; repeatable.", flags=("--engine",),
               metavar="|".join(ENGINES), default=(), shown="all", panel=SCHEME, in_card=True, in_recipe=True,
               suggest=lambda: ENGINES, item=lambda name: ENGINES.find(name).name),
    ]  # fmt: skip
    method: Annotated[
        str,
        Option("How codes are found.", metavar="|".join(METHODS), default=DEFAULT_METHOD, panel=SCHEME, changes=True,
               in_recipe=True, suggest=lambda: METHODS),
    ]  # fmt: skip
    equalize: Annotated[
        bool | None,
        Option("Bring the columns that share a scale to a like loudness first, exactly undone by the layer before.",
               negative="--no-equalize", negative_help="Leave columns as they are.", shown="where int4 is written",
               panel=SCHEME, changes=True, in_recipe=True),
    ]  # fmt: skip
    smooth: Annotated[
        float | None,
        Option("SmoothQuant instead of equalizing: columns by what their inputs reach, to the power of ALPHA. From "
               "--statistics, else from a bag of tokens.", metavar="ALPHA", most=1, panel=SCHEME, changes=True,
               in_recipe=True),
    ]  # fmt: skip
    steps: Annotated[
        Sequence[str],
        Option("What is done to weights before; repeatable.", flags=("--step",), metavar="NAME", default=(),
               hidden=True, changes=True, in_recipe=True),
    ]  # fmt: skip
    statistics: Annotated[
        str | None,
        Option("What `quantconvert observe` has written of this model's inputs; W8A8_STATIC needs it.", metavar="FILE",
               panel=SCHEME, changes=True, in_recipe=True, is_file=True),
    ]  # fmt: skip
    rotate: Annotated[
        Literal["r1", "r2", "r1,r2"] | None,
        Option("Turn the residual stream (r1), attention's values (r2) by Hadamard matrices: halves the loss of W8A8, "
               "costs at int4 by groups. A tied head becomes a tensor of its own.", panel=SCHEME, changes=True,
               in_recipe=True),
    ]  # fmt: skip
    ignore: Annotated[
        Sequence[str],
        Option("Module to leave alone: exact name, glob, or re:REGEX. Repeatable.", metavar="PATTERN", default=(),
               panel=RULES, changes=True, in_recipe=True),
    ]  # fmt: skip
    rules: Annotated[
        Sequence[Rule | str],
        Option("A scheme (or skip) for the modules that match; repeatable, later ones win.", flags=("--rule",),
               metavar="PATTERN=SCHEME", default=(), panel=RULES, changes=True, in_recipe=True, item=Rule.parse,
               kind=Rule),
    ]  # fmt: skip
    preset: Annotated[
        str | None,
        Option("; ".join(f"{name}: {text}" for name, (text, _) in PRESETS.items()) + ".",
               metavar="|".join(PRESETS), panel=RULES, changes=True, in_recipe=True, suggest=lambda: PRESETS),
    ]  # fmt: skip
    target_bits: Annotated[
        float | None,
        Option("Raise layers from 4 bits to 8 until a quantized weight takes so many bits, scales included; reads the "
               "weights before planning.", metavar="BITS", panel=RULES, changes=True, in_recipe=True),
    ]  # fmt: skip
    tensor_parallel: Annotated[
        int,
        Option("Check every layer as an engine will shard it over N ranks.", metavar="N", default=1, panel=RULES,
               least=1, changes=True, in_recipe=True),
    ]  # fmt: skip
    on_indivisible: Annotated[
        OnIndivisible,
        Option("Where the group size does not divide in_features.", default="error", panel=RULES, changes=True,
               in_recipe=True),
    ]  # fmt: skip
    nan_policy: Annotated[
        NanPolicy,
        Option("A weight with NaN or Inf: refuse, or keep it as it is (reads the source twice).", default="error",
               panel=RULES, changes=True, in_recipe=True),
    ]  # fmt: skip
    requantize: Annotated[
        bool,
        Option("Quantize once more, to as many bits or fewer, what SRC holds quantized; both errors add up.",
               default=False, panel=RULES, in_recipe=True),
    ]  # fmt: skip
    strict: Annotated[
        bool,
        Option("Fail if a linear weight stays in high precision for a reason outside its family's table.",
               default=False, panel=RULES, in_recipe=True),
    ]  # fmt: skip


class PlanOptions(JobOptions, SourceOptions, OutputOptions, StreamingOptions, total=False):
    """Keyword arguments of `quantconvert.plan`."""


class RankOptions(JobOptions, SourceOptions, total=False):
    """Keyword arguments of `quantconvert.iter_quantized`."""


class ConvertOptions(JobOptions, SourceOptions, RunOptions, PartOptions, total=False):
    """Keyword arguments of `quantconvert.convert` and `convert_pipeline`."""

    components: Annotated[
        Sequence[str],
        Option("A folder of a pipeline that is converted, whatever loads it; repeatable.", flags=("--component",),
               metavar="DIR", default=(), shown="text encoders that a table knows"),
    ]  # fmt: skip


class FinishOptions(RunOptions, LimitOptions, total=False):
    """Keyword arguments of `quantconvert.finish`."""


class TranscodeOptions(StreamOptions, SourceOptions, RunOptions, total=False):
    """Keyword arguments of `quantconvert.repack` and `quantconvert.dequantize`."""


class VerifyOptions(SourceOptions, LimitOptions, StreamingOptions, total=False):
    """Keyword arguments of `quantconvert.verify`."""

    require_report: Annotated[bool, Option("A missing quantconvert.json is a finding.", default=False)]
    attest: Annotated[
        str | None,
        Option("With --source: write what was shown as an in-toto statement, to be signed.", metavar="FILE"),
    ]
    method: Annotated[
        str | None,
        Option("How codes were found, where no quantconvert.json says it.", metavar="|".join(METHODS),
               suggest=lambda: METHODS),
    ]  # fmt: skip


class HubOptions(TypedDict, total=False):
    """How a result is shown on the Hub."""

    private: Annotated[bool, Option("A new repository is private.", default=False)]
    branch: Annotated[str, Option("The branch that shows the result.", metavar="NAME", default="main")]
    create_pr: Annotated[bool, Option("A pull request to the branch, and no commit to it.", default=False)]


class PushOptions(HubOptions, LimitOptions, total=False):
    """Keyword arguments of `quantconvert.push`."""


class ShipOptions(ConvertOptions, HubOptions, total=False):
    """Keyword arguments of `quantconvert.convert_to_hub`."""


class CheckOptions(SourceOptions, total=False):
    """Keyword arguments of `quantconvert.check`."""

    text: Annotated[
        str | None, Option("Text that both read (UTF-8).", metavar="FILE", shown="a built-in one of 1,000 words")
    ]
    tokens: Annotated[int, Option("How many tokens they see at most.", metavar="N", default=2048, least=2)]
    max_kl: Annotated[
        float | None,
        Option("Exit code 6 where the result is farther from its source: KL divergence in nats a token; of embeddings "
               "1 - cosine.", metavar="NATS"),
    ]  # fmt: skip


class ReportOptions(TypedDict, total=False):
    """Keyword arguments of `quantconvert.report`."""

    html: Annotated[str | None, Option("Write a page that needs nothing else.", metavar="FILE")]
    svg: Annotated[str | None, Option("Write the map of layers and modules.", metavar="FILE")]
    against: Annotated[str | None, Option("Another result, to compare with.", metavar="OTHER")]
    overwrite: Annotated[bool, Option("Replace files that are there.", default=False)]


class ObserveOptions(SourceOptions, total=False):
    """Keyword arguments of `quantconvert.observe`."""

    text: Annotated[
        str | None, Option("Text that the model reads, of the kind that it is used for (UTF-8).", metavar="FILE")
    ]
    self_written: Annotated[
        bool,
        Option("Text that the model writes itself from its start token, at temperature 1; no data.", flags=("--self",),
               default=False),
    ]  # fmt: skip
    tokens: Annotated[int, Option("How many tokens it sees.", metavar="N", default=16384, least=1)]
    moments: Annotated[bool, Option("Store E[x x^T] of each input too, width x width numbers.", default=False)]
    seed: Annotated[int, Option("Of the text that the model writes.", metavar="N", default=0, least=0)]
    overwrite: Annotated[bool, Option("Replace STATS once the new file is complete.", default=False)]
