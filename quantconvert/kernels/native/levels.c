/* Which instruction sets this library was compiled for, which of them this processor has, and each call by its number.
 *
 * A function `f` of a file that is compiled once for each level is there as f_v2, f_v3 and f_v4, elsewhere as f_plain;
 * EXPORT gives it out as `quantconvert_f(fields, level)`.
 */
#include "check.h"
#include "factors.h"
#include "native.h"
#include "unit.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>

#define EXPORT(name, Fields)                                                                                            \
    int name##_v2(Fields *), name##_v3(Fields *), name##_v4(Fields *);                                                 \
    EXPORTED int quantconvert_##name(Fields *fields, int level) {                                                      \
        return level == 0 ? name##_v2(fields) : level == 1 ? name##_v3(fields) : name##_v4(fields);                    \
    }

static const char *const NAMES[] = {"x86-64-v2", "x86-64-v3", "x86-64-v4"};

/* How many levels, the lowest first, may run here: the instructions used, and the registers that the system keeps
 * (Intel's manual, volume 1, sections 14.3 and 15.2). */
static int available(void) {
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL | bit_AVX512CD;
    unsigned a, b, c, d, low = 0, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_1) || !(c & bit_SSSE3))
        return 0;
    if (c & bit_OSXSAVE)
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2))
        return 1;
    return (low & 0xe6) == 0xe6 && (b & avx512) == avx512 ? 3 : 2;
}
#else
#define EXPORT(name, Fields)                                                                                            \
    int name##_plain(Fields *);                                                                                        \
    EXPORTED int quantconvert_##name(Fields *fields, int level) { return (void)level, name##_plain(fields); }

#if defined(__aarch64__)
static const char *const NAMES[] = {"aarch64"};
#else
static const char *const NAMES[] = {"portable"};
#endif

static int available(void) { return 1; }
#endif

EXPORTED int quantconvert_abi(void) { return ABI; }

EXPORTED int quantconvert_levels(void) { return available(); }

EXPORTED const char *quantconvert_level(int level) { return NAMES[level]; }

/* Each returns 0, or what went wrong. */
EXPORT(quantize, Call)
EXPORT(convert, Unit)
EXPORT(check, Check)
EXPORT(same, Call)
EXPORT(gather, Strips)
EXPORT(factors, Site)
