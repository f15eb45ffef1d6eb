#include "color.hpp"

#include <algorithm>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define EMU3_AVX2
#endif

// Versions for newer processors, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EMU3_CLONES __attribute__((target_clones("avx2", "sse4.1", "default")))
#else
#define EMU3_CLONES
#endif

// Arrays never overlap; without being told so, a compiler gives up on loops over so many of them.
#define RESTRICT __restrict

namespace emu3 {

namespace {

constexpr int32_t kChromaZero = 128 * 16;
constexpr uint32_t kHalf = 1u << 21;
constexpr int kShift = 22;
constexpr int32_t kMost = (1 << 30) - 1;

// A row of chroma at full width, in sixteenths, centred at zero: from two rows of samples with weights of fourths.
EMU3_CLONES void interpolate(const uint8_t* RESTRICT above, const uint8_t* RESTRICT below, int16_t weight_above,
                             int16_t weight_below, int64_t count, bool left, int16_t* RESTRICT sums,
                             int16_t* RESTRICT row) {
    // sums has a place before the first and after the last sample, for the edges
    for (int64_t i = 0; i < count; ++i)
        sums[i + 1] = static_cast<int16_t>(above[i] * weight_above + below[i] * weight_below);
    sums[0] = sums[1];
    sums[count + 1] = sums[count];
    const int16_t near = left ? 4 : 3, before = left ? 0 : 1, middle = left ? 2 : 3, after = left ? 2 : 1;
    for (int64_t i = 0; i < count; ++i) {
        row[2 * i] = static_cast<int16_t>(before * sums[i] + near * sums[i + 1] - kChromaZero);
        row[2 * i + 1] = static_cast<int16_t>(middle * sums[i + 1] + after * sums[i + 2] - kChromaZero);
    }
}

inline uint8_t to_byte(uint32_t value) {
    const auto wrapped = static_cast<int32_t>(value);  // as FFmpeg's, which wraps for colours far out of range
    return static_cast<uint8_t>(std::min(std::max(wrapped, 0), kMost) >> kShift);
}

// A row of pixels from `first` on, one array for each colour.
EMU3_CLONES void convert_row(const uint8_t* RESTRICT luma, const int16_t* RESTRICT cb, const int16_t* RESTRICT cr,
                             int64_t first, int64_t width, const ColorRule& rule, uint8_t* RESTRICT red,
                             uint8_t* RESTRICT green, uint8_t* RESTRICT blue) {
    const int32_t offset = rule.luma_offset, scale = rule.luma;
    const int32_t cr_red = 32 * rule.cr_red, cr_green = 32 * rule.cr_green;
    const int32_t cb_green = 32 * rule.cb_green, cb_blue = 32 * rule.cb_blue;
    for (int64_t x = first; x < width; ++x) {
        const uint32_t base = static_cast<uint32_t>((luma[x] * 512 - offset) * scale) + kHalf;
        const uint32_t from_cr = static_cast<uint32_t>(cr[x] * cr_green);
        red[x] = to_byte(base + static_cast<uint32_t>(cr[x] * cr_red));
        green[x] = to_byte(base + from_cr + static_cast<uint32_t>(cb[x] * cb_green));
        blue[x] = to_byte(base + static_cast<uint32_t>(cb[x] * cb_blue));
    }
}

#ifdef EMU3_AVX2

// Two coefficients as vpmaddwd takes them: for the lower and the upper of two neighbours of 16 bits.
__attribute__((target("avx2"))) inline __m256i coefficients(int32_t lower, int32_t upper) {
    return _mm256_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(upper) << 16 | (lower & 0xffff)));
}

// The last steps of `to_byte` for 16 pixels, from sums without their common factor of 32.
__attribute__((target("avx2"))) inline void store_bytes(__m256i low, __m256i high, uint8_t* bytes) {
    const __m256i half = _mm256_set1_epi32(kHalf);
    low = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(low, 5), half), kShift);
    high = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, 5), half), kShift);
    const __m256i levels = _mm256_packs_epi32(low, high);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(levels, levels), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm256_castsi256_si128(packed));
}

