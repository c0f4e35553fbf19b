"""What each method costs a model's accuracy: extra nll and KL to the model as stored, with standard errors.

    python benchmarks/accuracy.py [MODEL ...] [--text FILE] [--calibration FILE] [--only ROW] [--json FILE]

MODEL is a folder with a decoder that transformers loads (default: the two in `examples/`). The text (default:
`examples/heldout.txt`) is cut into windows of `--context` tokens by the model's own tokenizer. A row of `ROWS` is
converted by the library, turned into plain float32 weights by `quantconvert.dequantize`, and compared with the stored
model, both in float32 arithmetic. Where the scheme quantizes activations, the inputs of those layers are rounded as
engines round them. Needs the extra `engines`.

    extra nll   mean over tokens of log p(token) - log q(token), nats; p: the model as stored, q: quantized
    KL          mean over tokens of sum over the vocabulary of p (log p - log q), nats
    of RTN      the row's KL over that of `BASELINE`

Standard errors are over windows, those of the ratio over pairs of them. A row that this version of quantconvert or this
model cannot have is named below the table, with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import quantconvert
from quantconvert.errors import QuantConvertError
from quantconvert.planning import Plan

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODELS = (EXAMPLES / "tiny-llama", EXAMPLES / "outlier-llama")
GROUP, NARROW = 128, 64  # columns that share a scale, and where the first does not divide
NEEDS = {None: "no", "self": "text it writes itself", "text": "text"}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: options of `quantconvert.convert`, and the `statistics` that it is given, if any: of text
    that the model writes itself, or of the file that `--calibration` names.
    """

    name: str
    options: Mapping[str, Any]
    statistics: Literal["self", "text"] | None = None


BASELINE = Row("int4 asymmetric, RTN", {"scheme": "W4A16_ASYM", "equalize": False})
ROWS = (
    BASELINE,
    Row("defaults", {"bits": 4}),
    Row("int8 per channel, RTN", {"scheme": "W8A16:channel", "equalize": False}),
    Row("int4 symmetric, RTN", {"scheme": "W4A16", "equalize": False}),
    Row("int4 asymmetric g64, RTN", {"scheme": "W4A16_ASYM:g64", "equalize": False}),
    Row("int4 asymmetric g32, RTN", {"scheme": "W4A16_ASYM:g32", "equalize": False}),
    Row("int4 asymmetric, equalize", {"scheme": "W4A16_ASYM", "equalize": True}),
    Row("int4 symmetric, equalize", {"scheme": "W4A16", "equalize": True}),
    Row("int4 asymmetric g64, equalize", {"scheme": "W4A16_ASYM:g64", "equalize": True}),
    Row("int4 asymmetric g32, equalize", {"scheme": "W4A16_ASYM:g32", "equalize": True}),
    Row(
        "int4 asymmetric, equalize, q/k/v int8",
        {"scheme": "W4A16_ASYM", "equalize": True, "rules": [r"re:.*\.[qkv]_proj$=W8A16_ASYM"]},
    ),
    *(
        Row(f"target {bits} bits, {how}", {"target_bits": bits, "symmetric": how != "asymmetric", "equalize": False})
        for bits in (4.5, 5)
        for how in ("symmetric", "asymmetric")
    ),
    Row("int4 asymmetric, search", {"scheme": "W4A16_ASYM", "equalize": False, "method": "search"}),
    Row("int4 asymmetric, equalize, search", {"scheme": "W4A16_ASYM", "equalize": True, "method": "search"}),
    Row("int4 symmetric, equalize, search", {"scheme": "W4A16", "equalize": True, "method": "search"}),
    Row(
        "int4 asymmetric, equalize, search, own text",
        {"scheme": "W4A16_ASYM", "equalize": True, "method": "search"},
        "self",
    ),
    Row(
        "int4 asymmetric, equalize, GPTQ, own text",
        {"scheme": "W4A16_ASYM", "equalize": True, "method": "gptq"},
        "self",
    ),
    Row("int4 asymmetric, equalize, GPTQ, text", {"scheme": "W4A16_ASYM", "equalize": True, "method": "gptq"}, "text"),
    Row("int4 asymmetric, rotate r1,r2", {"scheme": "W4A16_ASYM", "equalize": False, "rotate": "r1,r2"}),
    Row("W8A8, RTN", {"scheme": "W8A8", "equalize": False}),
    Row("W8A8, equalize", {"scheme": "W8A8", "equalize": True}),
    Row("W8A8, rotate r1", {"scheme": "W8A8", "equalize": False, "rotate": "r1"}),
    Row("W8A8, rotate r1,r2", {"scheme": "W8A8", "equalize": False, "rotate": "r1,r2"}),
    Row("W8A8, smooth", {"scheme": "W8A8", "equalize": False, "smooth": 0.5}),
    Row("W8A8, smooth, own text", {"scheme": "W8A8", "equalize": False, "smooth": 0.5}, "self"),
    Row("W8A8 static, own text", {"scheme": "W8A8_STATIC", "equalize": False}, "self"),
    Row("W8A8 static, text", {"scheme": "W8A8_STATIC", "equalize": False}, "text"),
    Row("FP8_DYNAMIC", {"scheme": "FP8_DYNAMIC"}),
    Row("FP8_BLOCK", {"scheme": "FP8_BLOCK"}),
    Row("NVFP4A16, RTN", {"scheme": "NVFP4A16", "method": "rtn"}),
    Row("NVFP4A16, four over six", {"scheme": "NVFP4A16"}),
    Row("MXFP4A16", {"scheme": "MXFP4A16"}),
    Row("W4AFP8, equalize", {"scheme": "W4AFP8", "equalize": True}),
    Row("MLX int4 g64, equalize", {"format": "mlx", "group_size": 64, "equalize": True}),
    Row("W4A8, RTN", {"scheme": "W4A8", "equalize": False}),
    Row("W4A8, equalize", {"scheme": "W4A8", "equalize": True}),
)


