// Products that read only what a token needs: columns of a matrix, and the live neurons of an FFN.
//
// Of several rows of x the union of their live units is read, and each row keeps its own zeros. A unit is dropped if and
// only if its score <= tau, so that NaN stays live.
#include <algorithm>
#include <cmath>

#include "shared.h"

namespace pumice {

enum Activation : int32_t { NONE = 0, SILU, GELU, GELU_TANH, QUICK_GELU, RELU, RELU2, SIGMOID, TANH };

// The order of the fields is known to skip.py.
struct Units {
    Matrix first;   // what every unit is known by: gate or up [units, d]; of a bare matrix none: x are the units
    Matrix second;  // the other of the two; no values: there is none
    Matrix down;    // [units, out], a row for each unit; its bias is [out]
    Matrix near_first, near_second;  // 4-bit copies that choose before the matrices themselves are read, or none
    Matrix router;        // [units / group, d]: neighbours that are live together by router·x, or none
    const float* weight;  // of each unit in the score, or null
    float tau;
    int32_t activation;   // of the gate, or of the one matrix there is
    int32_t scored;       // whether the score is of act(z) and not of z
    int32_t gated_by;     // 1: the first matrix is the gate; 2: the second
    int64_t group;        // units for each row of the router; 1 without one
    int64_t drop, block;  // of a bare matrix, in place of tau: how many of every `block` units go; 0: tau decides
};

namespace {

static_assert(MAX_ROWS <= 8, "a row of x has a bit of a byte");
constexpr int64_t THREADS = 256;  // that choose; with more the others wait

float act(int32_t kind, float z) {
    switch (kind) {
        case SILU: return z / (1.0f + std::exp(-z));
        case GELU: return 0.5f * z * (1.0f + std::erf(z * 0.70710678118654752f));
        case GELU_TANH: return 0.5f * z * (1.0f + std::tanh(0.79788456080286536f * (z + 0.044715f * z * z * z)));
        case QUICK_GELU: return z / (1.0f + std::exp(-1.702f * z));
        case RELU: return z < 0.0f ? 0.0f : z;  // NaN stays
        case RELU2: return z < 0.0f ? 0.0f : z * z;
        case SIGMOID: return 1.0f / (1.0f + std::exp(-z));
        case TANH: return std::tanh(z);
        default: return z;
    }
}

struct Work {
    const Units* u;
    const uint8_t* given;  // [n, units]: which are live, or null: their scores say it
    Product product;
    Gather gather;
    Accumulate accumulate;
    Near near;
    const float* x;   // [n, padded(first)] of an FFN
    Rounded rounded;  // the same for the copies
    float* a;         // [n, units]: in, what units give; of a bare matrix x itself
    float* other;     // [n, units]
    float* routes;    // [n, units / group]
    int32_t* live;    // [units]: those of thread t begin at the first unit of t
    uint8_t* who;     // [units]: for which rows of x each of them is, a bit a row
    int64_t* counts;  // [threads]
    float* y;         // [n, out]
    int n;
    int64_t total;    // live units of all threads
    int64_t own;      // Σ over rows of the units that are live for the row itself

    // Whether a unit is known before its matrices are read.
    bool early() const { return given || u->router.values || u->near_first.values; }

    // Units that one thread takes together: what they are known by is read so.
    int64_t step() const { return u->near_first.values ? LANES : u->group; }

    bool is_live(float score, int64_t unit) const {
        if (u->weight) score *= u->weight[unit];
        return !(score <= u->tau);
    }

    bool is_routed(int row, int64_t group) const {
        const float score = routes[row * u->router.out + group];
        return !(score + (u->router.bias ? u->router.bias[group] : 0.0f) <= u->tau);
    }

    // |act(z)·o| or |z|, of which z and o are what the matrices, or their copies, gave; z gets its bias.
    float size(float& z, float o, int64_t unit) const {
        if (u->first.bias) z += u->first.bias[unit];
        float value = u->scored ? act(u->activation, z) : z;
        if (u->near_second.values) value *= o + (u->second.bias ? u->second.bias[unit] : 0.0f);
        return std::fabs(value);
    }

