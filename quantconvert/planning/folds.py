"""Which vectors are equalized: decided from decisions, as their groups count; factors are found when it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from quantconvert.checkpoint import Checkpoint, TensorRef
from quantconvert.errors import QuantConvertError, UnsupportedError
from quantconvert.factors import FACTORS, Driver, Factors, Recipe, VectorFile, Wanted, place_vectors
from quantconvert.families import Classifier, Family
from quantconvert.job import Job
from quantconvert.patterns import WEIGHT_SUFFIX, layer_of, template_of
from quantconvert.planning.decision import Decision
from quantconvert.planning.knowledge import Knowledge
from quantconvert.planning.presence import lacking
from quantconvert.schemes import Request
from quantconvert.sources.read import WHOLE
from quantconvert.sources.sites import Site, find_sites, with_steps

# Where nothing is asked for, equalized are vectors that a weight of so many bits reads.
AUTO_BITS = 4

# Tensors that a source lacks: by layer, and by what modules of their kind are called inside it.
Lacks = Mapping[tuple[str, str], str]


def without_factors(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint without the factors of the conversion that it is from, which say nothing of the next one."""
    rest = tuple(file for file in checkpoint.side_files if file.path != FACTORS)
    return checkpoint if len(rest) == len(checkpoint.side_files) else replace(checkpoint, side_files=rest)


def equalized(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    job: Job,
    classifier: Classifier,
    knowledge: Knowledge,
    errors: list[QuantConvertError],
) -> tuple[list[Decision], Factors | None, list[str]]:
    """The decisions with steps, the factors that these need, and what the user should know of it."""
    if (job.equalize is False and job.smooth is None) or job.rotate:
        return list(decisions), None, []
    reads = [d.ref for d in decisions]
    sites, notes = find_sites(reads, classifier.family, checkpoint)
    lacks = _lacks(lacking(reads, classifier, checkpoint.text_config) if sites and job.allow_incomplete else ())
    by_name = {d.ref.name: d for d in decisions}
    chosen: list[tuple[Site, tuple[Driver, ...], bool]] = []
    for site in sites:
        drivers = _drivers(site, by_name, bool(job.equalize) or job.smooth is not None)
        problem = (_problem(site, by_name, lacks) or _unknown(drivers, job, knowledge)) if drivers else None
        if problem:
            notes.append(f"`{site.name}` {problem}")
        elif drivers:
            giver = by_name[site.givers[0].name]
            chosen.append((site, drivers, site.fold.kind == "rows" and giver.request is None))
    if not chosen:
        return list(decisions), None, _nothing(job, decisions, classifier, notes, errors)
    file = VectorFile(tuple((site.name, site.width) for site, _, _ in chosen))
    wanted = tuple(
        _wanted(site, drivers, place, exact, job, knowledge)
        for (site, drivers, exact), place in zip(chosen, place_vectors(file, FACTORS), strict=True)
    )
    scaled = with_steps(reads, [(item.site, item.place) for item in wanted])
    changed = [Decision(read, *d[1:]) if read is not d.ref else d for d, read in zip(decisions, scaled, strict=True)]
    return changed, Factors(wanted, file), [f"not equalized: {_listed(notes)}"] if notes else []


def _wanted(
    site: Site, drivers: tuple[Driver, ...], place: TensorRef, exact: bool, job: Job, knowledge: Knowledge
) -> Wanted:
    """By SmoothQuant where that is asked for, else by the weights, and by importances where they are known."""
    modules = [driver.read.module for driver in drivers] if knowledge.modules else ()
    importances, maxima = knowledge.importances(modules), knowledge.maxima(modules)
    if job.smooth is not None:
        return Wanted(site, drivers, place, exact, "smooth", importances, maxima, job.smooth)
    recipe: Recipe = "combined" if importances else "weights"
    return Wanted(site, drivers, place, exact, recipe, importances)


def _drivers(site: Site, by_name: Mapping[str, Decision], asked: bool) -> tuple[Driver, ...]:
    """The readers that are quantized; none where none of them asks for it."""
    drivers = []
    for read in site.readers:
        request = by_name[read.name].request
        if request is not None:
            drivers.append(Driver(read, request.group_size))
            asked = asked or _is_automatic(request)
    return tuple(drivers) if asked else ()


def _is_automatic(request: Request | None) -> bool:
    """Whether what reads a vector is equalized where nobody said so."""
    return request is not None and request.num_bits == AUTO_BITS and request.type == "int"


def _problem(site: Site, by_name: Mapping[str, Decision], lacks: Lacks) -> str | None:
    """Why a site's tensors cannot take factors as they will be stored, all of those that should."""
    keys = ((layer_of(site.name) or "", template_of(reader)) for reader in site.fold.readers) if lacks else ()
    missing = next((lacks[key] for key in keys if key in lacks), None)
    if missing:
        return f"should be read by `{missing}`, which the source lacks"
    has_parts = False
    for read in (*site.givers, *site.readers):
        request = by_name[read.name].request
        if request is None:
            has_parts = has_parts or read.parts > 1 or read.view != WHOLE
        elif request.strategy == "tensor":
            return "has weights with one scale each"
    return "has weights that are kept as parts of a tensor" if has_parts else None


def _lacks(names: Iterable[str]) -> Lacks:
    found: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        layer = layer_of(name)
        if layer is not None and name.endswith(WEIGHT_SUFFIX):
            found.setdefault((layer, template_of(name.removesuffix(WEIGHT_SUFFIX)[len(layer) :])), name)
    return found


def _unknown(drivers: Sequence[Driver], job: Job, knowledge: Knowledge) -> str | None:
    """Why SmoothQuant has nothing to go by."""
    modules = [driver.read.module for driver in drivers]
    if job.smooth is None or knowledge.maxima(modules) or knowledge.importances(modules):
        return None
    return "is a vector of which --statistics say nothing" if job.statistics else "is not on the way of a bag of tokens"


def _nothing(
    job: Job,
    decisions: Sequence[Decision],
    classifier: Classifier,
    notes: Sequence[str],
    errors: list[QuantConvertError],
) -> list[str]:
    """The note, or where `--equalize` was asked for the refusal, that nothing is equalized."""
    family, asked = classifier.family, "--smooth" if job.smooth is not None else "--equalize"
    if not job.equalize and job.smooth is None and not any(_is_automatic(d.request) for d in decisions):
        return []
    why = _listed(notes) if notes else _why_no_sites(family, classifier.model_type)
    if job.equalize or job.smooth is not None:
        errors.append(UnsupportedError(f"{asked}: nothing can be: {why}", hint=f"drop {asked}"))
        return []
    return [f"nothing is equalized: {why}"]


def _why_no_sites(family: Family | None, model_type: str) -> str:
    if family is None:
        return "the family is not known"
    if not family.folds:
        return f"the table of {family.name} does not say who reads what in a layer of {model_type}"
    return f"no layer has what the table of {family.name} says of {model_type}"


def _listed(notes: Sequence[str]) -> str:
    """Clauses, the first few of them."""
    return "; ".join(notes[:3]) + (f"; and {len(notes) - 3} more" if len(notes) > 3 else "")
