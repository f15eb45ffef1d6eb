// CRC-32C (Castagnoli), by the processor's instruction where it has one (three streams at a time, since each step
// waits for the one before), else by table.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>
#define EMU3_CRC_INSTRUCTION 1
#endif

namespace emu3 {

class Crc32c {
   public:
    uint32_t operator()(const uint8_t* data, size_t size) const {
#ifdef EMU3_CRC_INSTRUCTION
        if (has_instruction_) return ~by_instruction(~uint32_t{0}, data, size);
#endif
        uint32_t crc = ~uint32_t{0};
        for (size_t index = 0; index < size; ++index) crc = bytes_[(crc ^ data[index]) & 255] ^ (crc >> 8);
        return ~crc;
    }

    static const Crc32c& instance() {
        static const Crc32c only;
        return only;
    }

   private:
    static constexpr size_t kStream = 1024;  // bytes of each of three streams

    Crc32c() {
        for (uint32_t value = 0; value < 256; ++value) {
            uint32_t crc = value;
            for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0);
            bytes_[value] = crc;
        }
        for (int place = 0; place < 4; ++place)
            for (uint32_t value = 0; value < 256; ++value) {
                uint32_t crc = value << (8 * place);
                for (size_t index = 0; index < kStream; ++index) crc = bytes_[crc & 255] ^ (crc >> 8);
                beyond_[place][value] = crc;
            }
#ifdef EMU3_CRC_INSTRUCTION
        has_instruction_ = __builtin_cpu_supports("sse4.2");
#endif
    }

#ifdef EMU3_CRC_INSTRUCTION
    // What `crc` becomes after kStream bytes of zeros.
    uint32_t beyond(uint32_t crc) const {
        return beyond_[0][crc & 255] ^ beyond_[1][(crc >> 8) & 255] ^ beyond_[2][(crc >> 16) & 255] ^
               beyond_[3][crc >> 24];
    }

    static uint64_t word(const uint8_t* data) {
        uint64_t value;
        std::memcpy(&value, data, 8);
        return value;
    }

    __attribute__((target("sse4.2"))) uint32_t by_instruction(uint32_t start, const uint8_t* data,
                                                              size_t size) const {
        uint64_t first = start;
        for (; size >= 3 * kStream; data += 3 * kStream, size -= 3 * kStream) {
            uint64_t second = 0, third = 0;
            for (size_t at = 0; at < kStream; at += 8) {
                first = _mm_crc32_u64(first, word(data + at));
                second = _mm_crc32_u64(second, word(data + kStream + at));
                third = _mm_crc32_u64(third, word(data + 2 * kStream + at));
            }
            const uint32_t both = beyond(static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second);
            first = beyond(both) ^ static_cast<uint32_t>(third);
        }
        for (; size >= 8; data += 8, size -= 8) first = _mm_crc32_u64(first, word(data));
        for (; size > 0; ++data, --size) first = _mm_crc32_u8(static_cast<uint32_t>(first), *data);
        return static_cast<uint32_t>(first);
    }

    bool has_instruction_ = false;
#endif
    std::array<uint32_t, 256> bytes_;
    std::array<std::array<uint32_t, 256>, 4> beyond_;
};

}  // namespace emu3
