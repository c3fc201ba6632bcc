// What the entry points share: torch's threads, memory kept from call to call, and x and y in fp32 or bf16.
#pragma once
#include <cstdlib>
#include <cstring>

#include "matrix.h"

#ifdef _WIN32
#define PUBLIC extern "C" __declspec(dllexport)
#else
#define PUBLIC extern "C" __attribute__((visibility("default")))
#endif

namespace pumice {

constexpr int64_t SMALL = 1 << 15;  // bytes below which waking a second thread costs more than it saves

// The OpenMP entry points of the runtime that torch has loaded; null: everything runs on the calling thread.
extern void (*openmp)(void (*)(void*), void*, unsigned, unsigned);
extern int (*thread_number)();
extern int (*thread_count)();

// Memory of the calling thread that is kept from call to call, aligned for vectors.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }
    float* of(int64_t floats) {
        if (floats > size_) {
            std::free(memory_);
            memory_ = static_cast<float*>(std::malloc(size_t(floats) * sizeof(float) + 64));
            size_ = memory_ ? floats : 0;
        }
        return memory_ ? reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t(63)) : nullptr;
    }

  private:
    float* memory_ = nullptr;
    int64_t size_ = 0;
};

inline void widen(const void* x, int kind, int64_t n, int64_t in, int64_t width, float* out) {
    for (int64_t r = 0; r < n; ++r, out += width) {
        if (kind == F32) {
            std::memcpy(out, static_cast<const float*>(x) + r * in, size_t(in) * sizeof(float));
        } else {
            const uint16_t* row = static_cast<const uint16_t*>(x) + r * in;
            for (int64_t j = 0; j < in; ++j) {
                const uint32_t word = uint32_t(row[j]) << 16;
                std::memcpy(out + j, &word, sizeof word);
            }
        }
        std::memset(out + in, 0, size_t(width - in) * sizeof(float));
    }
}

inline uint16_t to_bf16(float f) {  // to nearest, ties to even; a NaN stays one
    uint32_t word;
    std::memcpy(&word, &f, sizeof word);
    if ((word & 0x7fffffffu) > 0x7f800000u) return uint16_t(word >> 16 | 64);
    return uint16_t((word + 0x7fffu + (word >> 16 & 1)) >> 16);
}

}  // namespace pumice
