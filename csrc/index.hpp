// Shards' Megatron indices in memory (docs/data-format.md): sizes of documents without their tokens. The arrays
// stand at odd offsets, so every entry is copied out. Nothing is read from a page that has not been verified.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "modes.hpp"

namespace emu3 {

// Where the answers go, one entry a document each.
struct Description {
    int64_t *length, *caption, *kind;
    int32_t* captions;
};

// Where documents lie: their shard, and the sequence, first byte, length, mode and checksum of each of their
// segments, those of document d from segments[d] on. Of several captions the chosen one is there, as a text.
struct Location {
    std::vector<int64_t> shard, segments{0};
    std::vector<int64_t> sequence, byte;
    std::vector<int32_t> lengths;
    std::vector<int8_t> modes;
    std::vector<uint32_t> checksums;
};

// A page of a shard's index that must be verified first; page -1: the index is not there yet.
using Missing = std::pair<int64_t, int64_t>;

class ShardIndex {
   public:
    static constexpr int64_t kHeader = 34, kTokenBytes = 4;
    enum Kind : int64_t { kText = 0, kPair = 1, kOther = 2 };

    ShardIndex() = default;
    ShardIndex(const uint8_t* data, const uint8_t* checksums, int64_t num_sequences, int64_t num_documents,
               const uint8_t* verified, int64_t page_bytes)
        : data_(data), checksums_(checksums), verified_(verified), page_bytes_(page_bytes), num_sequences_(num_sequences),
          num_documents_(num_documents), lengths_(kHeader), pointers_(lengths_ + 4 * num_sequences),
          borders_(pointers_ + 8 * num_sequences), modes_(borders_ + 8 * (num_documents + 1)) {}

    static int64_t bytes(int64_t num_sequences, int64_t num_documents) {
        return kHeader + 13 * num_sequences + 8 * (num_documents + 1);
    }

    bool is_there() const { return data_ != nullptr; }

    // Whether every page has been verified, so that nobody need ask for one.
    void look_for_gaps() {
        const int64_t pages = (modes_ + num_sequences_ + page_bytes_ - 1) / page_bytes_;
        complete_ = is_there() && std::memchr(verified_, 0, static_cast<size_t>(pages)) == nullptr;
    }

    // Two steps of what `describe` will read, asked of memory ahead of it.
    void prefetch_border(int64_t document) const {
        if (is_there()) __builtin_prefetch(data_ + borders_ + 8 * document);
    }
    void prefetch_entries(int64_t document) const {
        if (!complete_) return;  // the border may not be read yet
        const int64_t first = at<int64_t>(borders_, document);
        if (first < 0 || first >= num_sequences_) return;
        __builtin_prefetch(data_ + pointers_ + 8 * first);
        __builtin_prefetch(data_ + lengths_ + 4 * first);
        __builtin_prefetch(data_ + modes_ + first);
    }

    // Describes a document with caption `chosen` into entry `place`; notes pages that are missing, and reads none
    // of them.
    void describe(int64_t document, int64_t chosen, int64_t place, const Description& out, int64_t shard,
                  std::vector<Missing>& missing) const {
        int64_t first, last;
        if (!find(document, first, last, shard, missing)) return;
        // One | for all: every page that lacks is to be noted.
        if (!complete_ && (lacks(pointers_ + 8 * first, 8, shard, missing) |
                           lacks(pointers_ + 8 * last, 8, shard, missing) |
                           lacks(lengths_ + 4 * first, 4 * (last + 1 - first), shard, missing) |
                           lacks(modes_ + first, last + 1 - first, shard, missing)))
            return;
        const int64_t captions = this->captions(first, last);
        check_chosen(chosen, captions);
        out.captions[place] = static_cast<int32_t>(captions);
        if (captions > 0) {
            out.kind[place] = kPair;
            out.caption[place] = at<int32_t>(lengths_, first + chosen);
            out.length[place] = out.caption[place] + at<int32_t>(lengths_, last);
            return;
        }
        bool spans = false;
        for (int64_t sequence = first; sequence <= last; ++sequence) spans |= mode(sequence) != kTextMode;
        out.kind[place] = spans ? kOther : kText;
        out.caption[place] = 0;
        out.length[place] = (at<int64_t>(pointers_, last) - at<int64_t>(pointers_, first)) / kTokenBytes +
                            at<int32_t>(lengths_, last);
    }

