/* Factors of one vector, from the files of its weights to numbers. Compiled once for each instruction set, as LEVEL. */
#include "factors.h"
#include "io.h"
#include "lanes.h"
#include "numbers.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define INFINITE 0x7f800000
#define MOST 100.0
#define ROWS_LEAST (1.0f / 256)
#define FLOAT16_ROOM 60000.0

enum { NEARBY = 16, SIDE = 32 };

/* What a call works in: the stored bytes of a run, its rows where they are stored transposed, one group of one row as
 * float32, sums of each column, and factors of each. */
typedef struct {
    uint8_t *stored;
    uint8_t *turned;
    float *values;
    double *total;
    float *divisor;
} Room;

/* Rows that a run takes of the stored matrix, or columns. */
static int64_t spanned(const Driver *driver, int64_t rows) { return (rows - 1) * driver->step + 1; }

#define TURN(name, Element)                                                                                            \
    static void name(const Driver *driver, const Element *restrict from, int64_t rows, Element *restrict to) {        \
        const int64_t stride = spanned(driver, rows), columns = driver->height, step = driver->step;                  \
        for (int64_t left = 0; left < columns; left += SIDE) {                                                         \
            const int64_t right = left + SIDE < columns ? left + SIDE : columns;                                       \
            for (int64_t i = 0; i < rows; i++)                                                                         \
                for (int64_t j = left; j < right; j++)                                                                 \
                    to[i * columns + j] = from[j * stride + i * step];                                                 \
        }                                                                                                              \
    }

TURN(turn_1, uint8_t)
TURN(turn_2, uint16_t)
TURN(turn_4, uint32_t)

/* The run's rows, *stride elements apart; null where they cannot be read. */
static const uint8_t *read_run(const Driver *driver, int64_t first, int64_t rows, const Room *room, int64_t *stride) {
    const int64_t element = nbytes_of((int32_t)driver->element), width = driver->width * element;
    const int64_t top = driver->start + first * driver->step, span = spanned(driver, rows);
    if (!driver->transposed) {
        *stride = driver->width * driver->step;
        return read_all(driver->fd, room->stored, span * width, driver->offset + top * width) ? NULL : room->stored;
    }
    for (int64_t j = 0; j < driver->height; j++)
        if (read_all(driver->fd, room->stored + j * span * element, span * element,
                     driver->offset + j * width + top * element))
            return NULL;
    *stride = driver->height;
    if (element == 1)
        turn_1(driver, room->stored, rows, room->turned);
    else if (element == 2)
        turn_2(driver, (const uint16_t *)room->stored, rows, (uint16_t *)room->turned);
    else
        turn_4(driver, (const uint32_t *)room->stored, rows, (uint32_t *)room->turned);
    return room->turned;
}

/* |values| over factors, in place; the largest of them, as an integer, so that a NaN counts as the largest. */
static float divide(float *restrict values, const float *restrict divisor, int64_t count) {
    const Ints size = (Ints){0} + INT32_MAX;
    Ints most = {0};
    int32_t each[WIDTH], found = 0;
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        Ints bits = (Ints)(load(values + i) / load(divisor + i)) & size;
        most = larger(most, bits);
        store_bits(values + i, bits);
    }
    memcpy(each, &most, sizeof each);
    for (int k = 0; k < WIDTH; k++)
        found = each[k] > found ? each[k] : found;
    for (; i < count; i++) {
        int32_t bits = (int32_t)(bits_of(values[i] / divisor[i]) & INT32_MAX);
        values[i] = float_of((uint32_t)bits);
        found = bits > found ? bits : found;
    }
    return float_of((uint32_t)found);
}

/* Adds each value's share of its group's largest to the sum of its column, row after row. */
static void add_rows(const Driver *driver, const uint8_t *rows, int64_t stride, int64_t first, int64_t count,
                     int64_t columns, const Room *room) {
    const int64_t element = nbytes_of((int32_t)driver->element), size = driver->group_size;
    float *restrict values = room->values;
    for (int64_t left = 0; left < columns; left += size) {
        double *restrict total = room->total + left;
        for (int64_t i = 0; i < count; i++) {
            decode_part(driver->meaning, rows + (i * stride + left) * element, (int32_t)driver->element, first + i, left,
                        size, values);
            const float found = divide(values, room->divisor + left, size);
            const float most = found < FLT_MIN ? FLT_MIN : found;
            for (int64_t j = 0; j < size; j++)
                total[j] += (double)(values[j] / most);
        }
    }
}

