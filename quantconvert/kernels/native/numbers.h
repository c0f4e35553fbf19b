/* bfloat16 and float16, by integers: as every processor rounds, and without its instructions for them. */
#ifndef QUANTCONVERT_NUMBERS_H
#define QUANTCONVERT_NUMBERS_H

#include "lanes.h"
#include "native.h"

static inline int64_t nbytes_of(int32_t element) { return element == F32 ? 4 : element == TABLE ? 1 : 2; }

/* Half to even. Not for NaN. */
static inline uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Without branches, so that loops of it become vectors. */
static inline uint16_t to_f16(float value) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000;
    const int32_t size = (int32_t)(bits & 0x7fffffff);
    /* below 2^-14 the sum with 0.5 has the spacing of what lies there */
    const int32_t small = (int32_t)bits_of(float_of((uint32_t)size) + 0.5f) - 0x3f000000;
    const int32_t usual = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
    const int32_t half = size < 0x38800000 ? small : usual;
    return (uint16_t)(sign | (uint32_t)(size >= 0x477ff000 ? 0x7c00 : half)); /* 65520, halfway to 65536 */
}

static inline float from_bf16(uint16_t stored) { return float_of((uint32_t)stored << 16); }

/* The product is exact, of numbers below the smallest normal one too; what is not finite stays so. */
static inline float from_f16(uint16_t stored) {
    uint32_t size = (uint32_t)(stored & 0x7fff) << 13, sign = (uint32_t)(stored & 0x8000) << 16;
    uint32_t special = (stored & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return float_of(bits_of(float_of(size) * 0x1p112f) | sign | special);
}

static inline float rounded(float value, int32_t dtype) {
    return dtype == BF16 ? from_bf16(to_bf16(value)) : dtype == F16 ? from_f16(to_f16(value)) : value;
}

/* Each rounded, in place. */
static INLINED void round_all(float *values, int count, int32_t dtype) {
    if (dtype == BF16)
        for (int k = 0; k < count; k++)
            values[k] = rounded(values[k], BF16);
    else if (dtype == F16)
        for (int k = 0; k < count; k++)
            values[k] = rounded(values[k], F16);
}

static inline void decode(const void *row, int32_t element, int64_t count, float *values) {
    const uint16_t *stored = row;
    if (element == BF16)
        for (int64_t i = 0; i < count; i++)
            values[i] = from_bf16(stored[i]);
    else if (element == F16)
        for (int64_t i = 0; i < count; i++)
            values[i] = from_f16(stored[i]);
    else
        memcpy(values, row, (size_t)count * sizeof *values);
}

/* The same of row `row` of a weight from column `left` on. */
static inline void decode_part(const Meaning *meaning, const void *stored, int32_t element, int64_t row, int64_t left,
                               int64_t count, float *restrict values) {
    if (element == TABLE)
        for (int64_t i = 0; i < count; i++)
            values[i] = meaning->table[((const uint8_t *)stored)[i]];
    else
        decode(stored, element, count, values);
    if (!meaning || !meaning->scales)
        return;
    const float *scales = meaning->scales + (meaning->start + row * meaning->step) / meaning->rows * meaning->width;
    for (int64_t i = 0; i < count;) {
        const int64_t block = (left + i) / meaning->columns, end = (block + 1) * meaning->columns - left;
        const float scale = scales[block];
        for (; i < count && i < end; i++)
            values[i] *= scale;
    }
}

/* A number that the dtype holds. */
static inline void store(float value, int32_t dtype, void *values, int64_t index) {
    if (dtype == F32)
        ((float *)values)[index] = value;
    else
        ((uint16_t *)values)[index] = dtype == BF16 ? to_bf16(value) : to_f16(value);
}

/* Scales as a dtype stores them: inf where it does not hold one; what would vanish is its smallest number. */
static INLINED void round_scales(float *scales, int count, int32_t dtype) {
    const float least = dtype == BF16 ? from_bf16(1) : from_f16(1);
    round_all(scales, count, dtype);
    for (int k = 0; k < count && dtype != F32; k++)
        scales[k] = scales[k] == 0 ? least : scales[k];
}

#endif
