// What Python calls: choice of the kernel, threads, and x and y in fp32 or bf16.
//
// A plain C interface without torch's headers, so that building needs no torch and one library serves every torch and
// Python. The threads are torch's own: Python hands over the GOMP_parallel of the OpenMP runtime that torch has loaded
// (LLVM's has it too). A second pool beside it would put two threads on every core.
#include "shared.h"

namespace pumice {

void (*openmp)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
int (*thread_number)() = nullptr;
int (*thread_count)() = nullptr;

namespace {

bool has_avx2() {
#ifdef PUMICE_AVX2
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
#else
    return false;
#endif
}

int64_t value_bits(const Matrix& m) { return m.kind == F32 ? 32 : m.kind == BF16 ? 16 : m.kind == INT8 ? 8 : 4; }

int64_t bits_before(const Matrix& m, int64_t row) {  // read by the rows before `row`
    const int64_t values = m.bits ? m.offsets[row] : row * m.in;
    return values * value_bits(m) + row * ((m.bits ? m.in : 0) + (m.scales ? 16 * groups(m) : 0));
}

int64_t share(const Matrix& m, int64_t part, int64_t parts) {  // the first row of a thread: equal bytes, not equal rows
    const int64_t target = bits_before(m, m.out) / parts * part;
    int64_t low = 0, high = m.out;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (bits_before(m, middle) < target) low = middle + 1;
        else high = middle;
    }
    return low;
}

struct Task {
    const Matrix* m;
    Product product;
    const float* x;
    float* y;        // fp32 [n, out]
    uint16_t* half;  // or y in bf16, to which the rows are rounded
    int n;

    void run(int64_t first, int64_t last) const {
        product(*m, x, n, y, first, last);
        for (int r = 0; r < n && (m->bias || half); ++r)
            for (int64_t i = r * m->out + first; i < r * m->out + last; ++i) {
                if (m->bias) y[i] += m->bias[i - r * m->out];
                if (half) half[i] = to_bf16(y[i]);
            }
    }
};

void in_thread(void* data) {
    const Task& task = *static_cast<Task*>(data);
    const int64_t me = thread_number(), parts = thread_count();
    const int64_t last = me + 1 == parts ? task.m->out : share(*task.m, me + 1, parts);
    task.run(me ? share(*task.m, me, parts) : 0, last);
}

}  // namespace
}  // namespace pumice

using namespace pumice;

PUBLIC int pumice_version() { return 8; }  // raised with every change to this interface; library.py knows it

PUBLIC int pumice_has_avx2() { return has_avx2(); }

PUBLIC void pumice_threads(void* parallel, void* number, void* count) {
    openmp = reinterpret_cast<decltype(openmp)>(parallel);
    thread_number = reinterpret_cast<decltype(thread_number)>(number);
    thread_count = reinterpret_cast<decltype(thread_count)>(count);
}

// y [n, out] = x [n, in] Wᵀ + bias, both of kind `io` (fp32 or bf16) and contiguous. 0: done; 1: no memory.
PUBLIC int pumice_product(const Matrix* m, const void* x, void* y, int64_t n, int io, int avx) {
    static thread_local Scratch wide_x, wide_y;
    Product product = portable;
#ifdef PUMICE_AVX2
    if (avx) product = avx2;
#endif
    const int64_t size = io == F32 ? 4 : 2, width = padded(*m);
    for (int64_t r = 0; r < n; r += MAX_ROWS) {
        const int rows = int(n - r < MAX_ROWS ? n - r : MAX_ROWS);
        const char* from = static_cast<const char*>(x) + r * m->in * size;
        char* to = static_cast<char*>(y) + r * m->out * size;
        const float* columns = reinterpret_cast<const float*>(from);
        if (io != F32 || width != m->in) {
            float* copy = wide_x.of(rows * width);
            if (!copy) return 1;
            widen(from, io, rows, m->in, width, copy);
            columns = copy;
        }
        float* sums = io == F32 ? reinterpret_cast<float*>(to) : wide_y.of(rows * m->out);
        if (!sums) return 1;
        Task task{m, product, columns, sums, io == F32 ? nullptr : reinterpret_cast<uint16_t*>(to), rows};
        if (openmp && bits_before(*m, m->out) / 8 >= SMALL) openmp(in_thread, &task, 0, 0);
        else task.run(0, m->out);
    }
    return 0;
}
