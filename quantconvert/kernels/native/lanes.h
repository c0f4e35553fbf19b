/* Vectors as wide as the processor's; `LANES` values are one or more of them. */
#ifndef QUANTCONVERT_LANES_H
#define QUANTCONVERT_LANES_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

#if defined(__SSE4_1__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

/* Of what is constant at the call's place, a function's own code is made. */
#define INLINED inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

/* A compare and a select is not turned into these by every compiler. */
static inline Ints larger(Ints a, Ints b) {
#if WIDTH == 16
    return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif WIDTH == 8
    return (Ints)_mm256_max_epi32((__m256i)a, (__m256i)b);
#elif defined(__SSE4_1__)
    return (Ints)_mm_max_epi32((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON)
    return (Ints)vmaxq_s32((int32x4_t)a, (int32x4_t)b);
#else
    Ints mask = a > b;
    return (a & mask) | (b & ~mask);
#endif
}

static inline Ints smaller(Ints a, Ints b) {
#if WIDTH == 16
    return (Ints)_mm512_min_epi32((__m512i)a, (__m512i)b);
#elif WIDTH == 8
    return (Ints)_mm256_min_epi32((__m256i)a, (__m256i)b);
#elif defined(__SSE4_1__)
    return (Ints)_mm_min_epi32((__m128i)a, (__m128i)b);
#else
    return ~larger(~a, ~b);
#endif
}

static inline Floats load(const float *values) {
    Floats found;
    memcpy(&found, values, sizeof found);
    return found;
}

static inline Ints load_bits(const float *values) {
    Ints found;
    memcpy(&found, values, sizeof found);
    return found;
}

static inline void store_bits(float *values, Ints bits) { memcpy(values, &bits, sizeof bits); }

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#endif
