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

/* The scale, before it is stored, and the zero point, counted from the midpoint. */
static float parameters(float low, float high, const Call *call, float *zero) {
    const int32_t dtype = call->dtype, top = (1 << call->num_bits) - 1, half = 1 << (call->num_bits - 1);
    const float steps = (float)top;
    float scale;
    *zero = 0;
    if (call->symmetric) {
        scale = rounded((-low > high ? -low : high) / (steps / 2), dtype);
        return scale == 0 ? 1 : scale;
    }
    float width = rounded(high - low, dtype);
    scale = rounded(bits_of(width) == INFINITE ? high / steps - low / steps : width / steps, dtype);
    scale = scale == 0 ? 1 : scale;
    if (high != low) {
        float place = rounded((float)-half - rounded(low / scale, dtype), dtype);
        place = place < (float)-half ? (float)-half : place > (float)(top - half) ? (float)(top - half) : place;
        *zero = (place + ROUND) - ROUND;
    }
    return scale;
}

#endif