// The pixels of a row that fill whole registers; returns how many they are. Luma and chroma are multiplied and
// added in one instruction, of 16 bits, which no compiler finds for sums of two.
__attribute__((target("avx2"))) int64_t convert_sixteens(const uint8_t* luma, const int16_t* cb, const int16_t* cr,
                                                         int64_t width, const ColorRule& rule, uint8_t* red,
                                                         uint8_t* green, uint8_t* blue) {
    const __m256i to_red = coefficients(rule.luma, rule.cr_red), to_blue = coefficients(rule.luma, rule.cb_blue);
    const __m256i to_green = coefficients(rule.luma, rule.cr_green), more_green = coefficients(rule.cb_green, 0);
    const __m256i black = _mm256_set1_epi16(static_cast<int16_t>(rule.luma_offset / 512));
    int64_t x = 0;
    for (; x + 16 <= width; x += 16) {
        const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(luma + x)));
        const __m256i y = _mm256_slli_epi16(_mm256_sub_epi16(bytes, black), 4);
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cb + x));
        const __m256i r = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cr + x));
        const __m256i yr_low = _mm256_unpacklo_epi16(y, r), yr_high = _mm256_unpackhi_epi16(y, r);
        const __m256i yb_low = _mm256_unpacklo_epi16(y, b), yb_high = _mm256_unpackhi_epi16(y, b);
        const __m256i b_low = _mm256_unpacklo_epi16(b, b), b_high = _mm256_unpackhi_epi16(b, b);
        store_bytes(_mm256_madd_epi16(yr_low, to_red), _mm256_madd_epi16(yr_high, to_red), red + x);
        store_bytes(_mm256_madd_epi16(yb_low, to_blue), _mm256_madd_epi16(yb_high, to_blue), blue + x);
        store_bytes(
            _mm256_add_epi32(_mm256_madd_epi16(yr_low, to_green), _mm256_madd_epi16(b_low, more_green)),
            _mm256_add_epi32(_mm256_madd_epi16(yr_high, to_green), _mm256_madd_epi16(b_high, more_green)),
            green + x);
    }
    return x;
}

#endif

EMU3_CLONES void interleave(const uint8_t* RESTRICT red, const uint8_t* RESTRICT green,
                            const uint8_t* RESTRICT blue, int64_t width, uint8_t* RESTRICT rgb) {
    for (int64_t x = 0; x < width; ++x) {
        rgb[3 * x] = red[x];
        rgb[3 * x + 1] = green[x];
        rgb[3 * x + 2] = blue[x];
    }
}

}  // namespace

void convert_420(const Plane& luma, const Plane& cb, const Plane& cr, int64_t height, int64_t width,
                 const ColorRule& rule, const Siting& siting, uint8_t* rgb) {
    const int64_t count = width / 2, last = height / 2 - 1;
    std::vector<int16_t> sums(count + 2), cb_row(width), cr_row(width);
    std::vector<uint8_t> colors(3 * width);
    uint8_t *red = colors.data(), *green = red + width, *blue = green + width;
#ifdef EMU3_AVX2
    static const bool avx2 = __builtin_cpu_supports("avx2");
#endif
    for (int64_t y = 0; y < height; ++y) {
        const bool lower = y % 2;
        // fourths that this row takes from the chroma row of its own pair of rows
        const int own = siting.vertical == 0 ? 3 : (siting.vertical < 0) == lower ? 2 : 4;
        const int64_t pair = y / 2, other = lower ? std::min(pair + 1, last) : std::max<int64_t>(pair - 1, 0);
        const auto weight = static_cast<int16_t>(own), rest = static_cast<int16_t>(4 - own);
        interpolate(cb.row(pair), cb.row(other), weight, rest, count, siting.left, sums.data(), cb_row.data());
        interpolate(cr.row(pair), cr.row(other), weight, rest, count, siting.left, sums.data(), cr_row.data());
        int64_t done = 0;
#ifdef EMU3_AVX2
        if (avx2)
            done = convert_sixteens(luma.row(y), cb_row.data(), cr_row.data(), width, rule, red, green, blue);
#endif
        convert_row(luma.row(y), cb_row.data(), cr_row.data(), done, width, rule, red, green, blue);
        interleave(red, green, blue, width, rgb + 3 * y * width);
    }
}

}  // namespace emu3
