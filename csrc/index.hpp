// A shard's Megatron index in memory (docs/data-format.md): sizes of documents without their tokens. The arrays
// stand at odd offsets, so every entry is copied out.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace emu3 {

// Where the answers go, one entry a document each.
struct Description {
    int64_t *length, *caption, *kind;
};

class ShardIndex {
   public:
    static constexpr int64_t kHeader = 34;
    static constexpr int64_t kTokenBytes = 4;
    enum Kind : int64_t { kText = 0, kPair = 1, kOther = 2 };

    ShardIndex(const uint8_t* data, int64_t num_sequences, int64_t num_documents)
        : num_sequences_(num_sequences),
          num_documents_(num_documents),
          lengths_(data + kHeader),
          pointers_(lengths_ + 4 * num_sequences),
          borders_(pointers_ + 8 * num_sequences),
          modes_(reinterpret_cast<const int8_t*>(borders_ + 8 * (num_documents + 1))) {}

    void describe(const int64_t* documents, int64_t count, const Description& out) const {
        for (int64_t place = 0; place < count; ++place) {
            const int64_t document = documents[place];
            if (document < 0 || document >= num_documents_) refuse("document", document, num_documents_);
            const int64_t first = at<int64_t>(borders_, document), end = at<int64_t>(borders_, document + 1);
            if (first < 0 || end <= first || end > num_sequences_) refuse("border", first, num_sequences_);
            const int64_t last = end - 1;
            out.length[place] = (at<int64_t>(pointers_, last) - at<int64_t>(pointers_, first)) / kTokenBytes +
                                at<int32_t>(lengths_, last);
            bool spans = false;
            for (int64_t sequence = first; sequence < end; ++sequence) spans |= modes_[sequence] != 0;
            const bool pair = end - first == 2 && modes_[first] == 0 && modes_[last] != 0;
            out.caption[place] = pair ? at<int32_t>(lengths_, first) : 0;
            out.kind[place] = pair ? kPair : spans ? kOther : kText;
        }
    }

   private:
    template <class T>
    static T at(const uint8_t* array, int64_t number) {
        T value;
        std::memcpy(&value, array + static_cast<int64_t>(sizeof(T)) * number, sizeof(T));
        return value;
    }

    [[noreturn]] static void refuse(const char* what, int64_t value, int64_t limit) {
        throw std::invalid_argument(std::string(what) + " " + std::to_string(value) + " must lie in [0, " +
                                    std::to_string(limit) + ")");
    }

    int64_t num_sequences_, num_documents_;
    const uint8_t *lengths_, *pointers_, *borders_;
    const int8_t* modes_;
};

}  // namespace emu3
