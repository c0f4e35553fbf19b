/* One row from what is stored to float32, after its steps (sources/steps/scale.py). */
#ifndef QUANTCONVERT_ROW_H
#define QUANTCONVERT_ROW_H

#include "native.h"
#include "numbers.h"

static inline void take_steps(const Call *call, int64_t row, float *restrict values) {
    for (int64_t k = 0; k < call->num_steps; k++) {
        const Step *step = call->steps + k;
        const float *restrict factors = step->factors;
        const int64_t plus = step->way == OF_ONE;
        if (step->way == DIVIDED) {
            for (int64_t i = 0; i < call->columns; i++)
                values[i] /= factors[i];
        } else if (step->way == MULTIPLIED) {
            if (row >= step->start)
                for (int64_t i = 0; i < call->columns; i++)
                    values[i] *= factors[row - step->start];
        } else {
            for (int64_t i = 0; i < call->columns; i++) {
                float value = plus ? values[i] + 1 : values[i];
                value = i >= step->start ? value * factors[i - step->start] : value;
                values[i] = plus ? value - 1 : value;
            }
        }
    }
}

static inline void read_row(const Call *call, int64_t row, float *values) {
    const char *stored = (const char *)call->weights + row * call->stride * nbytes_of(call->element);
    decode_part(call->meaning, stored, call->element, call->first_row + row, 0, call->columns, values);
    take_steps(call, call->first_row + row, values);
}

#endif
