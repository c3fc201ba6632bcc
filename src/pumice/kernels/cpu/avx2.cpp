// The product with AVX2, FMA, F16C and BMI2. This file alone is compiled for them; api.cpp asks the processor first.
//
// Packed weights come eight columns at a time: one byte of the bitmask says which of the eight are stored, a table turns
// it into the permutation that spreads the next stored weights over their columns with zeros between, one FMA a row of x
// follows, and the pointer moves on by the number of bits. That add is the only chain between two steps.
#include <immintrin.h>

#include <type_traits>

#include "matrix.h"

namespace pumice {
namespace {

struct Tables {
    alignas(32) int32_t lanes[256][8]{};   // fp32: source lane, or the sign bit for a zero
    alignas(16) uint8_t pairs[256][16]{};  // bf16: source bytes, or 0x80 for a zero
    alignas(8) uint8_t bytes[256][8]{};    // int8
    uint32_t nibbles[256]{};               // int4: 0xf where a weight is stored

    constexpr Tables() {
        for (int mask = 0; mask < 256; ++mask) {
            for (int lane = 0, next = 0; lane < 8; ++lane) {
                const bool kept = mask >> lane & 1;
                lanes[mask][lane] = kept ? next : INT32_MIN;
                bytes[mask][lane] = uint8_t(kept ? next : 0x80);
                pairs[mask][2 * lane] = uint8_t(kept ? 2 * next : 0x80);
                pairs[mask][2 * lane + 1] = uint8_t(kept ? 2 * next + 1 : 0x80);
                nibbles[mask] |= kept ? 0xfu << (4 * lane) : 0u;
                next += kept;
            }
        }
    }
};
constexpr Tables tables;  // made by the compiler: code that runs while the library loads must not use AVX2

inline __m256 from_bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
inline __m256 from_int8(__m128i v) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)); }
inline __m256 from_int4(uint32_t v) {
    const __m256i up = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);  // each nibble to the top, then down with its sign
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sllv_epi32(_mm256_set1_epi32(int32_t(v)), up), 28));
}
inline uint64_t load64(const uint8_t* p) {
    uint64_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return word;
}
inline uint32_t load32(const uint8_t* p) {
    uint32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return word;
}

// Eight columns of a row, of which `mask` are stored from number `at` on.
template <int K>
inline __m256 spread(const void* values, int64_t at, unsigned mask) {
    if constexpr (K == F32) {
        const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(tables.lanes[mask]));
        const __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(static_cast<const float*>(values) + at), lanes);
        return _mm256_blendv_ps(v, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
    } else if constexpr (K == BF16) {
        const auto* p = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(values) + at);
        const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(tables.pairs[mask]));
        return from_bf16(_mm_shuffle_epi8(_mm_loadu_si128(p), order));
    } else if constexpr (K == INT8) {
        const auto* p = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(values) + at);
        const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(tables.bytes[mask]));
        return from_int8(_mm_shuffle_epi8(_mm_loadl_epi64(p), order));
    } else {
        const uint64_t word = load64(static_cast<const uint8_t*>(values) + (at >> 1)) >> (4 * (at & 1));
        return from_int4(_pdep_u32(uint32_t(word), tables.nibbles[mask]));
    }
}

// Eight columns of a row that stores all of them; the rows of int4 start at a byte.
template <int K>
inline __m256 plain(const void* values, int64_t at) {
    if constexpr (K == F32) return _mm256_loadu_ps(static_cast<const float*>(values) + at);
    if constexpr (K == BF16)
        return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(values) + at)));
    if constexpr (K == INT8)
        return from_int8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(values) + at)));
    return from_int4(load32(static_cast<const uint8_t*>(values) + (at >> 1)));
}

