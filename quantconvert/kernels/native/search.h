/* The range of a group that loses least, weighted by the importance of each column: methods/searching.py, to the bit.
 *
 * All ratios' scales and zero points are found side by side. A sum is folded in halves; of a group of 16, 32, 64 or a
 * multiple of 128 values the first of these additions are those of the vectors that have just been computed, so that
 * only LANES sums or an eighth of the group go through memory.
 */
#ifndef QUANTCONVERT_SEARCH_H
#define QUANTCONVERT_SEARCH_H

#include "params.h"

enum { RATIOS = 12 }; /* at most LANES */
#define SMALLEST_RATIO 0.7
#define RATIO(k) (float)(1 - (1 - SMALLEST_RATIO) * (k) / (RATIOS - 1))

/* For each ratio; what lies behind the last of them is not looked at. */
typedef struct {
    float scale[LANES];
    float zero[LANES];
    float finer[LANES]; /* the first scale over this one */
    float worth[LANES]; /* of a square in steps of this scale, in steps of the first; inf: not to be chosen */
} Ranges;

/* What codes of one range are found with. */
typedef struct {
    Floats finer;
    Floats zero;
    Floats magic;
    Ints low;
    Ints high;
    int is_shifted; /* by a zero point that may be another than zero */
} Grid;

/* Not inlined: GCC would take the loops to pieces, number by number. */
static __attribute__((noinline)) void make_ranges(const Call *call, float low, float high, Ranges *ranges) {
    static const float ratios[LANES] = {RATIO(0), RATIO(1), RATIO(2), RATIO(3), RATIO(4), RATIO(5),
                                        RATIO(6), RATIO(7), RATIO(8), RATIO(9), RATIO(10), RATIO(11)};
    float lows[LANES], highs[LANES];
    for (int k = 0; k < LANES; k++)
        lows[k] = low * ratios[k], highs[k] = high * ratios[k];
    parameters(lows, highs, LANES, call, ranges->scale, ranges->zero);
    round_scales(ranges->scale, LANES, call->scale_dtype);
    const float widest = ranges->scale[0];
    for (int k = 0; k < LANES; k++) {
        const float scale = ranges->scale[k], rescaled = scale / widest;
        ranges->finer[k] = widest / scale;
        ranges->worth[k] = scale > widest ? float_of(INFINITE) : rescaled * rescaled; /* it vanished, and became 1 */
    }
}

/* What each value loses, in steps, squared and weighted. `first`: the values in steps of the first ratio. */
static INLINED Floats lost_1(const float *first, const float *importance, Grid grid) {
    Floats exact = load(first) * grid.finer;
    if (grid.is_shifted)
        exact += grid.zero;
    Ints bits = smaller(larger((Ints)(exact + grid.magic), grid.low), grid.high);
    Floats error = ((Floats)bits - grid.magic) - exact;
    return error * error * load(importance);
}

/* The sums of two, four and eight such vectors, as halves of a group fold onto each other. */
static INLINED Floats lost_2(const float *first, const float *importance, int64_t half, Grid grid) {
    return lost_1(first, importance, grid) + lost_1(first + half, importance + half, grid);
}

static INLINED Floats lost_4(const float *first, const float *importance, int64_t half, Grid grid) {
    return lost_2(first, importance, half, grid) + lost_2(first + half / 2, importance + half / 2, half, grid);
}

static INLINED Floats lost_8(const float *first, const float *importance, int64_t half, Grid grid) {
    return lost_4(first, importance, half, grid) + lost_4(first + half / 4, importance + half / 4, half, grid);
}

/* The sum of all, folded in halves, in place. */
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

/* The same of LANES values for each ratio. */
static INLINED void fold_lanes(float sums[RATIOS][LANES], float *found) {
    typedef float Quad __attribute__((vector_size(16)));
    float quads[RATIOS][4];
    for (int k = 0; k < RATIOS; k++) {
        Quad parts[LANES / 4];
        memcpy(parts, sums[k], sizeof parts);
        parts[0] = (parts[0] + parts[2]) + (parts[1] + parts[3]);
        memcpy(quads[k], parts, sizeof parts[0]);
    }
    for (int k = 0; k < RATIOS; k++)
        found[k] = (quads[k][0] + quads[k][2]) + (quads[k][1] + quads[k][3]);
}

