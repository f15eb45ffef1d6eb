// Products of a few rows with a large matrix, y[r][c] = sum over k of x[r][k] * w[c][k], as decoding needs them.
// BLAS libraries are built for large products: with 4 to 32 rows they reach half of the memory's bandwidth.
#pragma once

#include <cstdint>

namespace emu3 {

struct FewRows {
    const float* x;  // [rows][width]
    const float* w;  // [columns][width]
    float* y;        // [rows][columns]
    int64_t rows, columns, width;
};

// Whether this machine has the instructions.
bool few_rows_supported();

// Computes y on `threads` threads. rows > 0.
void few_rows(const FewRows& product, int64_t threads);

}  // namespace emu3