    // Adds where a document with caption `chosen` lies to `out`; as `describe` where pages are missing.
    void locate(int64_t document, int64_t chosen, Location& out, int64_t shard,
                std::vector<Missing>& missing) const {
        int64_t first, last;
        if (!find(document, first, last, shard, missing)) return;
        const int64_t count = last + 1 - first;
        if (!complete_ && (lacks(pointers_ + 8 * first, 8 * count, shard, missing) |
                           lacks(lengths_ + 4 * first, 4 * count, shard, missing) |
                           lacks(modes_ + first, count, shard, missing)))
            return;
        const int64_t captions = this->captions(first, last);
        check_chosen(chosen, captions);
        out.shard.push_back(shard);
        if (captions > 0) {
            add_segment(first + chosen, kTextMode, out);
            add_segment(last, kSpanMode, out);
        } else {
            for (int64_t sequence = first; sequence <= last; ++sequence) add_segment(sequence, mode(sequence), out);
        }
        out.segments.push_back(static_cast<int64_t>(out.lengths.size()));
    }

   private:
    int8_t mode(int64_t sequence) const { return static_cast<int8_t>(data_[modes_ + sequence]); }

    // Captions of a pair, which is a caption, its alternatives, and one span; 0 for any other document.
    int64_t captions(int64_t first, int64_t last) const {
        if (first == last || mode(first) != kTextMode || mode(last) != kSpanMode) return 0;
        for (int64_t sequence = first + 1; sequence < last; ++sequence)
            if (mode(sequence) != kAlternativeMode) return 0;
        return last - first;
    }

    static void check_chosen(int64_t chosen, int64_t captions) {
        if (captions > kMaxCaptions || (chosen > 0 && chosen >= captions))
            throw std::invalid_argument("caption " + std::to_string(chosen) + " of a document with " +
                                        std::to_string(captions) + " (at most " + std::to_string(kMaxCaptions) +
                                        "): the plan is another dataset's");
    }

    void add_segment(int64_t sequence, int8_t mode, Location& out) const {
        out.sequence.push_back(sequence);
        out.byte.push_back(at<int64_t>(pointers_, sequence));
        out.lengths.push_back(at<int32_t>(lengths_, sequence));
        out.modes.push_back(mode);
        uint32_t checksum;
        std::memcpy(&checksum, checksums_ + 4 * sequence, 4);
        out.checksums.push_back(checksum);
    }

    // First and last sequence of a document; false where their page is missing.
    bool find(int64_t document, int64_t& first, int64_t& last, int64_t shard, std::vector<Missing>& missing) const {
        if (!complete_ && lacks(borders_ + 8 * document, 16, shard, missing)) return false;
        first = at<int64_t>(borders_, document);
        last = at<int64_t>(borders_, document + 1) - 1;
        if (first < 0 || last < first || last >= num_sequences_)
            throw std::invalid_argument("border " + std::to_string(first) + " must lie in [0, " +
                                        std::to_string(num_sequences_) + ")");
        return true;
    }

    // Whether a page of these bytes has not been verified; such pages are noted.
    bool lacks(int64_t offset, int64_t size, int64_t shard, std::vector<Missing>& missing) const {
        bool any = false;
        for (int64_t page = offset / page_bytes_; page <= (offset + size - 1) / page_bytes_; ++page) {
            if (verified_[page]) continue;
            missing.emplace_back(shard, page);
            any = true;
        }
        return any;
    }

    template <class T>
    T at(int64_t array, int64_t number) const {
        T value;
        std::memcpy(&value, data_ + array + static_cast<int64_t>(sizeof(T)) * number, sizeof(T));
        return value;
    }