class NotMeasured(Exception):
    """Why a row has no figures."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over the tokens of each window, nats: float64 [N]."""

    kl_N: Tensor
    extra_nll_N: Tensor
    bits_per_weight: float = math.nan

    def ratio(self, base: Scores) -> tuple[float, float]:
        """KL over that of `base`, and its standard error (delta method, windows in pairs)."""
        ratio = float(self.kl_N.mean() / base.kl_N.mean())
        return ratio, mean_and_error(self.kl_N - ratio * base.kl_N)[1] / float(base.kl_N.mean())


def mean_and_error(x_N: Tensor) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(x_N.mean()), float(x_N.std() / math.sqrt(len(x_N)))


class Reference:
    """A model as it is stored, and the windows of text that others are compared on.

    ids_NT: token ids, each window after the start token where the tokenizer gives one. Log probabilities are kept where
    they take less than `KEPT` bytes together, else computed anew for every comparison.
    """

    KEPT = 2_000_000_000
    BATCH = 50_000_000  # elements of logits

    def __init__(self, folder: Path, text: str, context: int, windows: int, device: str) -> None:
        self.folder, self.device = folder, device
        self.ids_NT = cut(folder, text, context, windows)
        self.model = load(folder, device)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        self.batch = max(1, self.BATCH // (self.ids_NT.shape[1] * vocabulary))
        self._kept: list[Tensor] | None = [] if 4 * self.ids_NT.numel() * vocabulary <= self.KEPT else None

    def nll(self) -> tuple[float, float]:
        """Mean nll of the text in the model as it is stored, nats a token, and its standard error."""
        found = [-chosen(log_p, ids).mean(1).double() for ids, log_p in self._batches()]
        return mean_and_error(torch.cat(found).cpu())

    def compare(self, model: Any) -> Scores:
        """What another model of the same tokens loses."""
        kl, extra = [], []
        for ids_NT, p_NTV in self._batches():
            q_NTV = log_probabilities(model, ids_NT)
            extra.append((chosen(p_NTV, ids_NT) - chosen(q_NTV, ids_NT)).mean(1).double())
            kl.append((p_NTV.exp() * (p_NTV - q_NTV)).sum(-1).mean(1).double())
        return Scores(torch.cat(kl).cpu(), torch.cat(extra).cpu())

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = [ids.to(self.device) for ids in torch.split(self.ids_NT, self.batch)]
        if self._kept is None:
            yield from ((ids, log_probabilities(self.model, ids)) for ids in batches)
            return
        if not self._kept:
            self._kept += [log_probabilities(self.model, ids) for ids in batches]
        yield from zip(batches, self._kept, strict=True)


@torch.no_grad()
def log_probabilities(model: Any, ids_NT: Tensor) -> Tensor:
    """Of every token but the first, given those before: float32 [N, T - 1, V]."""
    return torch.log_softmax(model(input_ids=ids_NT).logits[:, :-1].float(), dim=-1)


def chosen(log_p_NTV: Tensor, ids_NT: Tensor) -> Tensor:
    """The log probabilities of the tokens that are there: [N, T - 1]."""
    return log_p_NTV.gather(-1, ids_NT[:, 1:, None])[..., 0]


def cut(folder: Path, text: str, context: int, windows: int) -> Tensor:
    """Token ids [N, context], with the start token before each window [N, 1 + context] if the tokenizer puts one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    count = min(windows, len(ids) // context)
    if count < 2:
        sys.exit(f"{folder}: {len(ids)} tokens of text are less than two windows of {context}; give more by --text")
    ids_NT = ids[: count * context].view(count, context)
    start = tokenizer.bos_token_id
    if start is None or tokenizer("a").input_ids[0] != start:
        return ids_NT
    return torch.cat([torch.full((count, 1), start), ids_NT], dim=1)


def load(folder: Path, device: str) -> Any:
    """A decoder in float32; every weight that it has must be in the folder."""
    loader: Any = transformers.AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {key: sorted(found) for key, found in info.items() if found and key != "unexpected_keys"}
    if problems:
        raise NotMeasured(f"transformers does not load {folder}: {problems}")
    return model.eval().to(device)


def round_inputs(model: Any, plan: Plan, folder: Path) -> None:
    """Where the plan quantizes activations, round what a module reads: to int8, symmetric, one scale a token, largest
    magnitude / 127.5, or where the scheme is static the one that `folder` holds for it; to float8 with one scale
    a token, beside blocks one for each 128 columns of it, largest magnitude / 448.
    """
    for task in plan.quantized:
        if task.scheme is None or not task.scheme.activations:
            continue
        name = task.source.name.removesuffix(".weight")
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise NotMeasured(f"transformers has no module `{name}` whose inputs could be rounded") from None
        scale = read_tensor(folder, f"{name}.input_scale") if getattr(task.scheme, "static", False) else None
        kind = task.scheme.input_type or task.scheme.type
        width = task.scheme.block[1] if task.scheme.block else None
        module.register_forward_pre_hook(rounding(scale) if kind == "int" else rounding_to_float8(width))


def rounding(static: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that rounds a module's first input."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        scale = x.abs().amax(dim=-1, keepdim=True) / 127.5 if static is None else static.float().to(x.device)
        scale = torch.where(scale == 0, 1.0, scale)
        return (torch.clamp(torch.round(x / scale), -128, 127) * scale, *inputs[1:])

    return hook


def rounding_to_float8(width: int | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The same, to float8; width: columns of a token that share a scale, None: all."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        groups = x.view(*x.shape[:-1], -1, width or x.shape[-1])
        scale = groups.abs().amax(dim=-1, keepdim=True) / 448
        scale = torch.where(scale == 0, 1.0, scale)
        rounded = (groups / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale
        return (rounded.view(x.shape), *inputs[1:])

    return hook


def read_tensor(folder: Path, name: str) -> Tensor:
    """A tensor of a checkpoint, by name."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor: Tensor = file.get_tensor(name)
                return tensor
    raise NotMeasured(f"the result has no `{name}`")


class Rig:
    """Converts and compares for one model; statistics are made when a row first asks for them."""

    def __init__(self, reference: Reference, work: Path, calibration: Path | None) -> None:
        self.reference, self.work, self.calibration = reference, work, calibration
        self.source = reference.folder
        self._narrow = self._find_narrow()

    def measure(self, row: Row) -> Scores:
        """Raises `QuantConvertError` and `NotMeasured` where the row cannot be had."""
        options = self._options(row)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            out, plain = Path(folder) / "out", Path(folder) / "plain"
            plan = quantconvert.convert(self.source, out, **options).plan
            quantconvert.dequantize(out, plain, "float32")
            model = load(plain, self.reference.device)
            round_inputs(model, plan, out)
            scores = self.reference.compare(model)
        return Scores(scores.kl_N, scores.extra_nll_N, plan.bits_per_quantized_weight)

    def _options(self, row: Row) -> Any:
        options = dict(row.options)
        scheme = options.get("scheme", "W4A16_ASYM")
        if ":" not in scheme and scheme.startswith("W4"):
            rules = [f"{module}={scheme}:g{NARROW}" for module in self._narrow]
            options["rules"] = [*rules, *options.get("rules", ())]
        if row.statistics:
            options["statistics"] = str(self._observed(row.statistics, moments=options.get("method") == "gptq"))
        return options

    def _find_narrow(self) -> tuple[str, ...]:
        """The modules whose columns are no multiple of `GROUP`."""
        plan = quantconvert.plan(
            self.source, bits=4, group_size=GROUP, format="compressed-tensors", on_indivisible="channel", equalize=False
        )
        wide = [task for task in plan.quantized if task.scheme and task.scheme.strategy == "channel"]
        return tuple(task.source.name.removesuffix(".weight") for task in wide)

    def _observed(self, kind: str, moments: bool) -> Path:
        """The file of statistics of that kind, with products of channels where `moments` are needed."""
        path = self.work / f"{kind}{'-moments' if moments else ''}.safetensors"
        if not path.exists():
            if not hasattr(quantconvert, "observe"):
                raise NotMeasured("this version has no `observe`")
            if kind == "text" and self.calibration is None:
                raise NotMeasured("needs text other than what is measured on: give it by --calibration FILE")
            what = {"self_written": True} if kind == "self" else {"text": str(self.calibration)}
            quantconvert.observe(self.source, path, moments=moments, **what)
        return path


def with_error(value: float, error: float) -> str:
    """Both, to two digits of the error."""
    digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 4
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def table(rows: Mapping[str, Row], scores: Mapping[str, Scores]) -> str:
    """Markdown, a line a row that was measured."""
    lines = ["| method | needs data? | bits per weight | extra nll | KL | of RTN |", "|---|---|---|---|---|---|"]
    for name, found in scores.items():
        ratio = with_error(*found.ratio(scores[BASELINE.name])) if name != BASELINE.name else "1"
        cells = (
            name, NEEDS[rows[name].statistics], f"{found.bits_per_weight:.2f}",
            with_error(*mean_and_error(found.extra_nll_N)), with_error(*mean_and_error(found.kl_N)), ratio,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_json(rows: Mapping[str, Row], scores: Mapping[str, Scores]) -> dict[str, Any]:
    """The same figures, each with its standard error, by row."""
    return {
        name: {
            "needs": NEEDS[rows[name].statistics],
            "options": dict(rows[name].options),
            "bits_per_weight": found.bits_per_weight,
            "extra_nll": mean_and_error(found.extra_nll_N),
            "kl": mean_and_error(found.kl_N),
            "of_rtn": found.ratio(scores[BASELINE.name]),
        }
        for name, found in scores.items()
    }


def measure_model(folder: Path, rows: Sequence[Row], args: argparse.Namespace) -> dict[str, Any]:
    """Prints the table of one model; the same as JSON values."""
    reference = Reference(folder, args.text.read_text(), args.context, args.windows, args.device)
    nll = reference.nll()
    count, length = reference.ids_NT.shape
    print(
        f"\n## {folder.name}\n\n{count} windows of {length} tokens of {args.text.name}, float32 on {args.device}; ",
        end="",
    )
    print(f"as stored: {with_error(*nll)} nats a token\n", flush=True)
    scores: dict[str, Scores] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="quantconvert-accuracy-", dir=args.work) as work:
        rig = Rig(reference, Path(work), args.calibration)
        for row in rows:
            print(f"{folder.name}: {row.name}", file=sys.stderr, flush=True)
            try:
                scores[row.name] = rig.measure(row)
            except (QuantConvertError, NotMeasured) as error:
                if row is BASELINE:
                    raise
                left_out[row.name] = str(error).splitlines()[0]
    by_name = {row.name: row for row in rows}
    print(table(by_name, scores))
    if left_out:
        print("\nLeft out:\n")
    for name, reason in left_out.items():
        print(f"- {name}: {reason}")
    sys.stdout.flush()
    return {"nll": nll, "windows": count, "rows": as_json(by_name, scores), "left_out": left_out}


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="*", default=MODELS, metavar="MODEL", help="folder of a decoder")
    parser.add_argument("--text", type=Path, default=EXAMPLES / "heldout.txt", help="what is measured on")
    parser.add_argument("--calibration", type=Path, help="other text, for rows whose statistics need text")
    parser.add_argument("--context", type=int, default=256, help="tokens a window")
    parser.add_argument("--windows", type=int, default=256, help="windows at most")
    parser.add_argument("--only", action="append", metavar="ROW", help="name or glob of rows; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--device", default="cpu", help="where the models run")
    parser.add_argument("--work", type=Path, help="folder for temporary checkpoints")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure every row on every model."""
    args = parse(words)
    rows = [r for r in ROWS if r is BASELINE or not args.only or any(fnmatchcase(r.name, g) for g in args.only)]
    if args.only and rows == [BASELINE] and not any(fnmatchcase(BASELINE.name, glob) for glob in args.only):
        sys.exit(f"no row is named so; there are: {'; '.join(row.name for row in ROWS)}")
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = {str(folder): measure_model(folder, rows, args) for folder in args.models}
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
