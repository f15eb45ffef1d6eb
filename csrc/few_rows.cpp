#include "few_rows.hpp"

#include <algorithm>
#include <cstring>
#include <exception>
#include <thread>
#include <type_traits>
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

// 16 values, or with zeros behind them the last `left`.
__attribute__((target("avx512f"))) inline __m512 load(const float* values, int64_t left) {
    if (left >= kLanes) return _mm512_loadu_ps(values);
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), values);
}

__attribute__((target("avx512f"))) inline __m512 load(const int8_t* values, int64_t left) {
    int8_t bytes[kLanes] = {};
    if (left < kLanes) {
        std::memcpy(bytes, values, static_cast<size_t>(left));
        values = bytes;
    }
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    constexpr __mmask16 all = 0xFFFF;
    return _mm512_maskz_cvtepi32_ps(all, _mm512_maskz_cvtepi8_epi32(all, packed));
}

inline float scale_of(const FewRows<float>&, int64_t) { return 1.0f; }
inline float scale_of(const FewRows<int8_t>& product, int64_t column) { return product.scales[column]; }

template <int Rows, int Columns, class Weight>
__attribute__((target("avx512f"), always_inline)) inline void add(const float* x, const Weight* w, int64_t width,
                                                                   int64_t left, __m512 (&sums)[Columns][Rows]) {
    __m512 weights[Columns];
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) weights[c] = load(w + c * width, left);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
        const __m512 value = load(x + r * width, left);
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) sums[c][r] = _mm512_fmadd_ps(weights[c], value, sums[c][r]);
    }
}

// Few rows: a lane is a place along k.
template <int Rows, int Columns, class Weight>
__attribute__((target("avx512f"))) void block(const FewRows<Weight>& product, int64_t column) {
    const int64_t width = product.width;
    const float* x = product.x;
    const Weight* w = product.w + column * width;
    __m512 sums[Columns][Rows];
    for (int c = 0; c < Columns; ++c)
        for (int r = 0; r < Rows; ++r) sums[c][r] = _mm512_setzero_ps();
    const int64_t whole = width - width % kLanes;
    for (int64_t k = 0; k < whole; k += kLanes) add<Rows, Columns>(x + k, w + k, width, kLanes, sums);
    if (whole < width) add<Rows, Columns>(x + whole, w + whole, width, width - whole, sums);
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Columns; ++c)
            product.y[r * product.columns + column + c] = sum_of(sums[c][r]) * scale_of(product, column + c);
}

template <int Columns, class Weight, int... Rows>
void columns_at(const FewRows<Weight>& product, int64_t column, std::integer_sequence<int, Rows...>) {
    constexpr void (*blocks[])(const FewRows<Weight>&, int64_t) = {&block<Rows + 1, Columns, Weight>...};
    blocks[product.rows - 1](product, column);
}

template <class Weight>
void share(const FewRows<Weight>& product, int64_t first, int64_t last) {
    constexpr auto numbers = std::make_integer_sequence<int, kRows>();
    int64_t column = first;
    for (; column + kColumns <= last; column += kColumns) columns_at<kColumns>(product, column, numbers);
    for (; column < last; ++column) columns_at<1>(product, column, numbers);
}

// With more rows than kRows x no longer stays in the nearest cache. There a lane is a row: x is turned once, and a
// load of it serves all columns of a block. Groups of 16 rows, `turned` is [width][16 * Groups], w that of the block.
template <int Groups, int Columns, class Weight>
__attribute__((target("avx512f"))) void turned_block(const FewRows<Weight>& product, const float* turned,
                                                     const float* w, int64_t row, int64_t column) {
    const int64_t width = product.width;
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
        const float scale = scale_of(product, column + c);
        for (int64_t r = 0; r < rows; ++r) product.y[(row + r) * product.columns + column + c] = out[r] * scale;
    }
}

// The rows of w from `column` on as floats, in `buffer` where they are none.
inline const float* plain(const FewRows<float>& product, int64_t column, int64_t, float*) {
    return product.w + column * product.width;
}

