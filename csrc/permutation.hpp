// A keyed permutation of range(n) that needs no memory: a Feistel network on the next power of two, walked until
// the image falls below n. emu3_megatron/data/permutation.py holds the same in numpy, for the test.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace emu3 {

constexpr int kFeistelRounds = 8;

// Finaliser of splitmix64: every input bit reaches every output bit.
inline uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
    return value ^ (value >> 31);
}

class KeyedPermutation {
   public:
    KeyedPermutation(int64_t size, uint64_t key) : size_(static_cast<uint64_t>(size)) {
        int bits = 2;
        while (bits < 63 && (uint64_t{1} << bits) < size_) ++bits;
        low_bits_ = bits / 2;
        low_mask_ = (uint64_t{1} << low_bits_) - 1;
        high_mask_ = (uint64_t{1} << (bits - low_bits_)) - 1;
        for (int round = 0; round < kFeistelRounds; ++round)
            keys_[round] = mix(key + 0x9E3779B97F4A7C15ull * (static_cast<uint64_t>(round) + 1));
    }

    int64_t operator()(int64_t position) const {
        uint64_t value = static_cast<uint64_t>(position);
        do {
            uint64_t high = value >> low_bits_, low = value & low_mask_;
            for (int round = 0; round < kFeistelRounds; round += 2) {
                high ^= mix(low + keys_[round]) & high_mask_;
                low ^= mix(high + keys_[round + 1]) & low_mask_;
            }
            value = (high << low_bits_) | low;
        } while (value >= size_);
        return static_cast<int64_t>(value);
    }

   private:
    uint64_t size_, low_mask_, high_mask_;
    int low_bits_;
    uint64_t keys_[kFeistelRounds];
};

inline std::vector<int64_t> permute(const int64_t* positions, int64_t count, int64_t size, uint64_t key) {
    if (size < 1) throw std::invalid_argument("size=" + std::to_string(size) + " must be at least 1");
    const KeyedPermutation permutation(size, key);
    std::vector<int64_t> values(static_cast<size_t>(count));
    for (int64_t index = 0; index < count; ++index) {
        if (positions[index] < 0 || positions[index] >= size)
            throw std::invalid_argument("position " + std::to_string(positions[index]) + " must lie in [0, " +
                                        std::to_string(size) + ")");
        values[static_cast<size_t>(index)] = permutation(positions[index]);
    }
    return values;
}

}  // namespace emu3
