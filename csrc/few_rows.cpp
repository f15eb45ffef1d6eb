#include "few_rows.hpp"

#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define EMU3_AVX512 1
#include <immintrin.h>
#endif

namespace emu3 {

#ifdef EMU3_AVX512
namespace {

constexpr int kLanes = 16;
constexpr int kRows = 8;     // of x at a time
constexpr int kColumns = 3;  // of y at a time: 8 * 3 sums and 3 weights fit in 32 registers

// (The masked forms: the plain ones make GCC 12 warn of its own header.)
__attribute__((target("avx512f"))) inline float sum_of(__m512 lanes) {
    constexpr __mmask16 all = 0xFFFF;
    lanes = _mm512_add_ps(lanes, _mm512_maskz_shuffle_f32x4(all, lanes, lanes, 0x4E));
    lanes = _mm512_add_ps(lanes, _mm512_maskz_shuffle_f32x4(all, lanes, lanes, 0xB1));
    lanes = _mm512_add_ps(lanes, _mm512_maskz_permute_ps(all, lanes, 0x4E));
    lanes = _mm512_add_ps(lanes, _mm512_maskz_permute_ps(all, lanes, 0xB1));
    return _mm512_cvtss_f32(lanes);
}

template <int Rows, int Columns>
__attribute__((target("avx512f"))) void block(const FewRows& product, int64_t row, int64_t column) {
    const int64_t width = product.width;
    const float* x = product.x + row * width;
    const float* w = product.w + column * width;
    __m512 sums[Columns][Rows];
    for (int c = 0; c < Columns; ++c)
        for (int r = 0; r < Rows; ++r) sums[c][r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k += kLanes) {
        const int64_t left = width - k;
        const __mmask16 mask = left >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
        __m512 weights[Columns];
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) weights[c] = _mm512_maskz_loadu_ps(mask, w + c * width + k);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const __m512 value = _mm512_maskz_loadu_ps(mask, x + r * width + k);
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) sums[c][r] = _mm512_fmadd_ps(weights[c], value, sums[c][r]);
        }
    }
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Columns; ++c)
            product.y[(row + r) * product.columns + column + c] = sum_of(sums[c][r]);
}

using Block = void (*)(const FewRows&, int64_t, int64_t);

template <int Columns, int... Rows>
constexpr Block blocks_of(int rows, std::integer_sequence<int, Rows...>) {
    constexpr Block blocks[] = {&block<Rows + 1, Columns>...};
    return blocks[rows - 1];
}

template <int Columns>
void columns_at(const FewRows& product, int64_t column) {
    blocks_of<Columns>(static_cast<int>(product.rows), std::make_integer_sequence<int, kRows>())(product, 0, column);
}

void share(const FewRows& product, int64_t first, int64_t last) {
    int64_t column = first;
    for (; column + kColumns <= last; column += kColumns) columns_at<kColumns>(product, column);
    for (; column < last; ++column) columns_at<1>(product, column);
}

// With more rows than kRows x no longer stays in the nearest cache. There a lane is a row: x is turned once, and a
// load of it serves all columns of a block. Groups of 16 rows, `turned` is [width][16 * Groups].
template <int Groups, int Columns>
__attribute__((target("avx512f"))) void turned_block(const FewRows& product, const float* turned, int64_t row,
                                                     int64_t column) {
    const int64_t width = product.width;
    const float* w = product.w + column * width;
    __m512 sums[Columns][Groups];
    for (int c = 0; c < Columns; ++c)
        for (int g = 0; g < Groups; ++g) sums[c][g] = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; ++k) {
        __m512 values[Groups];
#pragma GCC unroll 2
        for (int g = 0; g < Groups; ++g) values[g] = _mm512_loadu_ps(turned + (k * Groups + g) * kLanes);
#pragma GCC unroll 24
        for (int c = 0; c < Columns; ++c) {
            const __m512 weight = _mm512_set1_ps(w[c * width + k]);
#pragma GCC unroll 2
            for (int g = 0; g < Groups; ++g) sums[c][g] = _mm512_fmadd_ps(weight, values[g], sums[c][g]);
        }
    }
    const int64_t rows = std::min<int64_t>(Groups * kLanes, product.rows - row);
    for (int c = 0; c < Columns; ++c) {
        float out[Groups * kLanes];
        for (int g = 0; g < Groups; ++g) _mm512_storeu_ps(out + g * kLanes, sums[c][g]);
        for (int64_t r = 0; r < rows; ++r) product.y[(row + r) * product.columns + column + c] = out[r];
    }
}

template <int Groups>
void turned_share(const FewRows& product, const float* turned, int64_t row, int64_t first, int64_t last) {
    constexpr int kMany = 24 / Groups, kSome = 4;
    int64_t column = first;
    for (; column + kMany <= last; column += kMany) turned_block<Groups, kMany>(product, turned, row, column);
    for (; column + kSome <= last; column += kSome) turned_block<Groups, kSome>(product, turned, row, column);
    for (; column < last; ++column) turned_block<Groups, 1>(product, turned, row, column);
}

// The rows from `row` on, at most 16 * groups, with zeros where there are no more.
std::vector<float> turn(const FewRows& product, int64_t row, int64_t groups) {
    const int64_t lanes = groups * kLanes, rows = std::min(lanes, product.rows - row);
    std::vector<float> turned(product.width * lanes, 0.0f);
    for (int64_t k = 0; k < product.width; ++k)
        for (int64_t r = 0; r < rows; ++r) turned[k * lanes + r] = product.x[(row + r) * product.width + k];
    return turned;
}

// Calls work(first, last) on parts of the columns, one a thread.
template <class Work>
void in_parts(int64_t columns, int64_t threads, Work work) {
    std::vector<std::thread> others;
    const int64_t part = (columns + threads - 1) / threads;
    for (int64_t first = part; first < columns; first += part)
        others.emplace_back(work, first, std::min(first + part, columns));
    work(0, std::min(part, columns));
    for (std::thread& other : others) other.join();
}

}  // namespace

bool few_rows_supported() { return __builtin_cpu_supports("avx512f"); }

void few_rows(const FewRows& product, int64_t threads) {
    if (product.rows <= kRows) {
        in_parts(product.columns, threads, [&](int64_t first, int64_t last) { share(product, first, last); });
        return;
    }
    for (int64_t row = 0; row < product.rows; row += 2 * kLanes) {
        const int64_t groups = product.rows - row > kLanes ? 2 : 1;
        const std::vector<float> turned = turn(product, row, groups);
        const auto work = groups == 2 ? &turned_share<2> : &turned_share<1>;
        in_parts(product.columns, threads,
                 [&](int64_t first, int64_t last) { work(product, turned.data(), row, first, last); });
    }
}
#else
bool few_rows_supported() { return false; }

void few_rows(const FewRows&, int64_t) {}
#endif

}  // namespace emu3
