// The product in plain C++: the kernel of machines without AVX2, and what tests hold the other kernels to.
#include <cmath>
#include <cstring>

#include "matrix.h"

namespace pumice {
namespace {

float value(const Matrix& m, int64_t i) {  // the stored weight number i, before its scale
    switch (m.kind) {
        case F32: return static_cast<const float*>(m.values)[i];
        case BF16: {
            const uint32_t word = uint32_t(static_cast<const uint16_t*>(m.values)[i]) << 16;
            float f;
            std::memcpy(&f, &word, sizeof f);
            return f;
        }
        case INT8: return static_cast<const int8_t*>(m.values)[i];
        default: {
            const int nibble = (static_cast<const uint8_t*>(m.values)[i >> 1] >> (4 * (i & 1))) & 15;
            return float((nibble ^ 8) - 8);
        }
    }
}

}  // namespace

void portable(const Matrix& m, const float* x, int n, float* y, int64_t first, int64_t last) {
    const int64_t width = padded(m);
    for (int64_t row = first; row < last; ++row) {
        const uint8_t* bits = m.bits ? m.bits + row * bit_stride(m) : nullptr;
        int64_t at = bits ? m.offsets[row] : row * m.stride;
        float sum[MAX_ROWS] = {};
        for (int64_t g = 0; g < groups(m); ++g) {
            const float scale = m.scales ? half_to_float(m.scales[row * groups(m) + g]) : 1.0f;
            const int64_t end = (g + 1) * GROUP < m.in ? (g + 1) * GROUP : m.in;
            float part[MAX_ROWS] = {};
            for (int64_t j = g * GROUP; j < end; ++j) {
                const bool stored = !bits || (bits[j >> 3] >> (j & 7) & 1);
                const float w = stored ? value(m, at++) : 0.0f;  // multiplied too: 0·∞ is NaN here as in dense
                for (int r = 0; r < n; ++r) part[r] += w * x[r * width + j];
            }
            for (int r = 0; r < n; ++r) sum[r] += scale * part[r];
        }
        for (int r = 0; r < n; ++r) y[r * m.out + row] = sum[r];
    }
}

void portable_gather(const Matrix& m, const float* x, int n, float* y, const int32_t* list, int64_t count) {
    for (int64_t i = 0; i < count; ++i) portable(m, x, n, y, list[i], list[i] + 1);
}

void portable_accumulate(const Matrix& m, const int32_t* live, int64_t count, const float* a, int n, float* y,
                         int64_t first, int64_t last) {
    for (int64_t i = 0; i < count; ++i)
        for (int r = 0; r < n; ++r) {
            const float factor = a[r * m.out + live[i]];
            for (int64_t j = first; j < last; ++j) y[r * m.in + j] += factor * value(m, live[i] * m.stride + j);
        }
}

void portable_near(const Matrix& m, const Rounded& x, int n, float* y, int64_t first, int64_t last) {
    const int64_t all = groups(m);
    for (int64_t row = first; row < last; ++row)
        for (int r = 0; r < n; ++r) {
            float sum = 0.0f;
            for (int64_t g = 0; g < all; ++g) {
                const int64_t at = row / LANES * all + g;
                const uint8_t* codes = static_cast<const uint8_t*>(m.values) + (at * 4 * LANES + row % LANES) * 4;
                const int8_t* column = x.codes + r * padded(m) + g * GROUP;
                int32_t dot = 0;
                for (int i = 0; i < 16; ++i) {
                    const int byte = codes[i / 4 * 4 * LANES + i % 4];
                    dot += ((byte & 15) - 8) * column[i / 4 * 8 + i % 4] + ((byte >> 4) - 8) * column[i / 4 * 8 + 4 + i % 4];
                }
                sum += half_to_float(m.scales[at * LANES + row % LANES]) * x.scales[r * all + g] * float(dot);
            }
            y[r * m.out + row] = sum;
        }
}

}  // namespace pumice
