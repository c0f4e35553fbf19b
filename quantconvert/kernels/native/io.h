/* Bytes of files: positioned reads and writes of all that is asked for, and the checksum of the journal.
 *
 * `Transfer` is `CopyFields` in quantconvert/kernels/native/library.py.
 */
#ifndef QUANTCONVERT_IO_H
#define QUANTCONVERT_IO_H

#include <stdint.h>

typedef struct {
    int64_t source; /* descriptors */
    int64_t target;
    int64_t source_offset;
    int64_t target_offset;
    int64_t nbytes;
    uint8_t *buffer;
    int64_t buffer_nbytes;
    int64_t error; /* an errno, of the call that failed; 0 where the source ended too early */
} Transfer;

/* Each returns 0, -1 where the file ends before, else an errno. */
int read_all(int64_t fd, void *bytes, int64_t nbytes, int64_t offset);
int write_all(int64_t fd, const void *bytes, int64_t nbytes, int64_t offset);

/* XXH64 (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md). */
uint64_t xxh64(const uint8_t *bytes, int64_t nbytes, uint64_t seed);

#endif