// The last columns of a row, fewer than eight, with zeros behind them: what follows in memory may be anything, or nothing.
template <int K>
inline __m256 edge(const void* values, int64_t at, int64_t count) {
    if constexpr (K == F32 || K == BF16) {
        constexpr int64_t size = K == F32 ? 4 : 2;
        alignas(32) char rest[8 * size] = {};
        __builtin_memcpy(rest, static_cast<const char*>(values) + at * size, size_t(count * size));
        return plain<K>(rest, 0);
    } else {
        return plain<K>(values, at);  // codes have spare memory behind them
    }
}

inline float total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

template <int K, int R, bool Packed>
void rows(const Matrix& m, const float* x, float* y, int64_t first, int64_t last) {
    constexpr bool scaled = K == INT8 || K == INT4;
    constexpr int chains = R == 1 ? 4 : R == 2 ? 2 : 1;  // independent sums, so that no FMA waits for the one before
    const int64_t width = padded(m), stride = bit_stride(m);
    const int64_t full = m.in / GROUP;                   // groups of 32 columns; the rest is done byte by byte
    for (int64_t row = first; row < last; ++row) {
        const uint8_t* bits = Packed ? m.bits + row * stride : nullptr;
        const uint16_t* scales = scaled ? m.scales + row * groups(m) : nullptr;
        int64_t at = Packed ? m.offsets[row] : row * m.stride;
        __m256 sum[R][chains];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < chains; ++c) sum[r][c] = _mm256_setzero_ps();

        const auto step = [&](int64_t byte, bool ends) __attribute__((always_inline)) {
            if constexpr (Packed) {
                const unsigned mask = bits[byte];
                const __m256 w = spread<K>(m.values, at, mask);
                at += __builtin_popcount(mask);
                return w;
            } else {
                const __m256 w = ends && m.in % 8 ? edge<K>(m.values, at, m.in % 8) : plain<K>(m.values, at);
                at += 8;
                return w;
            }
        };
        const auto group = [&](int64_t g, int64_t steps, bool ends) __attribute__((always_inline)) {
            // the pointer's steps depend on data, so the processor's own prefetch falls behind: a fifth of fp32's time
            if constexpr (Packed && K != INT4) {
                constexpr int64_t size = K == F32 ? 4 : K == BF16 ? 2 : 1;
                const char* ahead = static_cast<const char*>(m.values) + at * size + 1024;
                _mm_prefetch(ahead, _MM_HINT_T0);
                if constexpr (K == F32) _mm_prefetch(ahead + 64, _MM_HINT_T0);
            }
            __m256 part[R][2];
            for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = _mm256_setzero_ps();
            for (int64_t i = 0; i < steps; ++i) {
                const __m256 w = step(4 * g + i, ends && i + 1 == steps);
                for (int r = 0; r < R; ++r) {
                    const __m256 column = _mm256_loadu_ps(x + r * width + GROUP * g + 8 * i);
                    if constexpr (scaled) part[r][i & 1] = _mm256_fmadd_ps(w, column, part[r][i & 1]);
                    else sum[r][i % chains] = _mm256_fmadd_ps(w, column, sum[r][i % chains]);
                }
            }
            if constexpr (scaled) {
                const __m256 scale = _mm256_set1_ps(_cvtsh_ss(scales[g]));
                for (int r = 0; r < R; ++r)
                    sum[r][0] = _mm256_fmadd_ps(scale, _mm256_add_ps(part[r][0], part[r][1]), sum[r][0]);
            }
        };
        for (int64_t g = 0; g < full; ++g) group(g, 4, false);
        if (const int64_t rest = stride - 4 * full) group(full, rest, true);
        for (int r = 0; r < R; ++r) {
            __m256 all = sum[r][0];
            for (int c = 1; c < chains; ++c) all = _mm256_add_ps(all, sum[r][c]);
            y[r * m.out + row] = total(all);
        }
    }
}

