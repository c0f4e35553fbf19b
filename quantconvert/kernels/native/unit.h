/* A unit of work: rows of one weight, from the source's file to the result's in one call.
 *
 * The fields are those of `UnitFields` in quantconvert/kernels/native/unit.py, in the same order.
 */
#ifndef QUANTCONVERT_UNIT_H
#define QUANTCONVERT_UNIT_H

#include "native.h"

enum { CODES, ZEROS, SCALES, SINKS };
enum { QUANTIZED, ROUNDED, MEASURED }; /* rounded: `codes` takes the numbers, in `dtype` */

/* Where one of the result's tensors goes. A block has its row axis first, as `quantize` writes it; turned, it is stored
 * with that axis last, and gathered until the unit is done. */
typedef struct {
    int64_t fd;            /* negative: there is no such tensor */
    int64_t offset;        /* of the tensor in the file */
    int64_t nbytes;        /* of all of it */
    int64_t element;       /* bytes */
    int64_t width;         /* elements of a block's row */
    int64_t rows;          /* of the weight that make one of a block; 0: the block does not depend on rows */
    int64_t turned;
    uint8_t *block;        /* of a tile */
    uint8_t *slab;         /* turned, of the unit */
    uint64_t sum;          /* of the parts that were written, each with its offset in the tensor as the seed */
} Sink;

typedef struct {
    Call call;             /* of which this file sets what belongs to a tile */
    int64_t fd;            /* the source's */
    int64_t offset;        /* of the stored matrix [height, width] */
    int64_t height;
    int64_t width;
    int64_t start;         /* the weight's rows are start, start + step, ... of its rows, or of its columns */
    int64_t step;
    int64_t transposed;
    int64_t begin;         /* rows of the weight */
    int64_t end;
    int64_t tile_rows;
    int64_t mode;
    uint8_t *raw;          /* room for a tile as it is stored */
    uint8_t *strip;        /* transposed: room for the unit */
    double *noise;         /* of each tile; of one that is measured the lowest value */
    double *signal;        /* and the highest */
    Sink sinks[SINKS];
    int64_t error;         /* an errno; 0 where the source ended too early */
    int64_t where;         /* the sink that could not be written */
} Unit;

#endif
