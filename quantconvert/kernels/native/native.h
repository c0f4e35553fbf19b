/* The one call of this library: raw rows of a weight in, packed codes, scales, zero points and sums of errors out.
 *
 * The arithmetic is that of quantconvert/methods/rounding.py, operation by operation, and equal to it bit for bit.
 * The fields are those of `Call` in quantconvert/kernels/native/library.py, in the same order; ABI counts their changes.
 */
#ifndef QUANTCONVERT_NATIVE_H
#define QUANTCONVERT_NATIVE_H

#include <stdint.h>

#define ABI 5

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

/* The name of a function at the level that is compiled. */
#define JOINED(a, b) a##b
#define NAMED(a, b) JOINED(a, b)

enum { BF16, F16, F32, TABLE };                      /* element types of weights and scales; TABLE: bytes to look up */
enum { COLUMNS, ROWS, PAIRS, BYTES, NOTHING };       /* how codes lie beside each other: `Packed` in layouts/base.py */
enum { MULTIPLIED, DIVIDED, ELEMENTS, OF_ONE };      /* ways of a step */
/* what can go wrong; DOUBTFUL: what is stored may be */
enum { NONFINITE = 1, OVERFLOW = 2, NO_MEMORY = 4, UNREAD = 8, UNWRITTEN = 16, DOUBTFUL = 32 };
enum { PER_WORD_MAX = 8, LANES = 16, CHUNK = 128 };

/* What stored elements mean beside their type: what each byte stands for, and a factor for each block of the matrix that
 * holds them, whose rows start, start + step, ... are the weight's. */
typedef struct {
    const float *table;  /* [256]; or null */
    const float *scales; /* [.., width], one for `rows` rows and `columns` columns; or null */
    int64_t width;
    int64_t rows;
    int64_t columns;
    int64_t start;
    int64_t step;
} Meaning;

/* One step of sources/steps/scale.py. DIVIDED: columns by factors[column]. MULTIPLIED: rows from `start` on by
 * factors[row - start]; ELEMENTS: those of a vector likewise; OF_ONE: so that 1 + w is multiplied. */
typedef struct {
    const float *factors;
    int64_t start;
    int64_t way;
} Step;

/* Unsigned whole numbers of `num_bits` as bytes: `shift` is added to each, in eight bits, then they are packed. `order`:
 * with ROWS, which of the rows that share a word stands at each place, the lowest bits first. */
typedef struct {
    uint8_t *bytes;
    int32_t along;
    int32_t shift;
    int32_t order[PER_WORD_MAX];
} Packed;

typedef struct {
    const void *weights;    /* `rows` rows of `columns` elements, `stride` elements apart */
    int64_t stride;
    int64_t rows;
    int64_t columns;
    int64_t group_size;     /* divides columns */
    int64_t first_row;      /* of these rows in the weight, for steps */
    const Meaning *meaning; /* or null */
    const Step *steps;
    int64_t num_steps;
    const float *importance; /* of each column, where ranges are searched; or null */
    const float *span;      /* the lowest and the highest value of the tensor, where all of it shares a scale; or null */
    int32_t element;        /* of weights */
    int32_t dtype;          /* to which ranges and scales are rounded */
    int32_t scale_dtype;    /* in which scales are stored */
    int32_t num_bits;       /* 4 or 8 */
    int32_t symmetric;
    int32_t reserved;
    Packed codes;           /* of [rows, columns] */
    Packed zeros;           /* of [rows, groups], [1, 1] with a span */
    void *scales;           /* likewise */
    double noise;           /* the sum of squares of what is lost, and of the weights */
    double signal;
} Call;

#endif