    // Units [first, last): what they give, and which of them are live.
    void choose(int64_t first, int64_t last, int64_t* count, int64_t* mine) const {
        constexpr int64_t CHUNK = 64;  // so that a matrix streams
        const int64_t units = u->down.out;
        int64_t found = 0, own_found = 0;
        if (u->router.values && !given) product(u->router, x, n, routes, first / u->group, last / u->group);
        for (int64_t start = first; start < last; start += CHUNK) {
            const int64_t end = start + CHUNK < last ? start + CHUNK : last;
            if (!given && u->near_first.values) {
                near(u->near_first, rounded, n, a, start, end);
                if (u->near_second.values) near(u->near_second, rounded, n, other, start, end);
            } else if (!early() && u->first.values) {
                product(u->first, x, n, a, start, end);
            }
            for (int64_t unit = start; unit < end; ++unit) {
                unsigned any = 0;  // a bit for each row
                for (int r = 0; r < n; ++r) {
                    float& z = a[r * units + unit];
                    const bool one = given              ? given[r * units + unit]
                                     : u->router.values ? is_routed(r, unit / u->group)
                                                        : is_live(size(z, other[r * units + unit], unit), unit);
                    any |= unsigned(one) << r;
                    own_found += one;
                    if (!u->first.values && !one) z = 0.0f;
                }
                if (any) who[first + found] = uint8_t(any), live[first + found++] = int32_t(unit);
            }
        }
        if (u->first.values) finish(live + first, found, who + first);
        *count = found;
        *mine = own_found;
    }

    // The rows of the live units that are still to be read, the activation, and zeros where a row does without the unit.
    void finish(const int32_t* units, int64_t count, const uint8_t* who) const {
        const int64_t all = u->down.out;
        const float *first = u->first.bias, *second = u->second.bias;
        if (early()) gather(u->first, x, n, a, units, count);
        if (u->second.values) gather(u->second, x, n, other, units, count);
        for (int64_t i = 0; i < count; ++i)
            for (int r = 0; r < n; ++r) {
                const int64_t unit = units[i];
                float& z = a[r * all + unit];
                if (early() && first) z += first[unit];
                const float o = u->second.values ? other[r * all + unit] + (second ? second[unit] : 0.0f) : 1.0f;
                const float value = u->gated_by == 2 ? z * act(u->activation, o) : act(u->activation, z) * o;
                z = who[i] >> r & 1 ? value : 0.0f;
            }
    }
};

// x [n, padded] in int8. NaN and infinity give scales that are so too.
void round(const float* x, int64_t n, int64_t columns, int8_t* codes, float* scales, int32_t* eights) {
    for (int64_t g = 0; g < n * columns / GROUP; ++g, x += GROUP, codes += GROUP) {
        float largest = 0.0f, odd = 0.0f;
        for (int i = 0; i < GROUP; ++i) {
            largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
            odd += x[i] * 0.0f;  // NaN if any is not finite
        }
        scales[g] = largest / 127.0f + odd;
        const float inverse = scales[g] > 0.0f ? 1.0f / scales[g] : 0.0f;
        int sum = 0;
        for (int i = 0; i < GROUP; ++i) {
            const float code = std::nearbyint(x[i] * inverse);
            sum += codes[i] = int8_t(code >= -127.0f ? code <= 127.0f ? code : 127.0f : -127.0f);
        }
        eights[g] = 8 * sum;
    }
}

// Of every block of x [n, units] all but the `drop` least by weight·|x|, the first of equals dropped first: [n, units].
void largest(const Units& u, const float* x, int64_t n, float* scratch, uint8_t* chosen) {
    const int64_t units = u.down.out;
    for (int64_t start = 0; start < n * units; start += u.block) {
        float* ranked = scratch + u.block;
        for (int64_t i = 0; i < u.block; ++i) {
            const float size = std::fabs(x[start + i]) * (u.weight ? u.weight[(start + i) % units] : 1.0f);
            scratch[i] = ranked[i] = std::isnan(size) ? INFINITY : size;  // NaN stays live and is seen
        }
        std::nth_element(ranked, ranked + u.drop - 1, ranked + u.block);
        const float cut = ranked[u.drop - 1];
        int64_t ties = std::count(ranked, ranked + u.drop, cut);  // nothing before it is larger
        for (int64_t i = 0; i < u.block; ++i)
            chosen[start + i] = !(scratch[i] < cut || (scratch[i] == cut && ties-- > 0));
    }
}

int64_t even(int64_t n, int64_t part, int64_t parts, int64_t step) {  // where a thread's share of n begins
    const int64_t at = n / step * part / parts * step;
    return part >= parts ? n : at;
}

struct Shared {
    Work* w;
    int64_t owns[THREADS];
};

void choose_in_thread(void* data) {
    Shared& s = *static_cast<Shared*>(data);
    const int64_t me = thread_number(), parts = std::min(int64_t(thread_count()), THREADS), units = s.w->u->down.out;
    if (me >= parts) return;
    const int64_t step = s.w->step();
    s.w->choose(even(units, me, parts, step), even(units, me + 1, parts, step), &s.w->counts[me], &s.owns[me]);
}

void accumulate_in_thread(void* data) {
    const Work& w = *static_cast<Work*>(data);
    const int64_t me = thread_number(), parts = thread_count(), out = w.u->down.in;
    const int64_t first = even(out, me, parts, 16), last = even(out, me + 1, parts, 16);
    if (first < last) w.accumulate(w.u->down, w.live, w.total, w.a, w.n, w.y, first, last);
}

int64_t width(const Matrix& m) { return m.kind == F32 ? 4 : 2; }

void run(Work& w) {
    const int64_t units = w.u->down.out;
    Shared s{&w, {}};
    const int64_t read = w.u->first.values ? units * w.u->first.in : 0;
    int64_t parts = 1;
    for (int64_t t = 0; t < THREADS; ++t) w.counts[t] = -1;
    if (openmp && read >= SMALL) openmp(choose_in_thread, &s, 0, 0);
    else w.choose(0, units, &w.counts[0], &s.owns[0]);
    while (parts < THREADS && w.counts[parts] >= 0) ++parts;
    w.total = w.own = 0;
    for (int64_t t = 0; t < parts; ++t) {  // the lists of the threads, one behind the other
        const int64_t from = even(units, t, parts, w.step());
        if (w.total != from) std::memmove(w.live + w.total, w.live + from, size_t(w.counts[t]) * sizeof(int32_t));
        w.total += w.counts[t];
        w.own += s.owns[t];
    }
    const int64_t out = w.u->down.in;
    std::memset(w.y, 0, size_t(w.n * out) * sizeof(float));
    if (openmp && w.total * out * width(w.u->down) >= SMALL) openmp(accumulate_in_thread, &w, 0, 0);
    else w.accumulate(w.u->down, w.live, w.total, w.a, w.n, w.y, 0, out);
}

}  // namespace
}  // namespace pumice

