// y = W x of which each column of W is read plane by plane of its bits, the next one where |x| is large enough for it.
#include "planes.h"

#include <cfloat>
#include <cmath>

#include "shared.h"

namespace pumice {
namespace {

// What a row of x [in] asks, group by group. Adds the bits that the columns ask for, and those of all columns of the
// groups whose plane is asked for by any. Without branches on x, which nothing could foresee.
void ask(const Codes& m, const float* x, Asked* asked, int64_t* read) {
    int all = 0, bits[MAX_PLANES + 1] = {};
    for (int p = 0; p < m.count; ++p) bits[p + 1] = all += m.bits[p];
    const float half = m.low ? 0.0f : float(1 << (all - 1));
    float middle[MAX_PLANES + 1] = {}, most[MAX_PLANES + 1] = {};  // by depth: of what is not read; of the first code
    for (int d = 1; d <= m.count; ++d) {
        middle[d] = float((1 << (all - bits[d])) - 1) * 0.5f - half;
        most[d] = d > 1 ? float(MOST) : float(MOST - ((1 << m.bits[1]) - 1));
    }
    for (int64_t g = 0; g < groups(m); ++g, x += GROUP) {
        Asked& a = asked[g];
        const int columns = int(m.in - g * GROUP < GROUP ? m.in - g * GROUP : GROUP);
        uint8_t depth[GROUP];
        int deepest = 0;
        float largest = 0.0f, odd = 0.0f, weighed = 0.0f;
        for (int i = 0; i < columns; ++i) {
            const float size = std::fabs(x[i]);
            int d = 0;
            for (int p = 0; p < m.count; ++p) d += !(size <= m.tau[p]);
            depth[i] = uint8_t(d);
            deepest = d > deepest ? d : deepest;
            read[0] += bits[d];
            largest = size > largest ? size : largest;
            weighed += size * most[d];
            odd += x[i] * 0.0f;  // NaN if any is not finite
        }
        read[1] += int64_t(columns) * bits[deepest];
        const float fits = weighed / (32767.0f - 0.5f * MOST * GROUP), fine = largest / 127.0f;
        a.scale = (fits > fine ? fits : fine) + odd;
        const float inverse = a.scale >= FLT_MIN ? 1.0f / a.scale : 0.0f;  // below, infinity
        a.middle = a.sum = 0.0f;
        for (int i = 0; i < columns; ++i) {
            constexpr float even = 12582912.0f;  // 1.5 · 2^23, beside which a float has no fraction: to nearest, ties to even
            float code = x[i] * inverse;
            code = code >= -127.0f ? code <= 127.0f ? code : 127.0f : -127.0f;
            code = (code + even) - even;
            a.x[i] = int8_t(code);
            a.sum += depth[i] ? code : 0.0f;
            a.middle += code * middle[depth[i]];
        }
        for (int pair = 0; 2 * pair < m.count; ++pair) {
            int both = 0, upper = 0;
            uint8_t late[GROUP + 1];
            for (int i = 0; i < columns; ++i) {
                a.column[pair][both] = late[upper] = uint8_t(i);
                both += depth[i] > 2 * pair + 1;
                upper += depth[i] == 2 * pair + 1;
            }
            for (int i = 0; i < upper; ++i) a.column[pair][both + i] = late[i];
            a.both[pair] = both, a.upper[pair] = upper;
        }
    }
}

struct Job {
    const Codes* m;
    const Asked* asked;
    Read read;
    float* y;
};

void in_thread(void* data) {
    const Job& job = *static_cast<Job*>(data);
    const int64_t me = thread_number(), parts = thread_count(), tiles = job.m->rows / TILE;
    const int64_t first = tiles * me / parts, last = tiles * (me + 1) / parts;
    if (first < last) job.read(*job.m, job.asked, job.y, first * TILE, last * TILE);
}

int code_of(const Codes& m, int plane, int64_t column, int64_t row) {
    const int bits = m.bits[plane], bytes = TILE / 8 * bits, at = int(row % TILE);
    return bits_of(m, plane, row - at, column)[at % bytes] >> (bits * (at / bytes)) & ((1 << bits) - 1);
}

}  // namespace

void portable_read(const Codes& m, const Asked* asked, float* y, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        float whole = 0.0f;
        for (int64_t g = 0; g < groups(m); ++g) {
            const Asked& a = asked[g];
            float sum = a.middle;
            for (int pair = 0; 2 * pair < m.count; ++pair) {
                const bool two = 2 * pair + 1 < m.count;
                const int below = two ? m.bits[2 * pair + 1] : 0;
                int32_t found = 0;
                for (int i = 0; i < a.both[pair] + a.upper[pair]; ++i) {
                    const int64_t column = g * GROUP + a.column[pair][i];
                    int code = code_of(m, 2 * pair, column, row) << below;
                    if (i < a.both[pair]) code |= code_of(m, 2 * pair + 1, column, row);
                    found += code * a.x[a.column[pair][i]];
                }
                sum += float(found) * float(1 << shift(m, pair));
            }
            const int64_t at = group_of(m, row - row % TILE, g) + row % TILE;
            whole += a.scale * half_to_float(m.step[at]) * sum;
            if (m.low) whole += a.scale * half_to_float(m.low[at]) * a.sum;
        }
        y[row] = whole;
    }
}

}  // namespace pumice

using namespace pumice;

// y [n, out] of x [n, in], both of kind `io` and contiguous. `read`, summed over rows: the bits that
// the columns ask for, and those that are read for them (ask). 0: done; 1: no memory.
PUBLIC int pumice_planes(const Codes* m, const void* x, void* y, int64_t n, int io, int avx, int64_t* read) {
    static thread_local Scratch wide, lists, sums;
    Read reads = portable_read;
#ifdef PUMICE_AVX2
    if (avx) reads = avx2_read;
#endif
    const int64_t size = io == F32 ? 4 : 2, width = groups(*m) * GROUP;
    float* columns = wide.of(width);
    Asked* asked = reinterpret_cast<Asked*>(lists.of(int64_t(sizeof(Asked) / sizeof(float) + 1) * groups(*m)));
    float* found = sums.of(m->rows);
    if (!columns || !asked || !found) return 1;
    read[0] = read[1] = 0;
    for (int64_t r = 0; r < n; ++r) {
        widen(static_cast<const char*>(x) + r * m->in * size, io, 1, m->in, width, columns);
        ask(*m, columns, asked, read);
        Job job{m, asked, reads, found};
        if (openmp && m->rows * m->in / 8 >= SMALL) openmp(in_thread, &job, 0, 0);
        else reads(*m, asked, found, 0, m->rows);
        for (int64_t j = 0; j < m->out; ++j) {
            const float value = found[j] + (m->bias ? m->bias[j] : 0.0f);
            if (io == F32) static_cast<float*>(y)[r * m->out + j] = value;
            else static_cast<uint16_t*>(y)[r * m->out + j] = to_bf16(value);
        }
    }
    return 0;
}
