/* Codes to words, as quantconvert/layouts/packing.py has them. Little-endian: the first value in the lowest bits. */
#ifndef QUANTCONVERT_PACK_H
#define QUANTCONVERT_PACK_H

#include "native.h"

#include <string.h>

/* Rows that are packed together. */
static inline int64_t band_of(const Packed *packed, int32_t num_bits) {
    return packed->along == ROWS ? 32 / num_bits : packed->along == PAIRS ? 2 : 1;
}

/* Bytes of a band. */
static inline int64_t band_nbytes(const Packed *packed, int32_t num_bits, int64_t columns) {
    int64_t per_word = 32 / num_bits;
    return packed->along == ROWS ? 4 * columns : packed->along == COLUMNS ? 4 * ((columns + per_word - 1) / per_word)
                                                                          : columns;
}

static inline void pack_halves(const uint8_t *restrict low, const uint8_t *restrict high, int64_t count,
                               uint8_t *restrict out) {
    for (int64_t i = 0; i < count; i++)
        out[i] = (uint8_t)(low[i] | high[i] << 4);
}

static inline void pack_columns(const uint8_t *codes, int32_t num_bits, int64_t columns, int64_t nbytes, uint8_t *out) {
    int64_t full = columns;
    if (num_bits == 8) {
        memcpy(out, codes, (size_t)columns);
    } else {
        full = columns / 2;
        for (int64_t i = 0; i < full; i++) {
            uint16_t pair;
            memcpy(&pair, codes + 2 * i, sizeof pair);
            out[i] = (uint8_t)(pair | pair >> 4);
        }
        if (columns % 2)
            out[full++] = codes[columns - 1];
    }
    memset(out + full, 0, (size_t)(nbytes - full));
}

/* Four planes of bytes, byte by byte. */
static inline void interleave(const uint8_t *const planes[4], int64_t count, uint8_t *out) {
    const uint8_t *restrict a = planes[0], *restrict b = planes[1], *restrict c = planes[2], *restrict d = planes[3];
    for (int64_t i = 0; i < count; i++) {
        uint32_t word = (uint32_t)a[i] | (uint32_t)b[i] << 8 | (uint32_t)c[i] << 16 | (uint32_t)d[i] << 24;
        memcpy(out + 4 * i, &word, sizeof word);
    }
}

/* rows: those of a band, of zeros where there are none left; scratch: four bytes a column. */
static inline void pack_band(const Packed *packed, int32_t num_bits, const uint8_t *const *rows, int64_t columns,
                             uint8_t *scratch, uint8_t *out) {
    const uint8_t *planes[4];
    switch (packed->along) {
    case COLUMNS:
        pack_columns(rows[0], num_bits, columns, band_nbytes(packed, num_bits, columns), out);
        break;
    case PAIRS:
        pack_halves(rows[0], rows[1], columns, out);
        break;
    case BYTES:
        memcpy(out, rows[0], (size_t)columns);
        break;
    case ROWS:
        for (int k = 0; k < 4; k++) {
            if (num_bits == 8) {
                planes[k] = rows[packed->order[k]];
            } else {
                uint8_t *plane = scratch + k * columns;
                pack_halves(rows[packed->order[2 * k]], rows[packed->order[2 * k + 1]], columns, plane);
                planes[k] = plane;
            }
        }
        interleave(planes, columns, out);
        break;
    default:
        break;
    }
}

#endif