using namespace pumice;

// y [n, out] of x [n, d], both of kind `io` and contiguous, n <= MAX_ROWS. `live_units` [n, units] says which are live, or
// null: their scores say it. `read`: units whose rows were read (of all
// rows of x together), and the sum over rows of x of the units that are live for it. 0: done; 1: no memory.
PUBLIC int pumice_skip(const Units* u, const void* x, const uint8_t* live_units, void* y, int64_t n, int io, int avx,
                       int64_t* read) {
    static thread_local Scratch wide, given, others, sums, lists, bytes, steps, ranks, groups_of, rows_of;
    Product product = portable;
    Gather gather = portable_gather;
    Accumulate accumulate = portable_accumulate;
    Near near = portable_near;
#ifdef PUMICE_AVX2
    if (avx) product = avx2, gather = avx2_gather, accumulate = avx2_accumulate, near = avx2_near;
#endif
    const int64_t units = u->down.out, out = u->down.in, d = u->first.values ? u->first.in : units;
    int64_t counts[THREADS];
    float* a = given.of(n * units);
    float* other = u->first.values ? others.of(n * units) : a;
    float* total = io == F32 ? static_cast<float*>(y) : sums.of(n * out);
    int32_t* live = reinterpret_cast<int32_t*>(lists.of(units));
    uint8_t* who = reinterpret_cast<uint8_t*>(rows_of.of((units + 3) / 4));
    float* columns = u->first.values ? wide.of(n * padded(u->first)) : a;
    float* routes = u->router.values ? groups_of.of(n * u->router.out) : a;
    if (!a || !other || !total || !live || !who || !columns || !routes) return 1;
    widen(x, io, n, d, u->first.values ? padded(u->first) : units, columns);
    Rounded rounded{nullptr, nullptr, nullptr};
    if (!live_units && u->near_first.values) {
        int8_t* codes = reinterpret_cast<int8_t*>(bytes.of(n * padded(u->first)));
        float* scales = steps.of(2 * n * groups(u->first));
        if (!codes || !scales) return 1;
        int32_t* eights = reinterpret_cast<int32_t*>(scales + n * groups(u->first));
        round(columns, n, padded(u->first), codes, scales, eights);
        rounded = {codes, scales, eights};
    }
    if (!live_units && u->drop) {
        float* scratch = ranks.of(2 * u->block);
        uint8_t* chosen = reinterpret_cast<uint8_t*>(bytes.of((n * units + 3) / 4));
        if (!scratch || !chosen) return 1;
        largest(*u, columns, n, scratch, chosen);
        live_units = chosen;
    }
    Work w{u, live_units, product, gather, accumulate, near, columns, rounded, a, other, routes, live, who, counts, total,
           int(n), 0, 0};
    run(w);
    for (int64_t r = 0; r < n; ++r)
        for (int64_t j = 0; j < out; ++j) {
            float& sum = total[r * out + j];
            if (u->down.bias) sum += u->down.bias[j];
            if (io != F32) static_cast<uint16_t*>(y)[r * out + j] = to_bf16(sum);
        }
    read[0] = w.total, read[1] = w.own;
    return 0;
}
