// Products of a few rows with a large matrix, y[r][c] = sum over k of x[r][k] * w[c][k], as decoding needs them.
// BLAS libraries are built for large products: with 4 to 32 rows they reach half of the memory's bandwidth.
#pragma once

#include <cstdint>

namespace emu3 {

// Weight is float, or int8_t with a scale for every column.
template <class Weight>
struct FewRows {
    const float* x;       // [rows][width]
    const Weight* w;      // [columns][width]
    const float* scales;  // [columns] of int8_t
    float* y;             // [rows][columns]
    int64_t rows, columns, width;
};

// Whether this machine has the instructions.
bool few_rows_supported();

// Computes y on `threads` threads. rows > 0.
void few_rows(const FewRows<float>& product, int64_t threads);
void few_rows(const FewRows<int8_t>& product, int64_t threads);

}  // namespace emu3