    const uint8_t *data_ = nullptr, *checksums_ = nullptr, *verified_ = nullptr;
    int64_t page_bytes_ = 1, num_sequences_ = 0, num_documents_ = 0;
    int64_t lengths_ = 0, pointers_ = 0, borders_ = 0, modes_ = 0;
    bool complete_ = false;
};

// The shards of a dataset as one sequence of documents: shard s begins at starts[s], the last entry is the end.
class ShardIndices {
   public:
    explicit ShardIndices(std::vector<int64_t> starts) : starts_(std::move(starts)), shards_(starts_.size() - 1) {
        while ((starts_.back() >> shift_) > 4 * static_cast<int64_t>(starts_.size())) ++shift_;
        for (int64_t bucket = 0; bucket <= (starts_.back() >> shift_) + 1; ++bucket) {
            const auto after = std::upper_bound(starts_.begin(), starts_.end(), bucket << shift_);
            after_.push_back(after - starts_.begin());
        }
    }

    size_t num_shards() const { return shards_.size(); }
    int64_t num_documents(size_t shard) const { return starts_[shard + 1] - starts_[shard]; }
    void set(size_t shard, const ShardIndex& index) { shards_[shard] = index; }

    // Describes every document with its chosen caption, the first where `chosen` is null; what is missing is
    // returned, and then the answer is not whole.
    std::vector<Missing> describe(const int64_t* documents, const uint8_t* chosen, int64_t count,
                                  const Description& out) {
        constexpr int64_t kBatch = 64;  // documents whose borders are on their way from memory
        size_t owner[kBatch];
        std::vector<Missing> missing;
        for (ShardIndex& shard : shards_) shard.look_for_gaps();
        for (int64_t from = 0; from < count; from += kBatch) {
            const int64_t to = std::min(count, from + kBatch);
            for (int64_t place = from; place < to; ++place) {
                const size_t shard = owner[place - from] = shard_of(documents[place]);
                shards_[shard].prefetch_border(documents[place] - starts_[shard]);
            }
            for (int64_t place = from; place < to; ++place) {
                const size_t shard = owner[place - from];
                shards_[shard].prefetch_entries(documents[place] - starts_[shard]);
            }
            for (int64_t place = from; place < to; ++place) {
                const size_t shard = owner[place - from];
                if (shards_[shard].is_there()) {
                    shards_[shard].describe(documents[place] - starts_[shard], chosen ? chosen[place] : 0, place,
                                            out, static_cast<int64_t>(shard), missing);
                } else {
                    missing.emplace_back(static_cast<int64_t>(shard), -1);
                }
            }
        }
        return once(std::move(missing));
    }

    // Where every document lies; as `describe` where anything is missing.
    std::vector<Missing> locate(const int64_t* documents, const uint8_t* chosen, int64_t count, Location& out) {
        std::vector<Missing> missing;
        for (int64_t place = 0; place < count; ++place) {
            const size_t shard = shard_of(documents[place]);
            if (shards_[shard].is_there()) {
                shards_[shard].locate(documents[place] - starts_[shard], chosen ? chosen[place] : 0, out,
                                      static_cast<int64_t>(shard), missing);
            } else {
                missing.emplace_back(static_cast<int64_t>(shard), -1);
            }
        }
        return once(std::move(missing));
    }

   private:
    static std::vector<Missing> once(std::vector<Missing>&& missing) {
        std::sort(missing.begin(), missing.end());
        missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
        return std::move(missing);
    }

    // The search is narrowed by the document's bucket, mostly to one or two shards.
    size_t shard_of(int64_t document) const {
        if (document < 0 || document >= starts_.back())
            throw std::out_of_range("document " + std::to_string(document) + " must lie in [0, " +
                                    std::to_string(starts_.back()) + ")");
        const auto bucket = static_cast<size_t>(document >> shift_);
        const auto first = starts_.begin() + after_[bucket], last = starts_.begin() + after_[bucket + 1];
        return static_cast<size_t>(std::upper_bound(first, last, document) - starts_.begin()) - 1;
    }

    std::vector<int64_t> starts_;
    std::vector<int64_t> after_;  // shards that begin at or before the start of each bucket of 2^shift_ documents
    int shift_ = 0;
    std::vector<ShardIndex> shards_;
};

}  // namespace emu3
