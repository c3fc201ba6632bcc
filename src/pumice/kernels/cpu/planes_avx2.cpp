// The planes of a tile of 128 outputs with AVX2: two columns meet in one multiply-add of bytes.
//
// A tile's two bits lie in 32 bytes so that a shift and a mask give 32 outputs each; the sums of a group fit 16 bits
// and stay in registers until they go to fp32.
#include <immintrin.h>

#include "planes.h"

namespace pumice {
namespace {

constexpr int PARTS = TILE / 32;  // vectors of bytes in a tile

inline __m256 half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// A tile's bits of a column, as they lie: of one bit each, both halves of the vector hold them all.
template <int Bits>
inline __m256i bits(const uint8_t* p) {
    if constexpr (Bits == 2) return load(p);
    else return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Those of 32 outputs, `Up` bits further left.
template <int Bits, int Up, int K>
inline __m256i spread(__m256i v) {
    if constexpr (Bits == 2) {
        constexpr int right = 2 * K - Up;
        if constexpr (right > 0) v = _mm256_srli_epi16(v, right);
        if constexpr (right < 0) v = _mm256_slli_epi16(v, -right);
        return _mm256_and_si256(v, _mm256_set1_epi8(3 << Up));
    } else {
        const __m256i bit = _mm256_set_m128i(_mm_set1_epi8(char(2 << (2 * K))), _mm_set1_epi8(char(1 << (2 * K))));
        return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(v, bit), bit), _mm256_set1_epi8(1 << Up));
    }
}

template <int Upper, int Lower, bool Both, int K>
inline void multiply(const __m256i (&one)[2], const __m256i (&two)[2], __m256i factors, __m256i (&sums)[2 * PARTS]) {
    __m256i first = spread<Upper, Lower, K>(one[0]), second = spread<Upper, Lower, K>(two[0]);
    if constexpr (Both) {
        first = _mm256_or_si256(first, spread<Lower, 0, K>(one[1]));
        second = _mm256_or_si256(second, spread<Lower, 0, K>(two[1]));
    }
    const __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
    sums[2 * K] = _mm256_add_epi16(sums[2 * K], _mm256_maddubs_epi16(low, factors));
    sums[2 * K + 1] = _mm256_add_epi16(sums[2 * K + 1], _mm256_maddubs_epi16(high, factors));
}

// Columns [from, to) of a list, two at a time, into sums of 16 bits.
template <int Upper, int Lower, bool Both>
inline void products(const Codes& m, const Asked& a, int pair, int64_t row, int64_t base, int from, int to,
                     __m256i (&sums)[2 * PARTS]) {
    const uint8_t* upper = bits_of(m, 2 * pair, row, base);
    const uint8_t* lower = Both ? bits_of(m, 2 * pair + 1, row, base) : upper;
    constexpr int over = TILE / 8 * Upper, under = TILE / 8 * Lower;
    for (int i = from; i < to; i += 2) {
        const int first = a.column[pair][i], second = i + 1 < to ? a.column[pair][i + 1] : first;
        const uint16_t x = uint16_t(uint8_t(a.x[first])) | uint16_t(uint8_t(i + 1 < to ? a.x[second] : 0)) << 8;
        const __m256i factors = _mm256_set1_epi16(int16_t(x));
        __m256i one[2], two[2];
        one[0] = bits<Upper>(upper + first * over), two[0] = bits<Upper>(upper + second * over);
        if constexpr (Both) one[1] = bits<Lower>(lower + first * under), two[1] = bits<Lower>(lower + second * under);
        multiply<Upper, Lower, Both, 0>(one, two, factors, sums);
        multiply<Upper, Lower, Both, 1>(one, two, factors, sums);
        multiply<Upper, Lower, Both, 2>(one, two, factors, sums);
        multiply<Upper, Lower, Both, 3>(one, two, factors, sums);
    }
}

inline __m256 floats(__m128i sums) { return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(sums)); }