/* All runs of a driver; the rows that they are, negative where one cannot be read. */
static int64_t add_driver(const Driver *driver, int64_t columns, const Room *room) {
    const int64_t run = driver->run, runs = driver->runs, is_all = runs * run >= driver->rows;
    int64_t rows = 0;
    for (int64_t k = 0; k < runs; k++) {
        const int64_t first = is_all ? k * run : k * (driver->rows - run) / (runs > 1 ? runs - 1 : 1);
        const int64_t count = driver->rows - first < run ? driver->rows - first : run;
        int64_t stride;
        const uint8_t *stored = read_run(driver, first, count, room, &stride);
        if (!stored)
            return -1;
        add_rows(driver, stored, stride, first, count, columns, room);
        rows += count;
    }
    return rows;
}

/* A factor a column, of those that share it. */
static void spread(const Site *site, float *divisor) {
    const int64_t dim = site->head_dim;
    for (int64_t head = 0; head < site->columns / dim; head++)
        memcpy(divisor + head * dim, site->mu + head / site->repeat * dim, (size_t)dim * sizeof *divisor);
}

/* Factors times the mean share of their columns. */
static void take_means(const Site *site, const double *total, int64_t rows) {
    const int64_t dim = site->head_dim;
    for (int64_t i = 0; i < site->count; i++) {
        const double *head = total + i / dim * site->repeat * dim + i % dim;
        double sum = head[0];
        for (int64_t k = 1; k < site->repeat; k++)
            sum += head[k * dim];
        const float mean = (float)(sum / (double)site->repeat / (double)(rows > 1 ? rows : 1));
        const float found = mean > 0 && mean <= FLT_MAX ? site->mu[i] * mean : site->mu[i];
        site->mu[i] = found < FLT_MIN ? FLT_MIN : found;
    }
}

static int equalize(Site *site, const Room *room) {
    for (int64_t i = 0; i < site->count; i++)
        site->mu[i] = 1;
    for (int64_t pass = 0; pass < site->passes; pass++) {
        int64_t rows = 0;
        spread(site, room->divisor);
        memset(room->total, 0, (size_t)site->columns * sizeof *room->total);
        for (int64_t k = 0; k < site->num_drivers; k++) {
            const int64_t found = add_driver(site->drivers + k, site->columns, room);
            if (found < 0)
                return site->where = k, UNREAD;
            rows += found;
        }
        take_means(site, room->total, rows);
    }
    return 0;
}

/* The lower median of positive numbers, byte by byte of their bits. */
static float median(const float *values, int64_t count) {
    uint32_t prefix = 0, known = 0;
    int64_t rank = (count - 1) / 2;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t counts[256] = {0};
        uint32_t byte = 0;
        for (int64_t i = 0; i < count; i++)
            if ((bits_of(values[i]) & known) == prefix)
                counts[bits_of(values[i]) >> shift & 255]++;
        for (; byte < 255 && rank >= counts[byte]; byte++)
            rank -= counts[byte];
        prefix |= byte << shift;
        known |= (uint32_t)255 << shift;
    }
    return float_of(prefix);
}

static void clamp(float *mu, int64_t count) {
    const float middle = median(mu, count), low = (float)(1 / MOST), high = (float)MOST;
    for (int64_t i = 0; i < count; i++) {
        const float value = mu[i] / middle;
        mu[i] = value < low ? low : value > high ? high : value;
    }
}

static void calm_rows(float *mu, int64_t count) {
    float most = 0;
    for (int64_t i = 0; i < count; i++)
        most = mu[i] > most ? mu[i] : most;
    for (int64_t i = 0; i < count; i++) {
        const float value = mu[i] / most;
        mu[i] = value < ROWS_LEAST ? ROWS_LEAST : value;
    }
}

static float value_at(const Giver *giver, int64_t i) {
    const uint16_t *halves = giver->values;
    return giver->dtype == BF16 ? from_bf16(halves[i])
           : giver->dtype == F16 ? from_f16(halves[i])
                                 : ((const float *)giver->values)[i];
}

