/* Decodes what is stored of a weight and compares it with its source. Compiled once for each instruction set, as LEVEL.
 *
 * The arithmetic is that of quantconvert/verification/weights.py, which judges whatever is DOUBTFUL here once more and
 * finds the words. Nothing that it would find passes here. Numbers of one sign are ordered as their bits: maxima are
 * those of integers.
 */
#include "check.h"
#include "io.h"
#include "lanes.h"
#include "row.h"
#include "unpack.h"

#include <stdlib.h>

#define INFINITE 0x7f800000

typedef double Doubles __attribute__((vector_size(4 * WIDTH)));

enum { VECTORS = LANES / WIDTH, PART = 512 };

/* Sums of squares in LANES lanes, the same for every WIDTH. */
typedef Doubles Squares[2 * VECTORS];

/* What is seen of a group: bits of the largest distance, and of the largest values of each sign. */
typedef struct {
    Ints off;
    Ints high;
    Ints low;
} Largest;

static inline void widen(Floats values, Doubles *first, Doubles *second) {
#if WIDTH == 16
    *first = (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)values));
    *second = (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)values, 1));
#elif WIDTH == 8
    *first = (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)values));
    *second = (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)values, 1));
#else
    *first = (Doubles){values[0], values[1]};
    *second = (Doubles){values[2], values[3]};
#endif
}

static inline void add_squares(Squares sums, int k, Floats values) {
    Doubles first, second;
    widen(values, &first, &second);
    sums[2 * k] += first * first;
    sums[2 * k + 1] += second * second;
}

static double total(const Squares sums) {
    double lanes[LANES];
    memcpy(lanes, sums, sizeof lanes);
    for (int count = LANES / 2; count > 0; count /= 2)
        for (int i = 0; i < count; i++)
            lanes[i] += lanes[i + count];
    return lanes[0];
}

static int32_t largest(Ints values) {
    int32_t found[WIDTH];
    memcpy(found, &values, sizeof found);
    for (int count = WIDTH / 2; count > 0; count /= 2)
        for (int i = 0; i < count; i++)
            found[i] = found[i] > found[i + count] ? found[i] : found[i + count];
    return found[0];
}

/* Whether a value of a mask is set. */
static inline int any(Ints mask) {
#if WIDTH == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif WIDTH == 8
    return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE4_1__)
    return _mm_movemask_ps((__m128)mask) != 0;
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

static inline void look_lanes(const float *off, const float *values, Largest *seen, Squares noise, Squares signal) {
    const Ints sign = (Ints){0} + INT32_MIN;
    for (int k = 0; k < VECTORS; k++) {
        const Ints far = load_bits(off + k * WIDTH), bits = load_bits(values + k * WIDTH);
        seen->off = larger(seen->off, far & ~sign);
        seen->high = larger(seen->high, bits);
        seen->low = larger(seen->low, bits ^ sign);
        add_squares(noise, k, (Floats)far);
        add_squares(signal, k, (Floats)bits);
    }
}

static void distances(const uint8_t *restrict codes, const float *restrict values, int64_t count, float zero,
                      float scale, float *restrict off) {
    for (int64_t i = 0; i < count; i++)
        off[i] = ((float)codes[i] - zero) * scale - values[i];
}

static void look(const float *values, const uint8_t *codes, int64_t count, float zero, float scale, Largest *seen,
                 Squares noise, Squares signal) {
    for (int64_t begin = 0; begin < count; begin += PART) {
        const int64_t part = count - begin < PART ? count - begin : PART;
        float off[PART];
        int64_t i = 0;
        distances(codes + begin, values + begin, part, zero, scale, off);
        for (; i + LANES <= part; i += LANES)
            look_lanes(off + i, values + begin + i, seen, noise, signal);
        if (i < part) {
            float rest[2][LANES] = {{0}};
            memcpy(rest[0], off + i, (size_t)(part - i) * sizeof *off);
            memcpy(rest[1], values + begin + i, (size_t)(part - i) * sizeof *values);
            look_lanes(rest[0], rest[1], seen, noise, signal);
        }
    }
}

/* A value that is farther off than codes inside their range may be. */
static int judge_value(const Check *check, float value, float off, float zero, float scale, float size) {
    const Allowed *allowed = &check->allowed;
    const float top = (float)((1 << check->call.num_bits) - 1), steps = off / size, at = value / scale + zero;
    const float beyond = at < 0 ? -at : at > top ? at - top : 0;
    const double outside = allowed->outside + allowed->outside_tiny / (double)size;
    return !(steps - beyond <= allowed->inside) || !(steps <= outside) ? DOUBTFUL : 0;
}

/* The values of a group of which one is so far off. */
static int judge_far(const Check *check, const float *values, const uint8_t *codes, int64_t count, float zero,
                     float scale, float size) {
    const float most = (float)check->allowed.inside * size;
    const Floats limit = (Floats){0} + most;
    int wrong = 0;
    for (int64_t begin = 0; begin < count; begin += WIDTH) {
        const int64_t part = count - begin < WIDTH ? count - begin : WIDTH;
        float off[WIDTH] = {0};
        for (int64_t i = 0; i < part; i++)
            off[i] = float_of(bits_of(((float)codes[begin + i] - zero) * scale - values[begin + i]) & INT32_MAX);
        if (!any(~(Ints)(load(off) <= limit)))
            continue;
        for (int64_t i = 0; i < part; i++)
            if (!(off[i] <= most))
                wrong |= judge_value(check, values[begin + i], off[i], zero, scale, size);
    }
    return wrong;
}

