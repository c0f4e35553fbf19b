#define _XOPEN_SOURCE 700 /* pread and pwrite */
#define _FILE_OFFSET_BITS 64
#include "io.h"
#include "native.h"

#include <errno.h>
#include <string.h>

#if defined(_WIN32)
#include <io.h>
#include <windows.h>

static OVERLAPPED place_of(int64_t offset) {
    OVERLAPPED place = {0};
    place.Offset = (DWORD)offset;
    place.OffsetHigh = (DWORD)(offset >> 32);
    return place;
}

static int64_t read_some(int64_t fd, void *bytes, int64_t nbytes, int64_t offset) {
    OVERLAPPED place = place_of(offset);
    DWORD count = 0;
    if (ReadFile((HANDLE)_get_osfhandle((int)fd), bytes, (DWORD)nbytes, &count, &place))
        return count;
    if (GetLastError() == ERROR_HANDLE_EOF)
        return 0;
    return errno = EIO, -1;
}

static int64_t write_some(int64_t fd, const void *bytes, int64_t nbytes, int64_t offset) {
    OVERLAPPED place = place_of(offset);
    DWORD count = 0;
    if (WriteFile((HANDLE)_get_osfhandle((int)fd), bytes, (DWORD)nbytes, &count, &place))
        return count;
    return errno = GetLastError() == ERROR_DISK_FULL ? ENOSPC : EIO, -1;
}
#else
#include <unistd.h>

static int64_t read_some(int64_t fd, void *bytes, int64_t nbytes, int64_t offset) {
    return pread((int)fd, bytes, (size_t)nbytes, (off_t)offset);
}

static int64_t write_some(int64_t fd, const void *bytes, int64_t nbytes, int64_t offset) {
    return pwrite((int)fd, bytes, (size_t)nbytes, (off_t)offset);
}
#endif

typedef int64_t (*Writer)(int64_t fd, const void *bytes, int64_t nbytes, int64_t offset);

/* Tests put one here that fails: it answers with the bytes that it has written, or a negative errno. */
static Writer writer;

EXPORTED void quantconvert_write_through(Writer given) { writer = given; }

int read_all(int64_t fd, void *bytes, int64_t nbytes, int64_t offset) {
    for (int64_t done = 0; done < nbytes;) {
        int64_t left = nbytes - done, count;
        count = read_some(fd, (char *)bytes + done, left < 1 << 30 ? left : 1 << 30, offset + done);
        if (count < 0 && errno != EINTR)
            return errno;
        if (count == 0)
            return -1;
        done += count > 0 ? count : 0;
    }
    return 0;
}

int write_all(int64_t fd, const void *bytes, int64_t nbytes, int64_t offset) {
    for (int64_t done = 0; done < nbytes;) {
        const void *rest = (const char *)bytes + done;
        int64_t left = nbytes - done < 1 << 30 ? nbytes - done : 1 << 30, count;
        count = writer ? writer(fd, rest, left, offset + done) : write_some(fd, rest, left, offset + done);
        if (writer && count < 0)
            return (int)-count;
        if (count < 0 && errno != EINTR)
            return errno;
        done += count > 0 ? count : 0;
    }
    return 0;
}

EXPORTED int quantconvert_copy(Transfer *copy) {
    for (int64_t done = 0; done < copy->nbytes;) {
        int64_t left = copy->nbytes - done, part = left < copy->buffer_nbytes ? left : copy->buffer_nbytes;
        int error = read_all(copy->source, copy->buffer, part, copy->source_offset + done);
        if (error) {
            copy->error = error < 0 ? 0 : error;
            return UNREAD;
        }
        copy->error = write_all(copy->target, copy->buffer, part, copy->target_offset + done);
        if (copy->error)
            return UNWRITTEN;
        done += part;
    }
    return 0;
}

#define P1 0x9E3779B185EBCA87u
#define P2 0xC2B2AE3D27D4EB4Fu
#define P3 0x165667B19E3779F9u
#define P4 0x85EBCA77C2B2AE63u
#define P5 0x27D4EB2F165667C5u

static uint64_t turned_left(uint64_t value, int count) { return value << count | value >> (64 - count); }

static uint64_t word_at(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

static uint64_t taken(uint64_t sum, uint64_t word) { return turned_left(sum + word * P2, 31) * P1; }

static uint64_t merged(uint64_t sum, uint64_t lane) { return (sum ^ taken(0, lane)) * P1 + P4; }

uint64_t xxh64(const uint8_t *bytes, int64_t nbytes, uint64_t seed) {
    const uint8_t *end = bytes + nbytes;
    uint64_t sum = seed + P5;
    if (nbytes >= 32) {
        uint64_t a = seed + P1 + P2, b = seed + P2, c = seed, d = seed - P1;
        for (; end - bytes >= 32; bytes += 32) {
            a = taken(a, word_at(bytes)), b = taken(b, word_at(bytes + 8));
            c = taken(c, word_at(bytes + 16)), d = taken(d, word_at(bytes + 24));
        }
        sum = turned_left(a, 1) + turned_left(b, 7) + turned_left(c, 12) + turned_left(d, 18);
        sum = merged(merged(merged(merged(sum, a), b), c), d);
    }
    sum += (uint64_t)nbytes;
    for (; end - bytes >= 8; bytes += 8)
        sum = turned_left(sum ^ taken(0, word_at(bytes)), 27) * P1 + P4;
    if (end - bytes >= 4) {
        uint32_t half;
        memcpy(&half, bytes, sizeof half);
        sum = turned_left(sum ^ half * P1, 23) * P2 + P3;
        bytes += 4;
    }
    for (; bytes < end; bytes++)
        sum = turned_left(sum ^ *bytes * P5, 11) * P1;
    sum = (sum ^ sum >> 33) * P2;
    sum = (sum ^ sum >> 29) * P3;
    return sum ^ sum >> 32;
}

EXPORTED uint64_t quantconvert_xxh64(const uint8_t *bytes, int64_t nbytes, uint64_t seed) {
    return xxh64(bytes, nbytes, seed);
}