template <int K, bool Packed>
void of_kind(const Matrix& m, const float* x, int n, float* y, int64_t first, int64_t last) {
    switch (n) {
        case 1: return rows<K, 1, Packed>(m, x, y, first, last);
        case 2: return rows<K, 2, Packed>(m, x, y, first, last);
        case 3: return rows<K, 3, Packed>(m, x, y, first, last);
        case 4: return rows<K, 4, Packed>(m, x, y, first, last);
        case 5: return rows<K, 5, Packed>(m, x, y, first, last);
        case 6: return rows<K, 6, Packed>(m, x, y, first, last);
        case 7: return rows<K, 7, Packed>(m, x, y, first, last);
        default: return rows<K, 8, Packed>(m, x, y, first, last);
    }
}

}  // namespace

void avx2(const Matrix& m, const float* x, int n, float* y, int64_t first, int64_t last) {
    if (m.bits) {
        switch (m.kind) {
            case F32: return of_kind<F32, true>(m, x, n, y, first, last);
            case BF16: return of_kind<BF16, true>(m, x, n, y, first, last);
            case INT8: return of_kind<INT8, true>(m, x, n, y, first, last);
            default: return of_kind<INT4, true>(m, x, n, y, first, last);
        }
    }
    switch (m.kind) {
        case F32: return of_kind<F32, false>(m, x, n, y, first, last);
        case BF16: return of_kind<BF16, false>(m, x, n, y, first, last);
        case INT8: return of_kind<INT8, false>(m, x, n, y, first, last);
        default: return of_kind<INT4, false>(m, x, n, y, first, last);
    }
}

namespace {

template <int K>
inline const char* at(const Matrix& m, int64_t row) {
    return static_cast<const char*>(m.values) + row * m.stride * (K == F32 ? 4 : 2);
}

// Rows of a list, of which each is too short for the processor to see it coming and to forget it in time: several run
// together. Half of the rows of 4096 fp32 are read at 15 of 27 GB/s one after the other, at 22 four at a time, at 24 eight
// at a time and no faster then; rows of 576 bf16 at 10, 13 and, twelve at a time, at 15 (one core of an EPYC). Fetching
// the next rows meanwhile cost a fifth of the first.
template <int K, typename Run>
void some(const Matrix& m, Run run) {  // with how many rows run together: of twelve accumulators none is spilled
    constexpr int64_t LONG = 8192 / (K == F32 ? 4 : 2);
    if (m.in >= LONG) run(std::integral_constant<int, 8>());
    else run(std::integral_constant<int, 12>());
}

// Sixteen columns in two vectors. bf16 becomes fp32 by zeros beneath it, in halves of lanes: columns 0-3 and 8-11, then
// the others; that is five instructions for 32 bytes where one vector at a time takes eight.
struct Pair {
    __m256 low, high;
};

template <int K>
inline Pair turned(Pair p) {  // into the order of a row of weights, and back
    if constexpr (K == F32) return p;
    else return {_mm256_permute2f128_ps(p.low, p.high, 0x20), _mm256_permute2f128_ps(p.low, p.high, 0x31)};
}

inline Pair pair(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

template <int K>
inline Pair weights(const char* row, int64_t j) {
    if constexpr (K == F32) {
        return pair(reinterpret_cast<const float*>(row) + j);
    } else {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(reinterpret_cast<const uint16_t*>(row) + j));
        const __m256i zero = _mm256_setzero_si256();
        return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, v)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, v))};
    }
}

