/* Rows of a weight beside what is stored of them: quantconvert/kernels/native/check.py has the same fields. */
#ifndef QUANTCONVERT_CHECK_H
#define QUANTCONVERT_CHECK_H

#include "native.h"

/* Where a number of a row and a column (or group) lies: elements from one to the next; what shares an element counts
 * as one. */
typedef struct {
    int64_t row;
    int64_t column;
} Strides;

/* How far what is stored may be from its source: `Tolerance` in methods/base.py; infinite where it is not judged.
 * tiny: below that a scale becomes 1, or is coarse. */
typedef struct {
    double inside;
    double outside;
    double outside_tiny;
    double coarse;
    double fine;
    double tiny;
    int64_t negative;
} Allowed;

typedef struct {
    Call call;          /* the source's rows, none where `weights` is null; codes, zeros, scales as they are stored */
    Strides codes;      /* of words, of bytes with PAIRS and BYTES */
    Strides zeros;      /* likewise */
    Strides scales;
    Allowed allowed;
    int64_t whole;      /* one scale serves the whole weight */
    int64_t last;       /* these are its last rows */
    double steps;       /* the largest distance so far, in scales, and sums of squares of distances and of the source */
    double noise;
    double signal;
    double low;         /* of the whole weight, so far */
    double high;
} Check;

/* A part of each of `count` rows of a file, `nbytes` long and `stride` bytes after the one before. */
typedef struct {
    int64_t fd;
    int64_t offset;
    int64_t stride;
    int64_t nbytes;
    int64_t count;
    uint8_t *bytes;
} Strips;

#endif