static void calm_norm(const Site *site) {
    uint32_t most = 0;
    for (int64_t i = 0; i < site->count; i++) {
        const float gain = value_at(site->givers, i) + (float)site->givers->plus;
        const uint32_t bits = bits_of(gain * site->mu[i]) & INT32_MAX;
        most = bits > most ? bits : most;
    }
    const double largest = site->root * (double)float_of(most);
    if (largest > FLOAT16_ROOM)
        for (int64_t i = 0; i < site->count; i++)
            site->mu[i] *= (float)(FLOAT16_ROOM / largest);
}

static void power_of_two(float *mu, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        mu[i] = float_of((bits_of(mu[i]) + (0x00800000 - 0x003504f4)) & INFINITE);
}

/* In the giver's dtype. A NaN may become anything: it is compared or divided by what is one, too. */
static double taken(double value, const Giver *giver) { return rounded((float)value, (int32_t)giver->dtype); }

/* What is lost of the other givers' element i where its factor is this. */
static double lost(const Site *site, int64_t i, double factor) {
    double sum = 0;
    for (int64_t k = 1; k < site->num_givers; k++) {
        const Giver *giver = site->givers + k;
        const double plus = (double)giver->plus, wanted = ((double)value_at(giver, i) + plus) * factor - plus;
        const double missed = taken(wanted, giver) - wanted, size = wanted < 0 ? -wanted : wanted;
        const double share = (missed < 0 ? -missed : missed) / (size + 1e-30);
        sum += share != share ? INFINITY : share > DBL_MAX ? DBL_MAX : share;
    }
    return sum;
}

static float settled(const Site *site, int64_t i) {
    const Giver *first = site->givers;
    const double plus = (double)first->plus, base = (double)value_at(first, i) + plus, mu = (double)site->mu[i];
    const int reach = site->num_givers > 1 ? NEARBY : 0;
    double best = 0, least = 0;
    int is_usable = 0;
    for (int k = -reach; k <= reach; k++) {
        const double near = mu * (1 + k / 256.0), stored = taken(base * near - plus, first) + plus;
        const double factor = base == 0 ? near : stored / base;
        const int usable = factor > 0 && factor <= DBL_MAX;
        const double loss = (usable ? 0 : INFINITY) + lost(site, i, factor);
        if (k == -reach || loss < least)
            best = factor, least = loss, is_usable = usable;
    }
    const float chosen = (float)best;
    return is_usable && chosen > 0 && chosen <= FLT_MAX ? chosen : 1;
}

/* What a driver's run takes as it is stored, and as rows. */
static int64_t run_nbytes(const Driver *driver) {
    const int64_t rows = driver->run < driver->rows ? driver->run : driver->rows;
    const int64_t across = driver->transposed ? driver->height : driver->width;
    return spanned(driver, rows) * across * nbytes_of((int32_t)driver->element);
}

static int make_room(const Site *site, Room *room) {
    int64_t stored = 0, turned = 0, values = 0;
    for (int64_t k = 0; k < site->num_drivers; k++) {
        const Driver *driver = site->drivers + k;
        const int64_t nbytes = run_nbytes(driver);
        stored = nbytes > stored ? nbytes : stored;
        turned = driver->transposed && nbytes > turned ? nbytes : turned;
        values = driver->group_size > values ? driver->group_size : values;
    }
    room->stored = malloc((size_t)stored + 1);
    room->turned = malloc((size_t)turned + 1);
    room->values = malloc((size_t)values * sizeof *room->values + 1);
    room->total = malloc((size_t)site->columns * sizeof *room->total + 1);
    room->divisor = malloc((size_t)site->columns * sizeof *room->divisor + 1);
    return room->stored && room->turned && room->values && room->total && room->divisor ? 0 : NO_MEMORY;
}

int NAMED(factors_, LEVEL)(Site *site) {
    Room room;
    int wrong = make_room(site, &room);
    wrong = wrong ? wrong : equalize(site, &room);
    free(room.stored), free(room.turned), free(room.values), free(room.total), free(room.divisor);
    if (wrong)
        return wrong;
    clamp(site->mu, site->count);
    if (site->bound == CALM_ROWS)
        calm_rows(site->mu, site->count);
    else if (site->bound == CALM_NORM)
        calm_norm(site);
    if (site->exact)
        power_of_two(site->mu, site->count);
    for (int64_t i = 0; i < site->count && site->num_givers; i++)
        site->mu[i] = settled(site, i);
    return 0;
}