__attribute__((target("avx512f"))) inline const float* plain(const FewRows<int8_t>& product, int64_t column,
                                                             int64_t count, float* buffer) {
    const int8_t* w = product.w + column * product.width;
    for (int64_t i = 0; i < count * product.width; ++i) buffer[i] = static_cast<float>(w[i]);
    return buffer;
}

constexpr int kSums = 24;  // vectors of sums of a block, so the most columns of one

template <int Groups, class Weight>
void turned_share(const FewRows<Weight>& product, const float* turned, int64_t row, int64_t first, int64_t last,
                  float* buffer) {
    constexpr int kMany = kSums / Groups, kSome = 4;
    int64_t column = first;
    for (; column + kMany <= last; column += kMany)
        turned_block<Groups, kMany>(product, turned, plain(product, column, kMany, buffer), row, column);
    for (; column + kSome <= last; column += kSome)
        turned_block<Groups, kSome>(product, turned, plain(product, column, kSome, buffer), row, column);
    for (; column < last; ++column)
        turned_block<Groups, 1>(product, turned, plain(product, column, 1, buffer), row, column);
}

// The rows from `row` on, at most 16 * groups, with zeros where there are no more.
template <class Weight>
std::vector<float> turn(const FewRows<Weight>& product, int64_t row, int64_t groups) {
    const int64_t lanes = groups * kLanes, rows = std::min(lanes, product.rows - row);
    std::vector<float> turned(product.width * lanes, 0.0f);
    for (int64_t k = 0; k < product.width; ++k)
        for (int64_t r = 0; r < rows; ++r) turned[k * lanes + r] = product.x[(row + r) * product.width + k];
    return turned;
}

// Calls work(part, first, last) on parts of the columns, one a thread; the caller does those that get no thread.
// `work` must not throw, so what it needs is allocated before.
template <class Work>
void in_parts(int64_t columns, int64_t threads, const Work& work) {
    const int64_t size = (columns + threads - 1) / threads;
    const auto call = [&](int64_t part) { work(part, part * size, std::min((part + 1) * size, columns)); };
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(threads));
    int64_t part = 1;
    try {
        for (; part * size < columns; ++part) others.emplace_back(call, part);
    } catch (const std::exception&) {  // no thread, or no memory for one
    }
    call(0);
    for (; part * size < columns; ++part) call(part);
    for (std::thread& other : others) other.join();
}

template <class Weight>
void compute(const FewRows<Weight>& product, int64_t threads) {
    if (product.columns == 0) return;
    threads = std::min(threads, product.columns);
    if (product.rows <= kRows) {
        in_parts(product.columns, threads,
                 [&](int64_t, int64_t first, int64_t last) { share(product, first, last); });
        return;
    }
    const int64_t room = std::is_same_v<Weight, float> ? 0 : kSums * product.width;  // of each part
    std::vector<float> buffer(static_cast<size_t>(room * threads));
    for (int64_t row = 0; row < product.rows; row += 2 * kLanes) {
        const int64_t groups = product.rows - row > kLanes ? 2 : 1;
        const std::vector<float> turned = turn(product, row, groups);
        const auto work = groups == 2 ? &turned_share<2, Weight> : &turned_share<1, Weight>;
        in_parts(product.columns, threads, [&](int64_t part, int64_t first, int64_t last) {
            work(product, turned.data(), row, first, last, buffer.data() + part * room);
        });
    }
}

}  // namespace

bool few_rows_supported() { return __builtin_cpu_supports("avx512f"); }

void few_rows(const FewRows<float>& product, int64_t threads) { compute(product, threads); }
void few_rows(const FewRows<int8_t>& product, int64_t threads) { compute(product, threads); }
#else
bool few_rows_supported() { return false; }

void few_rows(const FewRows<float>&, int64_t) {}
void few_rows(const FewRows<int8_t>&, int64_t) {}
#endif

}  // namespace emu3
