/* The factors of one vector, from rows of the weights that read it: `equalize` and what follows it in
 * quantconvert/factors/recipe.py, to the bit.
 *
 * The fields are those of `DriverFields`, `GiverFields` and `SiteFields` in quantconvert/kernels/native/factors.py.
 */
#ifndef QUANTCONVERT_FACTORS_H
#define QUANTCONVERT_FACTORS_H

#include "native.h"

enum { FREE, CALM_ROWS, CALM_NORM }; /* what bounds factors: nothing, `calm_rows` or `calm_norm` */

/* A weight whose columns decide, as it is stored, and the runs of its rows that are looked at. */
typedef struct {
    int64_t fd;
    int64_t offset;     /* of the stored matrix [height, width] */
    int64_t height;
    int64_t width;
    int64_t start;      /* the weight's rows are start, start + step, ... of its rows, or of its columns */
    int64_t step;
    int64_t transposed;
    int64_t element;
    const Meaning *meaning; /* or null */
    int64_t rows;       /* of the weight */
    int64_t group_size; /* divides its columns */
    int64_t run;        /* rows of a run */
    int64_t runs;       /* evenly spaced; where they are all rows, the last may be shorter */
} Driver;

/* A vector that takes the factors and stays in its own dtype. plus: 1 where it is added to 1 before it multiplies. */
typedef struct {
    const void *values; /* [count] */
    int64_t dtype;
    int64_t plus;
} Giver;

typedef struct {
    const Driver *drivers;
    int64_t num_drivers;
    int64_t columns;    /* of each driver: repeat * count */
    int64_t count;      /* factors: heads of head_dim, each of which `repeat` heads of columns share */
    int64_t head_dim;
    int64_t repeat;
    int64_t passes;
    int64_t bound;
    int64_t exact;      /* powers of two */
    double root;        /* of count */
    const Giver *givers;
    int64_t num_givers;
    float *mu;          /* [count]: the result */
    int64_t where;      /* the driver that could not be read */
} Site;

#endif
