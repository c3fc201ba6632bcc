// A matrix [out, in] as the kernels read it, and what every kernel computes: y = W x (+ b), fp32 accumulation.
#pragma once
#include <cmath>
#include <cstdint>

namespace pumice {

enum Kind : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

constexpr int MAX_ROWS = 8;  // rows of x in one pass over the weights
constexpr int GROUP = 32;    // columns that share a scale

// The order of the fields is known to library.py.
struct Matrix {
    int64_t out, in;
    const uint8_t* bits;      // [out, ceil(in/8)], lowest bit first; null: every weight is stored
    const void* values;       // the stored weights, row by row; in int4 two to a byte, low nibble first
    const int32_t* offsets;   // [out+1]: where a row's values start (with bits only)
    const uint16_t* scales;   // [out, ceil(in/32)] in fp16 (int8, int4)
    const float* bias;        // [out] or null
    int32_t kind;
    int64_t stride;           // values from one row to the next, where every weight is stored
};

inline int64_t bit_stride(const Matrix& m) { return (m.in + 7) / 8; }
inline int64_t groups(const Matrix& m) { return (m.in + GROUP - 1) / GROUP; }
inline int64_t padded(const Matrix& m) { return groups(m) * GROUP; }  // columns of x that may be read, zeros behind `in`

inline float half_to_float(uint16_t h) {
    const int exponent = (h >> 10) & 31, fraction = h & 1023;
    const float sign = h >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24));
}

// Rows [first, last) of y for n <= MAX_ROWS rows of x, in fp32, each `padded(m)` long. y is [n, out].
using Product = void (*)(const Matrix& m, const float* x, int n, float* y, int64_t first, int64_t last);

// Those rows of y that are in a list, for a matrix in fp32 or bf16 that stores every weight.
using Gather = void (*)(const Matrix& m, const float* x, int n, float* y, const int32_t* list, int64_t count);

// y[r, j] += Σ_i a[r, live_i] · m[live_i, j] for columns [first, last) of the rows of m. a is [n, m.out], y [n, m.in].
using Accumulate = void (*)(const Matrix& m, const int32_t* live, int64_t count, const float* a, int n, float* y,
                            int64_t first, int64_t last);

// x in int8, a scale for each group of 32 columns. y = W x̂ for rows [first, last) of a copy of near.py, of which `first`
// is a multiple of 8: its codes are [out/8, groups, 4, 8, 4], four bytes of each of eight rows at a time, of which the low
// nibbles are four columns and the high ones the next four; a code has 8 added. Its scales are [out/8, groups, 8].
struct Rounded {
    const int8_t* codes;    // [n, padded(m)]
    const float* scales;    // [n, groups(m)]
    const int32_t* eights;  // [n, groups(m)]: 8 · Σ codes
};
constexpr int LANES = 8;  // rows of a copy that lie together
using Near = void (*)(const Matrix& m, const Rounded& x, int n, float* y, int64_t first, int64_t last);

void portable_near(const Matrix& m, const Rounded& x, int n, float* y, int64_t first, int64_t last);
void portable(const Matrix& m, const float* x, int n, float* y, int64_t first, int64_t last);
void portable_gather(const Matrix& m, const float* x, int n, float* y, const int32_t* list, int64_t count);
void portable_accumulate(const Matrix& m, const int32_t* live, int64_t count, const float* a, int n, float* y,
                         int64_t first, int64_t last);
#ifdef PUMICE_AVX2
void avx2_near(const Matrix& m, const Rounded& x, int n, float* y, int64_t first, int64_t last);
void avx2(const Matrix& m, const float* x, int n, float* y, int64_t first, int64_t last);
void avx2_gather(const Matrix& m, const float* x, int n, float* y, const int32_t* list, int64_t count);
void avx2_accumulate(const Matrix& m, const int32_t* live, int64_t count, const float* a, int n, float* y,
                     int64_t first, int64_t last);
#endif

}  // namespace pumice
