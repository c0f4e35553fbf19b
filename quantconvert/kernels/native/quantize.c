/* Rows of a weight to packed codes. Compiled once for each instruction set, as LEVEL.
 *
 * Numbers of one sign are ordered as their bits, so that ranges are maxima of integers; a number whose bits reach those
 * of infinity is none. Adding 1.5 * 2^23 rounds a float to a whole number, half to even, in the lowest bits of the sum.
 * Clamping that sum as an integer is clamping before rounding, as both keep order and the bounds are whole.
 */
#include "lanes.h"
#include "native.h"
#include "pack.h"
#include "row.h"
#include "search.h"

#include <stdlib.h>

enum { MAX_DEPTH = 48 };

/* A sum of vectors of LANES numbers: each two neighbours are added until one is left. `held[k]` waits for its neighbour
 * where bit k of `count` is set. */
typedef struct {
    uint64_t count;
    double held[MAX_DEPTH][LANES];
} Sum;

static void add(double *restrict a, const double *restrict b) {
    for (int i = 0; i < LANES; i++)
        a[i] += b[i];
}

static void push(Sum *sum, const Floats *lanes, double weight) {
    float values[LANES];
    double carry[LANES];
    memcpy(values, lanes, sizeof values);
    for (int i = 0; i < LANES; i++)
        carry[i] = (double)values[i] * weight;
    int level = 0;
    for (uint64_t rest = sum->count++; rest & 1; rest >>= 1)
        add(carry, sum->held[level++]);
    memcpy(sum->held[level], carry, sizeof carry);
}

static double total(const Sum *sum) {
    double lanes[LANES] = {0};
    for (int level = 0; level < MAX_DEPTH; level++)
        if (sum->count >> level & 1)
            add(lanes, sum->held[level]);
    for (int count = LANES; count > 1; count /= 2)
        for (int i = 0; i < count / 2; i++)
            lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
    return lanes[0];
}

/* Values to sums whose lowest bits are codes, in place; sums of squares of weights and of errors, in steps. */
static inline void round_lanes(float *values, float scale, float zero, float magic, int32_t top, Floats *signal,
                               Floats *noise) {
    const Ints low = (Ints){0} + (int32_t)bits_of(ROUND), high = low + top;
    for (int k = 0; k < VECTORS; k++) {
        Floats exact = load(values + k * WIDTH) / scale;
        signal[k] += exact * exact;
        exact += zero;
        Ints bits = smaller(larger((Ints)(exact + magic), low), high);
        Floats error = exact - ((Floats)bits - magic);
        noise[k] += error * error;
        store_bits(values + k * WIDTH, bits);
    }
}

static void round_group(float *values, int64_t count, float scale, float zero, int32_t num_bits, Sum *signals,
                        Sum *noises) {
    const float magic = ROUND + (float)(1 << (num_bits - 1));
    const int32_t top = (1 << num_bits) - 1;
    const double weight = (double)scale * (double)scale;
    for (int64_t begin = 0; begin < count; begin += CHUNK) {
        const int64_t end = begin + CHUNK < count ? begin + CHUNK : count;
        Floats signal[VECTORS] = {{0}}, noise[VECTORS] = {{0}};
        int64_t i = begin;
        for (; i + LANES <= end; i += LANES)
            round_lanes(values + i, scale, zero, magic, top, signal, noise);
        if (i < end) {
            float rest[LANES] = {0};
            memcpy(rest, values + i, (size_t)(end - i) * sizeof *rest);
            round_lanes(rest, scale, zero, magic, top, signal, noise);
            memcpy(values + i, rest, (size_t)(end - i) * sizeof *rest);
        }
        push(signals, signal, weight);
        push(noises, noise, weight);
    }
}

static void narrow(const float *values, int64_t count, int32_t shift, uint8_t *codes) {
    for (int64_t i = 0; i < count; i++)
        codes[i] = (uint8_t)(bits_of(values[i]) + (uint32_t)shift);
}