// N rows of the list, of which `count` are wanted, by R rows of x.
template <int K, int N, int R>
void tile(const Matrix& m, const float* x, float* y, const int32_t* list, int count) {
    const int64_t width = padded(m);
    const char* rows[N];
    for (int k = 0; k < N; ++k) rows[k] = at<K>(m, list[k < count ? k : count - 1]);
    __m256 sum[N][R];
    for (int k = 0; k < N; ++k)
        for (int r = 0; r < R; ++r) sum[k][r] = _mm256_setzero_ps();
    int64_t j = 0;
    for (; j + 16 <= m.in; j += 16)
        for (int r = 0; r < R; ++r) {
            const Pair columns = turned<K>(pair(x + r * width + j));
            for (int k = 0; k < N; ++k) {
                const Pair w = weights<K>(rows[k], j);
                sum[k][r] = _mm256_fmadd_ps(w.low, columns.low, sum[k][r]);
                sum[k][r] = _mm256_fmadd_ps(w.high, columns.high, sum[k][r]);
            }
        }
    for (; j < m.in; j += 8)
        for (int r = 0; r < R; ++r) {
            const __m256 column = _mm256_loadu_ps(x + r * width + j);
            for (int k = 0; k < N; ++k) {
                const __m256 w = m.in - j < 8 ? edge<K>(rows[k], j, m.in - j) : plain<K>(rows[k], j);
                sum[k][r] = _mm256_fmadd_ps(w, column, sum[k][r]);
            }
        }
    for (int k = 0; k < count; ++k)
        for (int r = 0; r < R; ++r) y[r * m.out + list[k]] = total(sum[k][r]);
}

template <int K>
void gather(const Matrix& m, const float* x, int n, float* y, const int32_t* list, int64_t count) {
    const int64_t width = padded(m);
    some<K>(m, [&](auto together) {
        constexpr int N = decltype(together)::value, HALF = N / 2;
        const auto left = [&](int64_t i, int rows) { return int(count - i < rows ? count - i : rows); };
        if (n == 1) {
            for (int64_t i = 0; i < count; i += N) tile<K, N, 1>(m, x, y, list + i, left(i, N));
            return;
        }
        for (int64_t i = 0; i < count; i += HALF)
            for (int r = 0; r < n; r += 2) {
                const float* row = x + r * width;
                if (r + 1 < n) tile<K, HALF, 2>(m, row, y + r * m.out, list + i, left(i, HALF));
                else tile<K, HALF, 1>(m, row, y + r * m.out, list + i, left(i, HALF));
            }
    });
}

// N rows of the list.
template <int K, int N>
void add_rows(const Matrix& m, const int32_t* live, const float* a, int n, float* y, int64_t first, int64_t last) {
    const char* rows[N];
    for (int k = 0; k < N; ++k) rows[k] = at<K>(m, live[k]);
    for (int r = 0; r < n; ++r) {
        __m256 factor[N];
        for (int k = 0; k < N; ++k) factor[k] = _mm256_set1_ps(a[r * m.out + live[k]]);
        float* out = y + r * m.in;
        int64_t j = first;
        for (; j + 16 <= last; j += 16) {
            Pair sum = turned<K>(pair(out + j));
            for (int k = 0; k < N; ++k) {
                const Pair w = weights<K>(rows[k], j);
                sum = {_mm256_fmadd_ps(factor[k], w.low, sum.low), _mm256_fmadd_ps(factor[k], w.high, sum.high)};
            }
            sum = turned<K>(sum);
            _mm256_storeu_ps(out + j, sum.low);
            _mm256_storeu_ps(out + j + 8, sum.high);
        }
        for (; j < last; ++j)
            for (int k = 0; k < N; ++k) {
                float w;
                if constexpr (K == F32) {
                    w = reinterpret_cast<const float*>(rows[k])[j];
                } else {
                    const uint32_t word = uint32_t(reinterpret_cast<const uint16_t*>(rows[k])[j]) << 16;
                    __builtin_memcpy(&w, &word, sizeof w);
                }
                out[j] += a[r * m.out + live[k]] * w;
            }
    }
}

template <int K>
void accumulate(const Matrix& m, const int32_t* live, int64_t count, const float* a, int n, float* y, int64_t first,
                int64_t last) {
    int64_t i = 0;
    some<K>(m, [&](auto together) {
        constexpr int N = decltype(together)::value;
        for (; i + N <= count; i += N) add_rows<K, N>(m, live + i, a, n, y, first, last);
    });
    for (; i + 4 <= count; i += 4) add_rows<K, 4>(m, live + i, a, n, y, first, last);
    for (; i < count; ++i) add_rows<K, 1>(m, live + i, a, n, y, first, last);
}

}  // namespace

