/* What codes of a group mean: its range, the scale and the zero point. */
#ifndef QUANTCONVERT_PARAMS_H
#define QUANTCONVERT_PARAMS_H

#include "lanes.h"
#include "native.h"
#include "numbers.h"

#define INFINITE 0x7f800000
#define ROUND 12582912.0f /* 1.5 * 2^23 */

enum { VECTORS = LANES / WIDTH };

static int32_t largest(Ints values) {
    int32_t found[WIDTH];
    memcpy(found, &values, sizeof found);
    for (int count = WIDTH / 2; count > 0; count /= 2)
        for (int i = 0; i < count; i++)
            found[i] = found[i] > found[i + count] ? found[i] : found[i + count];
    return found[0];
}

/* The largest of values' bits as integers, without the bits that `keep` lacks, those of `flip` turned; 0 among them. */
static inline int32_t largest_bits(const float *values, int64_t count, Ints keep, Ints flip) {
    enum { STEP = 4 };
    Ints most[STEP] = {{0}};
    int64_t i = 0;
    for (; i + STEP * WIDTH <= count; i += STEP * WIDTH)
        for (int k = 0; k < STEP; k++)
            most[k] = larger(most[k], (load_bits(values + i + k * WIDTH) & keep) ^ flip);
    for (; i < count; i += WIDTH) {
        float rest[WIDTH] = {0};
        memcpy(rest, values + i, (size_t)(count - i < WIDTH ? count - i : WIDTH) * sizeof *rest);
        most[0] = larger(most[0], (load_bits(rest) & keep) ^ flip);
    }
    return largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

/* The smallest and the largest value, zero among them; nonzero where one is not finite. */
static int measure(const float *values, int64_t count, int symmetric, float *low, float *high) {
    const Ints none = {0}, sign = none + INT32_MIN;
    const int32_t top = largest_bits(values, count, symmetric ? ~sign : ~none, none);
    const int32_t bottom = symmetric ? top : largest_bits(values, count, ~none, sign);
    *high = float_of((uint32_t)top);
    *low = -float_of((uint32_t)bottom);
    return top >= INFINITE || bottom >= INFINITE;
}

/* Scales, before they are stored, and zero points, counted from the midpoint, of `count` ranges. */
static INLINED void parameters(const float *low, const float *high, int count, const Call *call, float *scale,
                               float *zero) {
    const int32_t dtype = call->dtype, top = (1 << call->num_bits) - 1, half = 1 << (call->num_bits - 1);
    const float steps = (float)top, least = (float)-half, most = (float)(top - half);
    if (call->symmetric) {
        for (int k = 0; k < count; k++)
            scale[k] = (-low[k] > high[k] ? -low[k] : high[k]) / (steps / 2), zero[k] = 0;
        round_all(scale, count, dtype);
        for (int k = 0; k < count; k++)
            scale[k] = scale[k] == 0 ? 1 : scale[k];
        return;
    }
    for (int k = 0; k < count; k++)
        zero[k] = high[k] - low[k]; /* the width, here */
    round_all(zero, count, dtype);
    for (int k = 0; k < count; k++)
        scale[k] = bits_of(zero[k]) == INFINITE ? high[k] / steps - low[k] / steps : zero[k] / steps;
    round_all(scale, count, dtype);
    for (int k = 0; k < count; k++)
        scale[k] = scale[k] == 0 ? 1 : scale[k], zero[k] = low[k] / scale[k];
    round_all(zero, count, dtype);
    for (int k = 0; k < count; k++)
        zero[k] = least - zero[k];
    round_all(zero, count, dtype);
    for (int k = 0; k < count; k++) {
        const float place = zero[k] < least ? least : zero[k] > most ? most : zero[k];
        zero[k] = high[k] == low[k] ? 0 : (place + ROUND) - ROUND;
    }
}

#endif
