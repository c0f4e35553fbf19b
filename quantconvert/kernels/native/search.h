/* The range of a group that loses least, weighted by the importance of each column: methods/searching.py, to the bit. */
#ifndef QUANTCONVERT_SEARCH_H
#define QUANTCONVERT_SEARCH_H

#include "params.h"

enum { RATIOS = 12 };
static const double SMALLEST_RATIO = 0.7;

/* The sum of all, in an order of its own: folded in halves, in place. */
static inline float folded(float *values, int64_t count) {
    while (count > 1) {
        const int64_t half = (count + 1) / 2;
        float *restrict low = values;
        const float *restrict high = values + half;
        for (int64_t i = 0; i < count - half; i++)
            low[i] += high[i];
        count = half;
    }
    return values[0];
}

/* What each value loses, in steps, squared and weighted. `first`: the values in steps of the first ratio. */
static inline float loss_of(const float *restrict first, const float *restrict importance, int64_t count, float finer,
                            float zero, int32_t num_bits, float *restrict lost) {
    const float magic = ROUND + (float)(1 << (num_bits - 1));
    const Ints low = (Ints){0} + (int32_t)bits_of(ROUND), high = low + ((1 << num_bits) - 1);
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        Floats exact = load(first + i) * finer + zero;
        Ints bits = smaller(larger((Ints)(exact + magic), low), high);
        Floats error = ((Floats)bits - magic) - exact;
        Floats weighted = error * error * load(importance + i);
        memcpy(lost + i, &weighted, sizeof weighted);
    }
    for (; i < count; i++) {
        float exact = first[i] * finer + zero;
        int32_t bits = (int32_t)bits_of(exact + magic), most = (int32_t)bits_of(ROUND) + (1 << num_bits) - 1;
        bits = bits < (int32_t)bits_of(ROUND) ? (int32_t)bits_of(ROUND) : bits > most ? most : bits;
        float error = (float_of((uint32_t)bits) - magic) - exact;
        lost[i] = error * error * importance[i];
    }
    return folded(lost, count);
}

/* Narrows a range by the ratio of the least loss, of equal ones the larger; nonzero where the scale of the whole range is
 * none. scratch: two numbers a value. */
static inline int search(const Call *call, const float *values, int64_t group, float *low, float *high, float *scratch) {
    const int64_t count = call->group_size;
    const float *importance = call->importance + group * count;
    float widest = 0, best = 0, chosen = 1;
    for (int k = 0; k < RATIOS; k++) {
        const float ratio = (float)(1 - (1 - SMALLEST_RATIO) * k / (RATIOS - 1));
        float zero, unused;
        const float scale = store_scale(parameters(*low * ratio, *high * ratio, call, &zero), call->scale_dtype,
                                        &unused, 0);
        if (k == 0) {
            if (bits_of(scale) == INFINITE)
                return 1;
            widest = scale;
            for (int64_t i = 0; i < count; i++)
                scratch[i] = values[i] / scale;
        } else if (scale > widest) /* one that vanished, and became 1 */
            continue;
        const float rescaled = scale / widest;
        const float loss = loss_of(scratch, importance, count, widest / scale, zero, call->num_bits, scratch + count) *
                           (rescaled * rescaled);
        if (k == 0 || loss < best)
            best = loss, chosen = ratio;
    }
    *low *= chosen;
    *high *= chosen;
    return 0;
}

#endif