/* One row: codes, and the scale and zero point of each group. */
static int quantize_row(Call *call, int64_t row, float *values, float *scratch, uint8_t *codes, uint8_t *zeros,
                        Sum *signals, Sum *noises) {
    const int64_t size = call->group_size, groups = call->columns / size, half = 1 << (call->num_bits - 1);
    int wrong = 0;
    read_row(call, row, values);
    for (int64_t group = 0; group < groups; group++) {
        const int64_t index = call->span ? 0 : row * groups + group;
        float low, high, scale, zero;
        if (call->span)
            low = call->span[0], high = call->span[1];
        else if (measure(values + group * size, size, call->symmetric, &low, &high)) {
            wrong |= NONFINITE;
            continue;
        }
        if (call->importance)
            search(call, values + group * size, group, low, high, scratch, &scale, &zero);
        else {
            parameters(&low, &high, 1, call, &scale, &zero);
            round_scales(&scale, 1, call->scale_dtype);
        }
        if (bits_of(scale) == INFINITE) {
            wrong |= OVERFLOW;
            continue;
        }
        store(scale, call->scale_dtype, call->scales, index);
        zeros[index] = (uint8_t)((int32_t)zero + half + call->zeros.shift);
        round_group(values + group * size, size, scale, zero, call->num_bits, signals, noises);
    }
    narrow(values, call->columns, call->codes.shift, codes);
    return wrong;
}

static void pack_zeros(const Call *call, const uint8_t *zeros, int64_t rows, int64_t columns, const uint8_t *nothing,
                       uint8_t *scratch) {
    const Packed *packed = &call->zeros;
    const int64_t band = band_of(packed, call->num_bits), nbytes = band_nbytes(packed, call->num_bits, columns);
    for (int64_t first = 0; packed->along != NOTHING && first < rows; first += band) {
        const uint8_t *bands[PER_WORD_MAX];
        for (int64_t k = 0; k < PER_WORD_MAX; k++)
            bands[k] = first + k < rows ? zeros + (first + k) * columns : nothing;
        pack_band(packed, call->num_bits, bands, columns, scratch, packed->bytes + first / band * nbytes);
    }
}

int NAMED(quantize_, LEVEL)(Call *call) {
    const int64_t rows = call->rows, columns = call->columns, groups = columns / call->group_size;
    const int64_t band = band_of(&call->codes, call->num_bits);
    const int64_t nbytes = band_nbytes(&call->codes, call->num_bits, columns);
    Sum *sums = calloc(2, sizeof *sums);
    float *values = malloc((size_t)columns * sizeof *values + LANES * sizeof *values);
    float *scratch = call->importance ? malloc(2 * (size_t)call->group_size * sizeof *scratch) : NULL;
    uint8_t *codes = malloc((size_t)(columns * (band + 4))); /* a band, and what packing it takes */
    uint8_t *nothing = calloc((size_t)columns, 1), *zeros = malloc((size_t)(call->span ? 1 : rows * groups));
    int wrong = sums && values && codes && nothing && zeros && (scratch || !call->importance) ? 0 : NO_MEMORY;
    for (int64_t first = 0; first < rows && wrong != NO_MEMORY; first += band) {
        const uint8_t *bands[PER_WORD_MAX];
        for (int64_t k = 0; k < PER_WORD_MAX; k++)
            bands[k] = first + k < rows && k < band ? codes + k * columns : nothing;
        for (int64_t k = 0; k < band && first + k < rows; k++)
            wrong |= quantize_row(call, first + k, values, scratch, codes + k * columns, zeros, &sums[0], &sums[1]);
        pack_band(&call->codes, call->num_bits, bands, columns, codes + band * columns,
                  call->codes.bytes + first / band * nbytes);
    }
    if (!wrong) {
        pack_zeros(call, zeros, call->span ? 1 : rows, call->span ? 1 : groups, nothing, codes + band * columns);
        call->signal = total(&sums[0]);
        call->noise = total(&sums[1]);
    }
    free(sums), free(values), free(scratch), free(codes), free(nothing), free(zeros);
    return wrong;
}

/* The lowest and the highest value of all rows, zero among them. */
int NAMED(measure_, LEVEL)(Call *call, double *low, double *high) {
    float *values = malloc((size_t)call->columns * sizeof *values);
    int wrong = values ? 0 : NO_MEMORY;
    *low = *high = 0;
    for (int64_t row = 0; row < call->rows && !wrong; row++) {
        float least, most;
        read_row(call, row, values);
        wrong = measure(values, call->columns, 0, &least, &most) ? NONFINITE : 0;
        *low = least < *low ? least : *low;
        *high = most > *high ? most : *high;
    }
    free(values);
    return wrong;
}
