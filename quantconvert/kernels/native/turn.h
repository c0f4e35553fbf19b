/* Matrices turned, block by block. */
#ifndef QUANTCONVERT_TURN_H
#define QUANTCONVERT_TURN_H

#include <stdint.h>

enum { SIDE = 16 };

#define TURN(name, Element)                                                                                            \
    static void name(const Element *restrict from, int64_t rows, int64_t columns, int64_t stride, int64_t step,        \
                     Element *restrict to, int64_t to_stride) {                                                        \
        for (int64_t top = 0; top < rows; top += SIDE)                                                                 \
            for (int64_t left = 0; left < columns; left += SIDE) {                                                     \
                const int64_t bottom = top + SIDE < rows ? top + SIDE : rows;                                          \
                const int64_t right = left + SIDE < columns ? left + SIDE : columns;                                   \
                for (int64_t j = left; j < right; j++)                                                                 \
                    for (int64_t i = top; i < bottom; i++)                                                             \
                        to[j * to_stride + i] = from[i * stride + j * step];                                           \
            }                                                                                                          \
    }

TURN(turn_1, uint8_t)
TURN(turn_2, uint16_t)
TURN(turn_4, uint32_t)

/* `rows` rows, `stride` elements apart, of which every `step`th column is taken, `columns` of them, to [columns, rows]
 * with rows `to_stride` apart. element: bytes. */
static void turn(const void *from, int64_t element, int64_t rows, int64_t columns, int64_t stride, int64_t step,
                 void *to, int64_t to_stride) {
    if (element == 1)
        turn_1(from, rows, columns, stride, step, to, to_stride);
    else if (element == 2)
        turn_2(from, rows, columns, stride, step, to, to_stride);
    else
        turn_4(from, rows, columns, stride, step, to, to_stride);
}

#endif
