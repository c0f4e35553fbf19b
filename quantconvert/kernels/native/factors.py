"""The factors of a vector by the C library, from the files of its weights to numbers. Needs no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt

from quantconvert.checkpoint.ranges import Files
from quantconvert.dtypes import DTYPES
from quantconvert.factors import Driver, Wanted
from quantconvert.factors.sampling import sample
from quantconvert.factors.wanted import PASSES, sampled_rows
from quantconvert.kernels.base import Unread
from quantconvert.kernels.native.fields import ELEMENTS, STORED, MeaningFields, Wrong
from quantconvert.kernels.native.library import Library, address_of
from quantconvert.kernels.native.template import pointer_to, read_meaning
from quantconvert.sources import Read
from quantconvert.sources.elements import is_elements
from quantconvert.sources.read import PLAIN
from quantconvert.sources.sites import Site
from quantconvert.sources.steps.scale import Heads

# What bounds factors, as factors.h calls it.
_FREE, _CALM_ROWS, _CALM_NORM = range(3)


class DriverFields(ctypes.Structure):
    """`Driver` of factors.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("fd", "offset", "height", "width", "start", "step", "transposed")),
        ("element", ctypes.c_int64),
        ("meaning", ctypes.POINTER(MeaningFields)),
        *((name, ctypes.c_int64) for name in ("rows", "group_size", "run", "runs")),
    )


class GiverFields(ctypes.Structure):
    """`Giver` of factors.h."""

    _fields_ = (("values", ctypes.c_void_p), ("dtype", ctypes.c_int64), ("plus", ctypes.c_int64))


class SiteFields(ctypes.Structure):
    """`Site` of factors.h."""

    _fields_ = (
        ("drivers", ctypes.POINTER(DriverFields)),
        ("num_drivers", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("repeat", ctypes.c_int64),
        ("passes", ctypes.c_int64),
        ("bound", ctypes.c_int64),
        ("exact", ctypes.c_int64),
        ("root", ctypes.c_double),
        ("givers", ctypes.POINTER(GiverFields)),
        ("num_givers", ctypes.c_int64),
        ("mu", ctypes.c_void_p),
        ("where", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class Equalizer:
    """Factors by what the weights say, for plain weights; for several threads at once."""

    library: Library
    level: int

    def takes(self, wanted: Wanted) -> bool:
        """Whether it finds these factors, from files on this machine."""
        if wanted.recipe != "weights" or len({driver.read.matrix[1] for driver in wanted.drivers}) != 1:
            return False
        weights = (driver.read for driver in wanted.drivers)
        return all(len(read.shape) == 2 and _is_stored(read) for read in weights) and all(
            map(_is_plain, vectors_of(wanted))
        )

    def factors(self, wanted: Wanted, files: Files) -> memoryview:
        """Float32, one a channel of the vector, as bytes. Raises `CheckpointError`, and `Unread` with the weight."""
        site = wanted.site
        found, vectors = memoryview(bytearray(4 * site.width)), vectors_of(wanted)
        chosen = list(sampled_rows(wanted))
        held = [read_meaning(driver.read, files) for driver, _ in chosen]
        drivers = [driver_fields(driver, rows, files) for driver, rows in chosen]
        for taken, (meaning, _) in zip(drivers, held, strict=True):
            taken.meaning = pointer_to(meaning)
        values = [read_stored(read, files, site) for read in vectors]
        givers = [
            GiverFields(address_of(stored), ELEMENTS[read.values.dtype], site.base(read))
            for read, stored in zip(vectors, values, strict=True)
        ]
        heads = site.heads or Heads(site.width, 1, 1)
        fields = SiteFields(
            drivers=(DriverFields * len(drivers))(*drivers),
            num_drivers=len(drivers),
            columns=heads.kv_width * heads.repeat,
            count=site.width,
            head_dim=heads.head_dim,
            repeat=heads.repeat,
            passes=PASSES,
            bound=_CALM_ROWS if site.fold.kind == "rows" else _CALM_NORM if vectors else _FREE,
            exact=wanted.exact,
            root=sqrt(site.width),
            givers=(GiverFields * len(givers))(*givers),
            num_givers=len(givers),
            mu=address_of(found),
        )
        wrong = self.library.factors(fields, self.level)
        if Wrong.UNREAD in wrong:
            raise Unread(wanted.drivers[fields.where].read)
        if wrong:
            raise MemoryError
        return found


def vectors_of(wanted: Wanted) -> Sequence[Read]:
    """What takes the factors and stays in its own dtype; what powers of two multiply does so anyway."""
    return () if wanted.exact else tuple(read for read in wanted.site.givers if len(read.shape) == 1)


def _is_plain(read: Read) -> bool:
    return read.encoding == PLAIN and not read.steps and read.values.dtype in ELEMENTS


def _is_stored(read: Read) -> bool:
    return is_elements(read) and not read.steps and read.values.dtype in STORED


def driver_fields(driver: Driver, count: int, files: Files) -> DriverFields:
    """A weight, of which `count` rows are looked at."""
    read, ref, view = driver.read, driver.read.values, driver.read.view
    height, *rest = ref.shape[1:] if view.expert is not None else ref.shape
    width, nbytes = prod(rest), DTYPES[ref.dtype].bits // 8
    rows = sample(read, count)
    return DriverFields(
        fd=files.fd(ref.file),
        offset=ref.offset + (view.expert or 0) * height * width * nbytes,
        height=height,
        width=width,
        start=view.start,
        step=view.step,
        transposed=view.transposed,
        element=STORED[ref.dtype],
        rows=rows.rows,
        group_size=driver.group_size or read.matrix[1],
        run=rows.run,
        runs=rows.runs,
    )


def read_stored(read: Read, files: Files, site: Site) -> memoryview:
    """The part of a vector that takes the factors, as it is stored; of its own or shared with others."""
    ref, view, width = read.values, read.view, read.values.shape[-1]
    nbytes = DTYPES[ref.dtype].bits // 8
    raw = memoryview(bytearray(width * nbytes))
    files.read_into(ref.file, raw, ref.offset + (view.expert or 0) * width * nbytes)
    part = raw.cast("H" if nbytes == 2 else "I")[view.start :: view.step][site.start : site.start + site.width]
    return memoryview(bytearray(part.tobytes()))