void avx2_gather(const Matrix& m, const float* x, int n, float* y, const int32_t* list, int64_t count) {
    if (m.kind == F32) gather<F32>(m, x, n, y, list, count);
    else gather<BF16>(m, x, n, y, list, count);
}

void avx2_accumulate(const Matrix& m, const int32_t* live, int64_t count, const float* a, int n, float* y,
                     int64_t first, int64_t last) {
    if (m.kind == F32) accumulate<F32>(m, live, count, a, n, y, first, last);
    else accumulate<BF16>(m, live, count, a, n, y, first, last);
}

namespace {

// Eight rows of a copy in the lanes of a vector, so that no sum goes across one. Of a group the products are summed in 16
// bits: two codes below 16 by two of x give at most 3,810, and eight of these 30,480.
template <int R>
void near_rows(const Matrix& m, const Rounded& x, float* y, int64_t first, int64_t last) {
    const int64_t all = groups(m), width = padded(m);
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const auto four = [](const int8_t* p) { return _mm256_set1_epi32(int32_t(load32(reinterpret_cast<const uint8_t*>(p)))); };
    for (int64_t row = first; row < last; row += LANES) {
        const auto* codes = static_cast<const uint8_t*>(m.values) + row * all * (GROUP / 2);
        const uint16_t* scales = m.scales + row * all;
        __m256 sum[R];
        for (int r = 0; r < R; ++r) sum[r] = _mm256_setzero_ps();
        for (int64_t g = 0; g < all; ++g, codes += LANES * GROUP / 2, scales += LANES) {
            __m256i part[R];
            for (int r = 0; r < R; ++r) part[r] = _mm256_setzero_si256();
            for (int c = 0; c < 4; ++c) {
                const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + c);
                const __m256i low = _mm256_and_si256(both, nibble);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
                for (int r = 0; r < R; ++r) {
                    const int8_t* columns = x.codes + r * width + g * GROUP + c * 8;
                    part[r] = _mm256_add_epi16(part[r], _mm256_maddubs_epi16(low, four(columns)));
                    part[r] = _mm256_add_epi16(part[r], _mm256_maddubs_epi16(high, four(columns + 4)));
                }
            }
            const __m256 step = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
            for (int r = 0; r < R; ++r) {
                const __m256i eight = _mm256_set1_epi32(x.eights[r * all + g]);
                const __m256i dot = _mm256_sub_epi32(_mm256_madd_epi16(part[r], ones), eight);
                const __m256 scale = _mm256_mul_ps(step, _mm256_broadcast_ss(x.scales + r * all + g));
                sum[r] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dot), sum[r]);
            }
        }
        for (int r = 0; r < R; ++r) {
            float* to = y + r * m.out + row;
            if (last - row >= LANES) {
                _mm256_storeu_ps(to, sum[r]);
            } else {
                alignas(32) float rest[LANES];
                _mm256_store_ps(rest, sum[r]);
                __builtin_memcpy(to, rest, size_t(last - row) * sizeof(float));
            }
        }
    }
}

}  // namespace

void avx2_near(const Matrix& m, const Rounded& x, int n, float* y, int64_t first, int64_t last) {
    switch (n) {
        case 1: return near_rows<1>(m, x, y, first, last);
        case 2: return near_rows<2>(m, x, y, first, last);
        case 3: return near_rows<3>(m, x, y, first, last);
        case 4: return near_rows<4>(m, x, y, first, last);
        case 5: return near_rows<5>(m, x, y, first, last);
        case 6: return near_rows<6>(m, x, y, first, last);
        case 7: return near_rows<7>(m, x, y, first, last);
        default: return near_rows<8>(m, x, y, first, last);
    }
}

}  // namespace pumice
