"""A weight from file to file: the call that reads, quantizes, packs and writes a unit of rows. Needs no torch."""

from __future__ import annotations

import array
from collections.abc import Mapping

from quantconvert.checkpoint.ranges import Files
from quantconvert.dtypes import DTYPES
from quantconvert.kernels.base import Place, Unread, Unwritten, Way, Written
from quantconvert.kernels.native.fields import MEASURED, QUANTIZED, ROUNDED, SinkFields, UnitFields, Wrong
from quantconvert.kernels.native.library import Library, address_of
from quantconvert.kernels.native.template import call_of, plain_call_of, read_steps
from quantconvert.layouts import TensorSpec
from quantconvert.methods import NonFinite, ScaleOverflow
from quantconvert.spans import spans

_LINE = 64


class Conversion:
    """One weight's `Direct`."""

    def __init__(self, library: Library, level: int, way: Way, files: Files, places: Mapping[str, Place]) -> None:
        self.library, self.level, self.way = library, level, way
        source = way.source
        fd = files.fd(source.values.file)
        assert fd is not None, "the caller has seen that the file is here"
        steps = read_steps(source, files)
        if way.scheme is None or way.layout is None:
            call = plain_call_of(source, way.specs[0].dtype, steps)
            suffixes: tuple[str | None, ...] = (way.specs[0].suffix, None, None)
        else:
            packing = way.layout.packing(way.scheme)
            assert packing is not None
            call = call_of(source, source.values.dtype, way.scheme, way.layout, packing, steps)
            suffixes = (packing.codes.suffix, packing.zeros.suffix if packing.zeros else None, way.layout.scale_suffix)
        self.suffixes = suffixes
        view, shape = source.view, source.values.shape
        inner = shape[1:] if view.expert is not None else shape
        height = inner[0] if len(inner) > 1 and len(source.shape) == 2 else 1
        width = source.values.num_elements // max(1, height * (shape[0] if view.expert is not None else 1))
        self.element = DTYPES[source.values.dtype].bits // 8
        specs = {spec.suffix: spec for spec in way.specs}
        sinks = [self._sink(specs[name], places[name]) if name is not None else SinkFields(fd=-1) for name in suffixes]
        self.fields = UnitFields(
            call=call,
            fd=fd,
            offset=source.values.offset + (view.expert or 0) * height * width * self.element,
            height=height,
            width=width,
            start=view.start,
            step=view.step,
            transposed=view.transposed,
            tile_rows=way.tile_rows,
            mode=QUANTIZED if way.scheme else ROUNDED,
            sinks=(SinkFields * 3)(*sinks),
        )
        self._held = (steps, self._span() if way.scheme is not None and way.scheme.strategy == "tensor" else None)

    def _sink(self, spec: TensorSpec, place: Place) -> SinkFields:
        element = DTYPES[spec.dtype].bits // 8
        width = spec.nbytes // element
        if spec.rows_per_element:
            rows = -(-self.way.source.matrix[0] // spec.rows_per_element)
            width = width // rows
        return SinkFields(
            fd=place.fd, offset=place.offset, nbytes=spec.nbytes, element=element, width=width,
            rows=spec.rows_per_element, turned=spec.transposed,
        )  # fmt: skip

    def _span(self) -> array.array[float]:
        """The lowest and the highest value of the weight, of which all shares a scale, found unit by unit."""
        low = high = 0.0
        self.fields.mode = MEASURED
        for begin, end in spans(0, self.way.source.matrix[0], 16 * self.way.tile_rows):
            found = self.convert(begin, end, memoryview(bytearray(self.nbytes(begin, end))))
            low, high = min(low, *found.noise), max(high, *found.signal)
        self.fields.mode = QUANTIZED
        span = array.array("f", (low, high))
        self.fields.call.span = span.buffer_info()[0]
        return span

    def _parts(self, begin: int, end: int) -> list[int]:
        """Bytes of a tile and of a strip as they are stored, and of each tensor's block and slab."""
        fields, tile = self.fields, min(self.way.tile_rows, end - begin)
        columns = fields.call.columns
        raw = tile * columns if fields.transposed else ((tile - 1) * fields.step + 1) * fields.width
        strip = ((end - begin - 1) * fields.step + 1) * fields.height if fields.transposed else 0
        found = [raw * self.element, strip * self.element]
        for sink in fields.sinks:
            row, rows = sink.width * sink.element, sink.rows or 1
            there = sink.fd >= 0
            found.append(-(-tile // rows) * row * there)
            found.append(-(-(end - begin) // rows) * row * bool(sink.turned and there))
        return found

    def nbytes(self, begin: int, end: int) -> int:
        return sum(_aligned(part) for part in self._parts(begin, end)) + _LINE

    def _room(self, begin: int, end: int, buffer: memoryview) -> UnitFields:
        """The fields of a call for rows begin..end."""
        unit = UnitFields.from_buffer_copy(self.fields)
        unit.begin, unit.end = begin, end
        place = _aligned(address_of(buffer))
        places = []
        for part in self._parts(begin, end):
            places.append(place)
            place += _aligned(part)
        unit.raw, unit.strip = places[:2]
        for sink, block, slab in zip(unit.sinks, places[2::2], places[3::2], strict=True):
            sink.block, sink.slab = block, slab
        return unit

    def convert(self, begin: int, end: int, buffer: memoryview) -> Written:
        tiles = len(range(begin, end, self.way.tile_rows))
        noise, signal = array.array("d", bytes(8 * tiles)), array.array("d", bytes(8 * tiles))
        unit = self._room(begin, end, buffer)
        unit.noise, unit.signal = noise.buffer_info()[0], signal.buffer_info()[0]
        wrong = self.library.convert(unit, self.level)
        if wrong:
            self._raise(wrong, unit)
        sums = {name: sink.sum for name, sink in zip(self.suffixes, unit.sinks, strict=True) if name is not None}
        return Written(sums, noise, signal)

    def _raise(self, wrong: Wrong, unit: UnitFields) -> None:
        if Wrong.UNWRITTEN in wrong:
            raise Unwritten(unit.error, self.suffixes[unit.where])
        raise_wrong(wrong)


def raise_wrong(wrong: Wrong) -> None:
    """The exception for what went wrong while reading and quantizing."""
    if Wrong.UNREAD in wrong:
        raise Unread
    if Wrong.NO_MEMORY in wrong:
        raise MemoryError
    raise NonFinite if Wrong.NONFINITE in wrong else ScaleOverflow


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE
