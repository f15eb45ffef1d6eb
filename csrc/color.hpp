// 8-bit YCbCr 4:2:0 to RGB in the arithmetic of FFmpeg's converter with full chroma interpolation and accurate
// rounding, bit for bit, several times faster. FFmpeg's intermediate values are exact multiples: 512 of a luma
// sample, 32 of the weighted sum of four chroma samples (weights of a sixteenth), so integers hold them all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emu3 {

// One plane: its first sample and the bytes from row to row.
struct Plane {
    const uint8_t* data;
    ptrdiff_t stride;
    const uint8_t* row(int64_t number) const { return data + number * stride; }
};

// Fixed-point coefficients of 13 bits; each fits into 16, with its sign.
struct ColorRule {
    int32_t luma_offset, luma, cr_red, cr_green, cb_green, cb_blue;
};

// Where chroma samples lie between the four luma samples that share them.
struct Siting {
    bool left;     // in the left column; else between the columns
    int vertical;  // -1 in the upper row, 1 in the lower row, 0 between them
};

// Height and width are even; rgb has room for height * width * 3 bytes.
void convert_420(const Plane& luma, const Plane& cb, const Plane& cr, int64_t height, int64_t width,
                 const ColorRule& rule, const Siting& siting, uint8_t* rgb);

}  // namespace emu3
