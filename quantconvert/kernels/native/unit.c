/* Reads, quantizes, packs and writes the rows of a unit. Compiled once for each instruction set, as LEVEL. */
#include "unit.h"
#include "io.h"
#include "row.h"
#include "turn.h"

#include <stdlib.h>
#include <string.h>

enum { PART = 1 << 20 };

int NAMED(quantize_, LEVEL)(Call *call);
int NAMED(measure_, LEVEL)(Call *call, double *low, double *high);

static int unread(Unit *unit, int error) {
    unit->error = error < 0 ? 0 : error;
    return UNREAD;
}

/* The columns of a transposed matrix that are the unit's rows, [height, those columns and what lies between]. */
static int read_strip(Unit *unit) {
    const int64_t element = nbytes_of(unit->call.element);
    const int64_t part = ((unit->end - unit->begin - 1) * unit->step + 1) * element;
    const int64_t left = (unit->start + unit->begin * unit->step) * element;
    for (int64_t i = 0; i < unit->height; i++) {
        int64_t place = unit->offset + i * unit->width * element + left;
        int error = read_all(unit->fd, unit->strip + i * part, part, place);
        if (error)
            return unread(unit, error);
    }
    return 0;
}

/* A tile's rows as they are stored. */
static int read_tile(Unit *unit, int64_t first, int64_t rows, Call *call) {
    const int64_t element = nbytes_of(call->element), row = unit->width * element;
    call->weights = unit->raw;
    if (unit->transposed) {
        const int64_t stride = (unit->end - unit->begin - 1) * unit->step + 1;
        const uint8_t *from = unit->strip + (first - unit->begin) * unit->step * element;
        call->stride = unit->height;
        turn(from, element, unit->height, rows, stride, unit->step, unit->raw, unit->height);
        return 0;
    }
    call->stride = unit->width * unit->step;
    int64_t top = unit->start + first * unit->step, count = (rows - 1) * unit->step + 1;
    int error = read_all(unit->fd, unit->raw, count * row, unit->offset + top * row);
    return error ? unread(unit, error) : 0;
}

/* Writes a part of a tensor and adds it to the tensor's sum, where it is one of the journal's parts. */
static int put(Unit *unit, int k, const uint8_t *bytes, int64_t nbytes, int64_t offset, int summed) {
    Sink *sink = unit->sinks + k;
    unit->error = write_all(sink->fd, bytes, nbytes, sink->offset + offset);
    if (unit->error) {
        unit->where = k;
        return UNWRITTEN;
    }
    if (summed)
        sink->sum += xxh64(bytes, nbytes, (uint64_t)offset);
    return 0;
}

/* A block that a tile's rows made: into the file, or turned into the slab. */
static int place(Unit *unit, int k, int64_t first, int64_t rows) {
    const Sink *sink = unit->sinks + k;
    if (sink->fd < 0 || (!sink->rows && first))
        return 0;
    if (!sink->rows)
        return put(unit, k, sink->block, sink->nbytes, 0, 1);
    const int64_t row = sink->width * sink->element, count = (rows + sink->rows - 1) / sink->rows;
    if (!sink->turned)
        return put(unit, k, sink->block, count * row, first / sink->rows * row, 1);
    const int64_t gathered = (unit->end - unit->begin + sink->rows - 1) / sink->rows;
    turn(sink->block, sink->element, count, sink->width, sink->width, 1,
         sink->slab + (first - unit->begin) / sink->rows * sink->element, gathered);
    return 0;
}

/* A slab: a part of each of the tensor's rows, or all of it. */
static int put_slab(Unit *unit, int k) {
    const Sink *sink = unit->sinks + k;
    if (sink->fd < 0 || !sink->turned)
        return 0;
    const int64_t part = (unit->end - unit->begin + sink->rows - 1) / sink->rows * sink->element;
    const int64_t row = sink->nbytes / sink->width, begin = unit->begin / sink->rows * sink->element;
    int wrong = 0;
    if (part == row)
        for (int64_t done = 0; done < sink->nbytes && !wrong; done += PART)
            wrong = put(unit, k, sink->slab + done, sink->nbytes - done < PART ? sink->nbytes - done : PART, done, 1);
    else
        for (int64_t i = 0; i < sink->width && !wrong; i++)
            wrong = put(unit, k, sink->slab + i * part, part, i * row + begin, 0);
    return wrong;
}

static int is_special(float value) { return (bits_of(value) & 0x7f800000) == 0x7f800000; }

/* Rows after their steps, in `dtype`; what that holds only as NaN or Inf is for others to judge. */
static int round_rows(Call *call) {
    float *values = malloc((size_t)call->columns * sizeof *values);
    int wrong = values ? 0 : NO_MEMORY;
    for (int64_t row = 0; row < call->rows && !wrong; row++) {
        uint8_t *out = call->codes.bytes + row * call->columns * nbytes_of(call->dtype);
        read_row(call, row, values);
        for (int64_t i = 0; i < call->columns; i++) {
            const float value = rounded(values[i], call->dtype);
            wrong |= is_special(values[i]) || is_special(value) ? NONFINITE : 0;
            store(value, call->dtype, out, i);
        }
    }
    free(values);
    return wrong;
}

/* A tile from its rows to its blocks. */
static int take_tile(Unit *unit, int64_t first, int64_t tile) {
    Call call = unit->call;
    call.rows = unit->end - first < unit->tile_rows ? unit->end - first : unit->tile_rows;
    call.first_row = first;
    call.codes.bytes = unit->sinks[CODES].block;
    call.zeros.bytes = unit->sinks[ZEROS].block;
    call.scales = unit->sinks[SCALES].block;
    int wrong = read_tile(unit, first, call.rows, &call);
    if (wrong)
        return wrong;
    if (unit->mode == MEASURED)
        return NAMED(measure_, LEVEL)(&call, &unit->noise[tile], &unit->signal[tile]);
    wrong = unit->mode == ROUNDED ? round_rows(&call) : NAMED(quantize_, LEVEL)(&call);
    unit->noise[tile] = call.noise;
    unit->signal[tile] = call.signal;
    for (int k = 0; k < SINKS && !wrong; k++)
        wrong = place(unit, k, first, call.rows);
    return wrong;
}

int NAMED(convert_, LEVEL)(Unit *unit) {
    int wrong = unit->transposed ? read_strip(unit) : 0;
    for (int64_t first = unit->begin, tile = 0; first < unit->end && !wrong; first += unit->tile_rows)
        wrong = take_tile(unit, first, tile++);
    for (int k = 0; k < SINKS && !wrong && unit->mode != MEASURED; k++)
        wrong = put_slab(unit, k);
    return wrong;
}
