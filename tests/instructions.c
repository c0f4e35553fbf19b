/* Calls the library once, for test_instructions.py: LIBRARY LEVEL ROWS NUM_BITS SYMMETRIC ALONG. Weights are random
 * bfloat16 numbers of 2048 columns, in groups of 128; the same for any number of rows. */
#include "native.h"

#include <dlfcn.h>
#include <stdlib.h>

enum { MOST_ROWS = 256, COLUMNS_OF_ALL = 2048 };

int main(int count, char **words) {
    void *library = count == 7 ? dlopen(words[1], RTLD_NOW) : NULL;
    int (*quantize)(Call *, int) = library ? (int (*)(Call *, int))dlsym(library, "quantconvert_quantize") : NULL;
    if (!quantize)
        return 2;
    const int64_t size = MOST_ROWS * COLUMNS_OF_ALL;
    uint16_t *weights = malloc(2 * (size_t)size);
    uint64_t state = 1;
    for (int64_t i = 0; i < size; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u; /* Knuth's, MMIX */
        weights[i] = (uint16_t)(0x3c00 + (state >> 33 & 0x1ff) + (state >> 63 << 15));
    }
    Call call = {0};
    call.weights = weights, call.stride = call.columns = COLUMNS_OF_ALL, call.group_size = 128;
    call.rows = atoi(words[3]), call.num_bits = atoi(words[4]), call.symmetric = atoi(words[5]);
    call.codes.along = atoi(words[6]), call.zeros.along = call.symmetric ? NOTHING : call.codes.along;
    for (int i = 0; i < PER_WORD_MAX; i++)
        call.codes.order[i] = call.zeros.order[i] = i;
    call.codes.bytes = malloc((size_t)size), call.zeros.bytes = malloc((size_t)size), call.scales = malloc((size_t)size);
    return quantize(&call, atoi(words[2])) || !(call.noise > 0) || !(call.signal > call.noise);
}
