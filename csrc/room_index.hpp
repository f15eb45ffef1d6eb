// Windows that still have room, found by room: the tightest fit and the roomiest window in a few instructions.
//
// Rooms are integers no larger than a window, so windows lie in one bucket per room, and a bitset of three levels
// (64-ary) tells which buckets hold any. In a bucket the window touched last comes first; the plain-Python
// reference (emu3_megatron/data/packing_reference.py) breaks ties the same way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emu3 {

// A set of integers in [0, size): smallest member not below a value, and largest member.
class BitIndex {
   public:
    explicit BitIndex(int32_t size)
        : words_(static_cast<size_t>(size) / 64 + 2),
          groups_(words_.size() / 64 + 1),
          tops_(groups_.size() / 64 + 1) {}

    void insert(int32_t value) {
        const uint64_t before = words_[value >> 6];
        words_[value >> 6] = before | bit(value);
        if (before != 0) return;
        groups_[value >> 12] |= bit(value >> 6);
        tops_[value >> 18] |= bit(value >> 12);
    }

    void erase(int32_t value) { erase_if(value, true); }

    // Erases without a branch on `condition`.
    void erase_if(int32_t value, bool condition) {
        if ((words_[value >> 6] &= ~(uint64_t{condition} << (value & 63))) != 0) return;
        if ((groups_[value >> 12] &= ~bit(value >> 6)) != 0) return;
        tops_[value >> 18] &= ~bit(value >> 12);
    }

    // Smallest member >= value, or -1; value < size.
    int32_t at_least(int32_t value) const {
        const uint64_t word = words_[value >> 6] & from(value);
        if (word != 0) return (value & ~63) | lowest(word);
        const int32_t next_word = (value >> 6) + 1;
        if (static_cast<size_t>(next_word >> 6) >= groups_.size()) return -1;
        const uint64_t group = groups_[next_word >> 6] & from(next_word);
        if (group != 0) return down_from_word((next_word & ~63) | lowest(group));
        const int32_t next_group = (next_word >> 6) + 1;
        size_t top = static_cast<size_t>(next_group) >> 6;
        if (top >= tops_.size()) return -1;
        uint64_t bits = tops_[top] & from(next_group);
        while (bits == 0) {
            if (++top == tops_.size()) return -1;
            bits = tops_[top];
        }
        const int32_t found = static_cast<int32_t>(top << 6) | lowest(bits);
        return down_from_word((found << 6) | lowest(groups_[found]));
    }

    // Largest member, or -1.
    int32_t largest() const {
        for (size_t top = tops_.size(); top-- > 0;) {
            if (tops_[top] == 0) continue;
            const int32_t group = static_cast<int32_t>(top << 6) | highest(tops_[top]);
            const int32_t word = (group << 6) | highest(groups_[group]);
            return (word << 6) | highest(words_[word]);
        }
        return -1;
    }

   private:
    static uint64_t bit(int32_t value) { return uint64_t{1} << (value & 63); }
    static uint64_t from(int32_t value) { return ~uint64_t{0} << (value & 63); }
    static int32_t lowest(uint64_t word) { return __builtin_ctzll(word); }
    static int32_t highest(uint64_t word) { return 63 - __builtin_clzll(word); }
    int32_t down_from_word(int32_t word) const { return (word << 6) | lowest(words_[word]); }

    std::vector<uint64_t> words_, groups_, tops_;
};

// Windows by room.
//
// Removable: a window may leave from the middle of its bucket (it costs a link). Crowded: whether a bucket holds one
// window or several is not guessed but computed, which is faster where it is a toss-up, and slower where nearly
// every bucket holds one.
template <bool Removable, bool Crowded = false>
class RoomIndex {
   public:
    explicit RoomIndex(int32_t capacity) : rooms_(capacity + 1), first_(capacity + 1, -1) {}

    // Make room for windows numbered below `count`.
    void grow(size_t count) {
        next_.resize(count);
        if (Removable) previous_.resize(count + 1);
    }

    // Remember `window` with `room` >= 1 left; it becomes the first of its bucket.
    void insert(int32_t window, int32_t room) {
        const int32_t head = first_[room];
        if (Crowded || head < 0) rooms_.insert(room);
        next_[window] = head;
        link(window, -1);
        if (Crowded || head >= 0) link(head, window);
        first_[room] = window;
    }

    // Forget the first window of the bucket of `room`, and return it.
    int32_t pop(int32_t room) {
        const int32_t window = first_[room];
        const int32_t next = next_[window];
        first_[room] = next;
        if (Crowded) {
            rooms_.erase_if(room, next < 0);
            link(next, -1);
        } else if (next < 0) {
            rooms_.erase(room);
        } else {
            link(next, -1);
        }
        return window;
    }

    // Forget `window`, which has `room` left.
    void remove(int32_t window, int32_t room) {
        static_assert(Removable, "a singly linked bucket gives up its first window only");
        const int32_t previous = previous_[window + 1];
        if (previous < 0) {
            pop(room);
            return;
        }
        next_[previous] = next_[window];
        link(next_[window], previous);
    }

    // Smallest room >= `room` that a window has, or -1; `room` is at most the capacity.
    int32_t tightest(int32_t room) const { return rooms_.at_least(room); }

    // Largest room that a window has, or -1.
    int32_t roomiest() const { return rooms_.largest(); }

   private:
    void link(int32_t window, int32_t previous) {
        if (Removable) previous_[window + 1] = previous;
    }

    BitIndex rooms_;
    std::vector<int32_t> first_;
    std::vector<int32_t> next_, previous_;  // previous_ of window w at w + 1, so that -1, no window, has a place
};

}  // namespace emu3