// The sums of eight outputs, j a multiple of 8: each half of a vector of bytes was unpacked by itself.
inline __m256 sums_of(const __m256i (&sums)[2 * PARTS], int j) {
    const __m256i pair = sums[j / 32 * 2 + (j / 8 & 1)];
    return floats(j & 16 ? _mm256_extracti128_si256(pair, 1) : _mm256_castsi256_si128(pair));
}

template <int Upper, int Lower>
inline void of_pair(const Codes& m, const Asked& a, int pair, int64_t row, int64_t base,
                    __m256i (&sums)[2 * PARTS]) {
    const int both = a.both[pair];
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    if constexpr (Lower) products<Upper, Lower, true>(m, a, pair, row, base, 0, both, sums);
    products<Upper, Lower, false>(m, a, pair, row, base, both, both + a.upper[pair], sums);
}

// All lines of a group of the planes below the first, of which few columns are asked: read in order they come three times
// as fast as only those that are needed would, which neither the processor's prefetch nor ours brings in time (measured on
// EPYC: 2.0 of 4 bits in 1886 µs for 2726).
inline void stream(const Codes& m, const Asked& a, int64_t row, int64_t base) {
    for (int p = 1; p < m.count; ++p) {
        if (!a.both[p / 2] && (p & 1 || !a.upper[p / 2])) continue;
        const uint8_t* from = bits_of(m, p, row, base);
        const int64_t columns = m.in - base < GROUP ? m.in - base : GROUP;
        for (int64_t byte = 0; byte < columns * TILE / 8 * m.bits[p]; byte += 64)
            (void)*static_cast<const volatile uint8_t*>(from + byte);
    }
}

}  // namespace

void avx2_read(const Codes& m, const Asked* asked, float* y, int64_t first, int64_t last) {
    alignas(32) float t[TILE];
    for (int64_t j = first; j < last; ++j) y[j] = 0.0f;
    for (int64_t row = first; row < last; row += TILE) {
        for (int64_t g = 0; g < groups(m); ++g) {
            const Asked& a = asked[g];
            if (g + 1 < groups(m)) stream(m, asked[g + 1], row, (g + 1) * GROUP);
            const __m256 scale = _mm256_set1_ps(a.scale), sum = _mm256_set1_ps(a.scale * a.sum);
            const __m256 middle = _mm256_set1_ps(a.middle), factor = _mm256_set1_ps(float(1 << shift(m, 0)));
            const bool deep = m.count > 2 && a.both[1] + a.upper[1] > 0;
            __m256i sums[2 * PARTS];
            if (deep) {
                if (m.count > 3) of_pair<2, 2>(m, a, 1, row, g * GROUP, sums);
                else if (m.bits[2] == 2) of_pair<2, 0>(m, a, 1, row, g * GROUP, sums);
                else of_pair<1, 0>(m, a, 1, row, g * GROUP, sums);
                for (int j = 0; j < TILE; j += 8) _mm256_store_ps(t + j, _mm256_add_ps(sums_of(sums, j), middle));
            }
            of_pair<2, 2>(m, a, 0, row, g * GROUP, sums);
            const int64_t at = group_of(m, row, g);
            const auto finish = [&](auto start, auto least) __attribute__((always_inline)) {
                for (int j = 0; j < TILE; j += 8) {
                    const __m256 step = _mm256_mul_ps(scale, half(m.step + at + j));
                    const __m256 code = _mm256_fmadd_ps(sums_of(sums, j), factor, start(j));
                    const __m256 value = _mm256_fmadd_ps(step, code, _mm256_loadu_ps(y + row + j));
                    _mm256_storeu_ps(y + row + j, least(value, at + j));
                }
            };
            const auto none = [](__m256 value, int64_t) { return value; };
            const auto low = [&](__m256 value, int64_t i) { return _mm256_fmadd_ps(sum, half(m.low + i), value); };
            const auto one = [&](int) { return middle; };
            const auto stored = [&](int j) { return _mm256_load_ps(t + j); };
            if (deep && m.low) finish(stored, low);
            else if (deep) finish(stored, none);
            else if (m.low) finish(one, low);
            else finish(one, none);
        }
    }
}

}  // namespace pumice