/* Whether a scale is what a range of values asks for; most are beyond doubt before anything is divided. */
static int judge_scale(const Check *check, float low, float high, float scale) {
    const float top = (float)((1 << check->call.num_bits) - 1), tiny = (float)check->allowed.tiny;
    const float most = -low > high ? -low : high, range = check->call.symmetric ? 2 * most : high - low;
    const double near = (double)range * (check->call.num_bits == 4 ? 1.0 / 15 : 1.0 / 255);
    const double coarse = near * check->allowed.coarse * 0.9999, fine = near * check->allowed.fine * 1.0001;
    if (bits_of(range) < INFINITE && scale <= coarse && scale >= fine)
        return 0;
    const float wanted = check->call.symmetric ? most / (top / 2) : high / top - low / top;
    if (wanted > tiny && !((scale - tiny) / wanted <= check->allowed.coarse))
        return DOUBTFUL;
    return wanted > 64 * tiny && !((scale + tiny) / wanted >= check->allowed.fine) ? DOUBTFUL : 0;
}

static int check_group(Check *check, const float *values, const uint8_t *codes, float zero, float scale, Squares noise,
                       Squares signal) {
    const int64_t count = check->call.group_size;
    const float size = scale < 0 ? -scale : scale;
    Largest seen = {{0}, {0}, {0}};
    look(values, codes, count, zero, scale, &seen, noise, signal);
    const int32_t top = largest(seen.off), high = largest(seen.high), low = largest(seen.low);
    if (top >= INFINITE || high >= INFINITE || low >= INFINITE)
        return DOUBTFUL;
    const float off = float_of((uint32_t)top);
    int wrong = 0;
    if (!(off <= 0.999 * check->steps * size)) { /* else it is not the largest */
        const float steps = off == 0 ? 0 : off / size;
        check->steps = steps > check->steps ? steps : check->steps;
        wrong = bits_of(steps) == INFINITE ? DOUBTFUL : 0;
    }
    if (!(off <= (float)check->allowed.inside * size))
        wrong |= judge_far(check, values, codes, count, zero, scale, size);
    const float least = -float_of((uint32_t)low), most = float_of((uint32_t)high);
    check->low = least < check->low ? least : check->low;
    check->high = most > check->high ? most : check->high;
    return wrong | (check->whole ? 0 : judge_scale(check, least, most, scale));
}

static float scale_at(const Check *check, int64_t row, int64_t group) {
    const int64_t index = row * check->scales.row + group * check->scales.column;
    float scale;
    decode((const char *)check->call.scales + index * nbytes_of(check->call.scale_dtype), check->call.scale_dtype, 1,
           &scale);
    return scale;
}

/* One row. values: the source's, or null: then its parameters alone are looked at. */
static int check_row(Check *check, int64_t row, const float *values, const uint8_t *codes) {
    const int64_t size = check->call.group_size, groups = check->call.columns / size;
    Squares noise = {{0}}, signal = {{0}};
    int wrong = 0;
    for (int64_t group = 0; group < groups; group++) {
        const float scale = scale_at(check, row, group);
        const int32_t zero = zero_at(check, row, group);
        if ((bits_of(scale) & INT32_MAX) >= INFINITE || (scale < 0 && !check->allowed.negative))
            return DOUBTFUL;
        if (zero < 0 || zero >= 1 << check->call.num_bits)
            return DOUBTFUL;
        if (values)
            wrong |= check_group(check, values + group * size, codes + group * size, (float)zero, scale, noise, signal);
    }
    check->noise += total(noise);
    check->signal += total(signal);
    return wrong;
}

int NAMED(check_, LEVEL)(Check *check) {
    const Call *call = &check->call;
    const int64_t columns = call->columns, band = rows_at_once(check), pitch = pitch_of(columns);
    const int with = call->weights != NULL;
    float *values = malloc((size_t)(columns + LANES) * sizeof *values);
    uint8_t *codes = malloc((size_t)(with ? 2 * band * pitch : 1)); /* and their words, which take no more room */
    int wrong = values && codes ? 0 : NO_MEMORY;
    for (int64_t first = 0; first < call->rows && !wrong; first += band) {
        const int64_t rows = call->rows - first < band ? call->rows - first : band;
        if (with)
            unpack(check, first, rows, codes + band * pitch, codes);
        for (int64_t i = 0; i < rows; i++) {
            if (with)
                read_row(call, first + i, values);
            wrong |= check_row(check, first + i, with ? values : NULL, with ? codes + i * pitch : NULL);
        }
    }
    if (with && !wrong && check->whole && check->last)
        wrong |= judge_scale(check, (float)check->low, (float)check->high, scale_at(check, 0, 0));
    free(values), free(codes);
    return wrong;
}

/* Rows after their steps, beside the plain numbers that are stored of them: `codes`, of `dtype`. */
int NAMED(same_, LEVEL)(Call *call) {
    const int64_t columns = call->columns;
    float *values = malloc((size_t)columns * sizeof *values), *stored = malloc((size_t)columns * sizeof *stored);
    int wrong = values && stored ? 0 : NO_MEMORY;
    for (int64_t row = 0; row < call->rows && !wrong; row++) {
        read_row(call, row, values);
        decode(call->codes.bytes + row * columns * nbytes_of(call->dtype), call->dtype, columns, stored);
        int differs = 0;
        for (int64_t i = 0; i < columns; i++)
            differs |= !(rounded(values[i], call->dtype) == stored[i]) || values[i] != values[i];
        wrong = differs ? DOUBTFUL : 0;
    }
    free(values), free(stored);
    return wrong;
}

int NAMED(gather_, LEVEL)(Strips *strips) {
    for (int64_t i = 0; i < strips->count; i++) {
        uint8_t *bytes = strips->bytes + i * strips->nbytes;
        if (read_all(strips->fd, bytes, strips->nbytes, strips->offset + i * strips->stride))
            return UNREAD;
    }
    return 0;
}
