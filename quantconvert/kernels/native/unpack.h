/* Words back to codes, a byte each: the inverse of pack.h, for what may also be stored turned (columns first). */
#ifndef QUANTCONVERT_UNPACK_H
#define QUANTCONVERT_UNPACK_H

#include "check.h"

#include <string.h>

/* Columns of turned words that are taken at once: a row of each block is a line of the cache. */
enum { BLOCK = 64, SIDE = 16, MOST_ROWS = 128, FEWEST_ROWS = 32 };

static inline uint32_t word_at(const uint8_t *words, int64_t index) {
    uint32_t word;
    memcpy(&word, words + 4 * index, sizeof word);
    return word;
}

/* Rows that are unpacked together. */
static inline int64_t rows_at_once(const Check *check) {
    const int64_t fit = (1 << 20) / check->call.columns / 8 * 8;
    if (check->call.codes.along != ROWS && check->codes.column == 1)
        return 1;
    return fit < FEWEST_ROWS ? FEWEST_ROWS : fit > MOST_ROWS ? MOST_ROWS : fit;
}

/* Bytes from a row of unpacked codes to the next: room for a whole block beyond the end. */
static inline int64_t pitch_of(int64_t columns) { return (columns + 2 * BLOCK) / BLOCK * BLOCK; }

static void unpack_turned_rows(const Check *check, int64_t first, int64_t rows, uint8_t *codes) {
    const Packed *packed = &check->call.codes;
    const int64_t columns = check->call.columns, pitch = pitch_of(columns);
    const int64_t bits = check->call.num_bits, per = 32 / bits;
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t left = 0; left < columns; left += BLOCK)
        for (int64_t top = 0; top < rows; top += per) {
            uint32_t words[BLOCK] = {0};
            const int64_t count = columns - left < BLOCK ? columns - left : BLOCK;
            const int64_t place = left * check->codes.column + (first + top) / per * check->codes.row;
            for (int64_t j = 0; j < count; j++)
                words[j] = word_at(packed->bytes, place + j * check->codes.column);
            for (int64_t k = 0; k < per; k++) {
                uint8_t *row = codes + (top + packed->order[k]) * pitch + left;
                for (int64_t j = 0; j < BLOCK; j++)
                    row[j] = (uint8_t)(words[j] >> (k * bits) & mask);
            }
        }
}

/* To words, row by row. */
static void turn_columns(const Check *check, int64_t first, int64_t rows, int64_t words, uint8_t *turned) {
    for (int64_t top = 0; top < rows; top += SIDE)
        for (int64_t left = 0; left < words; left += SIDE)
            for (int64_t j = left; j < left + SIDE && j < words; j++)
                for (int64_t i = top; i < top + SIDE && i < rows; i++) {
                    const int64_t place = j * check->codes.column + (first + i) * check->codes.row;
                    const uint32_t word = word_at(check->call.codes.bytes, place);
                    memcpy(turned + 4 * (i * words + j), &word, sizeof word);
                }
}

/* Two codes of each byte beside each other. */
static void unpack_halves(const uint8_t *restrict bytes, int64_t count, uint8_t *restrict codes) {
    for (int64_t i = 0; i < count; i++) {
        uint16_t pair = (uint16_t)((bytes[i] | bytes[i] << 4) & 0x0f0f);
        memcpy(codes + 2 * i, &pair, sizeof pair);
    }
}

static void unpack_half(const uint8_t *restrict bytes, int64_t count, int upper, uint8_t *restrict codes) {
    for (int64_t i = 0; i < count; i++)
        codes[i] = (uint8_t)(upper ? bytes[i] >> 4 : bytes[i] & 15);
}

/* A row of codes from its bytes, which lie one after the other. */
static void unpack_row(const Check *check, int64_t row, const uint8_t *bytes, uint8_t *restrict codes) {
    const int64_t columns = check->call.columns;
    const uint8_t shift = (uint8_t)check->call.codes.shift;
    if (check->call.codes.along == PAIRS)
        unpack_half(bytes, columns, row % 2 == 1, codes);
    else if (check->call.num_bits == 4)
        unpack_halves(bytes, (columns + 1) / 2, codes);
    else
        for (int64_t i = 0; i < columns; i++)
            codes[i] = (uint8_t)(bytes[i] - shift);
}

/* Rows first .. first + rows of codes, `pitch_of` bytes apart. scratch: their words, where they are stored turned. */
static void unpack(const Check *check, int64_t first, int64_t rows, uint8_t *scratch, uint8_t *codes) {
    const Packed *packed = &check->call.codes;
    const int64_t columns = check->call.columns, per = 32 / check->call.num_bits, words = (columns + per - 1) / per;
    if (packed->along == ROWS) {
        unpack_turned_rows(check, first, rows, codes);
        return;
    }
    const int turned = check->codes.column != 1;
    if (turned)
        turn_columns(check, first, rows, words, scratch);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t row = first + i, from = packed->along == PAIRS ? row / 2 : row;
        const int64_t nbytes = packed->along == COLUMNS ? 4 : 1;
        const uint8_t *bytes = turned ? scratch + 4 * i * words : packed->bytes + from * check->codes.row * nbytes;
        unpack_row(check, row, bytes, codes + i * pitch_of(columns));
    }
}

/* One zero point; the midpoint where none is stored. */
static inline int32_t zero_at(const Check *check, int64_t row, int64_t group) {
    const Packed *packed = &check->call.zeros;
    const int64_t bits = check->call.num_bits, per = 32 / bits;
    if (packed->along == NOTHING)
        return 1 << (bits - 1);
    if (packed->along == BYTES)
        return (uint8_t)(packed->bytes[row * check->zeros.row + group * check->zeros.column] - packed->shift);
    const uint32_t word = word_at(packed->bytes, row / per * check->zeros.row + group * check->zeros.column);
    int64_t place = 0;
    while (packed->order[place] != row % per)
        place++;
    return (int32_t)(word >> (place * bits) & ((1u << bits) - 1)) - packed->shift;
}

#endif
