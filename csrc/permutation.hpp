// Keyed randomness without a state: a permutation of range(n) that needs no memory (a Feistel network on the next
// power of two, walked until the image falls below n), and uniform numbers by position.
// emu3_megatron/data/permutation.py holds the same in numpy, for the test.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.hpp"

namespace emu3 {

constexpr int kFeistelRounds = 8;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// Finaliser of splitmix64: every input bit reaches every output bit.
inline uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
    return value ^ (value >> 31);
}

class KeyedPermutation {
   public:
    // Positions handled at a time: a round waits for two multiplications, those of several positions overlap.
    static constexpr int kLanes = 8;

    KeyedPermutation(int64_t size, uint64_t key) : size_(static_cast<uint64_t>(size)) {
        int bits = 2;
        while (bits < 63 && (uint64_t{1} << bits) < size_) ++bits;
        low_bits_ = bits / 2;
        low_mask_ = (uint64_t{1} << low_bits_) - 1;
        high_mask_ = (uint64_t{1} << (bits - low_bits_)) - 1;
        for (int round = 0; round < kFeistelRounds; ++round)
            keys_[round] = mix(key + kGolden * (static_cast<uint64_t>(round) + 1));
    }

    // Replaces each position by its image.
    void apply(int64_t* values, int64_t count) const {
        std::vector<int64_t> outside;
        step(values, count, [](int64_t index) { return index; });
        for (int64_t index = 0; index < count; ++index)
            if (static_cast<uint64_t>(values[index]) >= size_) outside.push_back(index);
        while (!outside.empty()) {
            step(values, static_cast<int64_t>(outside.size()), [&](int64_t index) { return outside[index]; });
            size_t left = 0;
            for (const int64_t index : outside)
                if (static_cast<uint64_t>(values[index]) >= size_) outside[left++] = index;
            outside.resize(left);
        }
    }

   private:
    // One pass of the network over values[place(0)], ..., values[place(count - 1)].
    template <class Place>
    void step(int64_t* values, int64_t count, const Place& place) const {
        uint64_t high[kLanes], low[kLanes];
        for (int64_t first = 0; first < count; first += kLanes) {
            const int lanes = static_cast<int>(count - first < kLanes ? count - first : kLanes);
            for (int lane = 0; lane < kLanes; ++lane) {
                const uint64_t value = lane < lanes ? static_cast<uint64_t>(values[place(first + lane)]) : 0;
                high[lane] = value >> low_bits_;
                low[lane] = value & low_mask_;
            }
            for (int round = 0; round < kFeistelRounds; round += 2) {
                for (int lane = 0; lane < kLanes; ++lane) high[lane] ^= mix(low[lane] + keys_[round]) & high_mask_;
                for (int lane = 0; lane < kLanes; ++lane) low[lane] ^= mix(high[lane] + keys_[round + 1]) & low_mask_;
            }
            for (int lane = 0; lane < lanes; ++lane)
                values[place(first + lane)] = static_cast<int64_t>((high[lane] << low_bits_) | low[lane]);
        }
    }

    uint64_t size_, low_mask_, high_mask_;
    int low_bits_;
    uint64_t keys_[kFeistelRounds];
};

inline void permute(int64_t* values, int64_t count, int64_t size, uint64_t key) {
    if (size < 1) throw std::invalid_argument("size=" + std::to_string(size) + " must be at least 1");
    for (int64_t index = 0; index < count; ++index)
        if (values[index] < 0 || values[index] >= size)
            throw std::invalid_argument("position " + std::to_string(values[index]) + " must lie in [0, " +
                                        std::to_string(size) + ")");
    KeyedPermutation(size, key).apply(values, count);
}

// A number in [0, 1) for each position.
inline void uniform(const int64_t* positions, int64_t count, uint64_t key, double* out) {
    for (int64_t index = 0; index < count; ++index)
        out[index] = static_cast<double>(static_cast<int64_t>(
                         mix(static_cast<uint64_t>(positions[index]) * kGolden + key) >> 11)) *
                     0x1p-53;
}

}  // namespace emu3
