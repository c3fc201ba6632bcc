// A matrix in codes of which each column is read as many planes of bits as the entry that it meets is worth.
#pragma once
#include "matrix.h"

namespace pumice {

constexpr int MAX_PLANES = 4;
constexpr int TILE = 128;  // outputs that lie together: a column's two bits of each in 32 bytes, one bit in 16
constexpr int MOST = 15;   // of a code of two planes

// The order of the fields is known to library.py. `rows` is `out`, filled up to whole tiles, which lie one behind the
// other and are read in order: with 512 outputs side by side the same columns took 2.3 times as long, for what is skipped
// between them.
struct Codes {
    int64_t out, in, rows;
    const uint8_t* planes[MAX_PLANES];  // the highest first: of each tile [in, TILE · bits / 8]
    const uint16_t* step;               // fp16, of each tile [groups, TILE]
    const uint16_t* low;                // the same, or null: -2^(all bits - 1) steps
    const float* bias;                  // [out] or null
    float tau[MAX_PLANES];              // a plane is left out where |x| <= tau
    int32_t bits[MAX_PLANES];           // of each plane: 2, of the third 1 or 2
    int32_t count;
};

inline int64_t groups(const Codes& m) { return (m.in + GROUP - 1) / GROUP; }

// What one row of x asks of a group of columns: two planes are read as one code where both are, else the higher alone.
struct Asked {
    int32_t both[MAX_PLANES / 2], upper[MAX_PLANES / 2];  // how many columns
    uint8_t column[MAX_PLANES / 2][GROUP + 1];            // those with both, then those with the upper one
    int8_t x[GROUP];                                      // in int8
    float scale;   // of x: as int8 has it, or so large that the sums of a group fit 16 bits
    float middle;  // Σ x · the middle of what is not read, in steps; the half that stands for `low` is in it
    float sum;     // Σ x
};

// y[first … last) of one row, whole tiles; y is [rows].
using Read = void (*)(const Codes& m, const Asked* asked, float* y, int64_t first, int64_t last);

void portable_read(const Codes& m, const Asked* asked, float* y, int64_t first, int64_t last);
#ifdef PUMICE_AVX2
void avx2_read(const Codes& m, const Asked* asked, float* y, int64_t first, int64_t last);
#endif

// How far the code of the two planes 2·pair and 2·pair + 1 stands from the last bit of all.
inline int shift(const Codes& m, int pair) {
    int below = 0;
    for (int p = 2 * pair + 2; p < m.count; ++p) below += m.bits[p];
    return below;
}

// A tile's bits of a column, and the steps of a group, of the tile that begins at `row`.
inline const uint8_t* bits_of(const Codes& m, int plane, int64_t row, int64_t column) {
    return m.planes[plane] + (row * m.in + column * TILE) / 8 * m.bits[plane];
}
inline int64_t group_of(const Codes& m, int64_t row, int64_t g) { return row * groups(m) + g * TILE; }

}  // namespace pumice