/* The loss in each range, of groups that are folded `parts` times. lost: room for count / parts numbers. */
static INLINED void find_folded(const float *first, const float *importance, int64_t count, int parts, Grid grid,
                                const Ranges *ranges, float *lost, float *losses) {
    const int64_t width = count / parts, half = count / 2;
    float sums[RATIOS][LANES];
    for (int k = 0; k < RATIOS; k++) {
        float *to = width == LANES ? sums[k] : lost;
        grid.finer = (Floats){0} + ranges->finer[k];
        grid.zero = (Floats){0} + ranges->zero[k];
        for (int64_t i = 0; i < width; i += WIDTH) {
            Floats sum = parts == 8   ? lost_8(first + i, importance + i, half, grid)
                         : parts == 4 ? lost_4(first + i, importance + i, half, grid)
                         : parts == 2 ? lost_2(first + i, importance + i, half, grid)
                                      : lost_1(first + i, importance + i, grid);
            memcpy(to + i, &sum, sizeof sum);
        }
        if (width > LANES)
            losses[k] = folded(lost, width);
    }
    if (width == LANES)
        fold_lanes(sums, losses);
    for (int k = 0; k < RATIOS; k++)
        losses[k] *= ranges->worth[k];
}

/* The same of groups of any size. */
static inline void find_any_losses(const float *first, const float *importance, int64_t count, Grid grid,
                                   const Ranges *ranges, float *lost, float *losses) {
    for (int k = 0; k < RATIOS; k++) {
        grid.finer = (Floats){0} + ranges->finer[k];
        grid.zero = (Floats){0} + ranges->zero[k];
        for (int64_t i = 0; i < count; i += WIDTH) {
            const size_t nbytes = (size_t)(count - i < WIDTH ? count - i : WIDTH) * sizeof *lost;
            float some[WIDTH] = {0}, weights[WIDTH] = {0};
            memcpy(some, first + i, nbytes);
            memcpy(weights, importance + i, nbytes);
            Floats found = lost_1(some, weights, grid);
            memcpy(lost + i, &found, nbytes);
        }
        losses[k] = folded(lost, count) * ranges->worth[k];
    }
}

static INLINED void find_losses(const float *first, const float *importance, int64_t count, Grid grid,
                                const Ranges *ranges, float *lost, float *losses) {
    if (count % (8 * LANES) == 0)
        find_folded(first, importance, count, 8, grid, ranges, lost, losses);
    else if (count == 4 * LANES)
        find_folded(first, importance, count, 4, grid, ranges, lost, losses);
    else if (count == 2 * LANES)
        find_folded(first, importance, count, 2, grid, ranges, lost, losses);
    else if (count == LANES)
        find_folded(first, importance, count, 1, grid, ranges, lost, losses);
    else
        find_any_losses(first, importance, count, grid, ranges, lost, losses);
}

/* The ratio of the least loss, of equal ones the larger. scratch: two numbers a value. */
static int find_best(const Call *call, const float *values, const float *importance, const Ranges *ranges,
                     float *scratch) {
    const int64_t count = call->group_size;
    const float widest = ranges->scale[0];
    const Ints low = (Ints){0} + (int32_t)bits_of(ROUND), high = low + ((1 << call->num_bits) - 1);
    const Floats none = {0}, magic = none + (ROUND + (float)(1 << (call->num_bits - 1)));
    float losses[RATIOS], least;
    int best = 0;
    for (int64_t i = 0; i < count; i++)
        scratch[i] = values[i] / widest;
    if (call->symmetric)
        find_losses(scratch, importance, count, (Grid){none, none, magic, low, high, 0}, ranges, scratch + count,
                    losses);
    else
        find_losses(scratch, importance, count, (Grid){none, none, magic, low, high, 1}, ranges, scratch + count,
                    losses);
    least = losses[0];
    for (int k = 1; k < RATIOS; k++)
        best = losses[k] < least ? k : best, least = losses[k] < least ? losses[k] : least;
    return best;
}

/* Scale, as it is stored, and zero point of a group's best range; inf where the scale of the whole range is. */
static void search(const Call *call, const float *values, int64_t group, float low, float high, float *scratch,
                   float *scale, float *zero) {
    Ranges ranges;
    make_ranges(call, low, high, &ranges);
    const float *importance = call->importance + group * call->group_size;
    const int best = bits_of(ranges.scale[0]) == INFINITE ? 0 : find_best(call, values, importance, &ranges, scratch);
    *scale = ranges.scale[best];
    *zero = ranges.zero[best];
}

#endif
