// Windows from stored documents: read, verified, rendered by the template's decisions, and laid out with labels and
// classes in one pass. emu3_megatron/data/template.py (`Template.assemble`) and data/window.py (`WindowBuilder`)
// do the same in numpy.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "crc32c.hpp"
#include "modes.hpp"

namespace emu3 {

enum Modality : uint8_t { kText = 0, kVision = 1, kControl = 4, kPrompt = 6 };  // of grammar/document.py

// A window's arrays, to be filled.
struct Canvas {
    int64_t *tokens, *labels;
    uint8_t* modality;
    int64_t size;
};

// What a template and a vocabulary say about every document.
struct Rules {
    bool bos, eos;
    int32_t bos_id, eos_id;
    const uint8_t* classes;  // inside a span, of every id below vision_offset
    int32_t vision_offset, vocabulary_size;
};

// Where the segments of a stored document lie.
struct Stored {
    int file;
    int64_t num_segments;
    const int64_t* bytes;
    const int32_t* lengths;
    const int8_t* modes;
    const uint32_t* checksums;
};

// Tokens start to start + length - 1 of the rendered document stand at `at`.
struct Placement {
    bool caption_after;
    int64_t caption_tokens, start, length, at;
};

// What was wrong with a document, and where: a byte that is not there, a segment, the system's error, an id.
struct Damage {
    enum Kind { kNone, kShort, kChecksum, kUnreadable, kVocabulary } kind;
    int64_t where;
};

class WindowWriter {
   public:
    WindowWriter(const Canvas& canvas, const Rules& rules) : canvas_(canvas), rules_(rules) {}

    Damage add(const Stored& stored, const Placement& placement) {
        const Damage read = this->read(stored);
        if (read.kind != Damage::kNone) return read;
        placement_ = placement;
        position_ = 0;
        unknown_.reset();
        if (rules_.bos) control(rules_.bos_id);
        const bool pair = stored.num_segments == 2 && stored.modes[0] == kTextMode && stored.modes[1] == kSpanMode;
        if (pair) {
            const int32_t* caption = scratch_.data();
            const int64_t kept = std::min<int64_t>(placement.caption_tokens, stored.lengths[0]);
            if (!placement.caption_after) text(caption, kept, kText);
            span(caption + stored.lengths[0], stored.lengths[1]);
            if (placement.caption_after) text(caption, kept, kText);
        } else {
            segments(stored);
        }
        if (rules_.eos) control(rules_.eos_id);
        if (position_ < placement.start + placement.length)
            throw std::invalid_argument("a piece ends at token " +
                                        std::to_string(placement.start + placement.length) + " of " +
                                        std::to_string(position_) + ": the plan is another dataset's");
        return unknown_ ? Damage{Damage::kVocabulary, *unknown_} : Damage{Damage::kNone, 0};
    }

    // Has the system begin to read a document, so that those of a window come from the disk side by side.
    static void ask_ahead(const Stored& stored) {
        for (int64_t segment = 0; segment < stored.num_segments;) {
            const int64_t byte = stored.bytes[segment], size = take_run(stored, segment);
            posix_fadvise(stored.file, byte, size, POSIX_FADV_WILLNEED);  // advice: nothing is lost where it fails
        }
    }

   private:
    // Bytes of the segments from `segment` on that lie behind each other; moves `segment` past them.
    static int64_t take_run(const Stored& stored, int64_t& segment) {
        const int64_t byte = stored.bytes[segment];
        int64_t size = 0;
        do {
            size += 4 * static_cast<int64_t>(stored.lengths[segment++]);
        } while (segment < stored.num_segments && stored.bytes[segment] == byte + size);
        return size;
    }

    // Kept from window to window: fresh memory costs more than what is read into it.
    static std::vector<int32_t>& scratch() {
        thread_local std::vector<int32_t> tokens;
        return tokens;
    }

    Damage read(const Stored& stored) {
        int64_t tokens = 0;
        for (int64_t segment = 0; segment < stored.num_segments; ++segment) tokens += stored.lengths[segment];
        if (static_cast<int64_t>(scratch_.size()) < tokens) scratch_.resize(static_cast<size_t>(tokens));
        auto* data = reinterpret_cast<uint8_t*>(scratch_.data());
        for (int64_t segment = 0; segment < stored.num_segments;) {
            const int64_t byte = stored.bytes[segment], size = take_run(stored, segment);
            const Damage damage = read(stored.file, byte, size, data);
            if (damage.kind != Damage::kNone) return damage;
            data += size;
        }
        data = reinterpret_cast<uint8_t*>(scratch_.data());
        const Crc32c& crc32c = Crc32c::instance();
        for (int64_t segment = 0; segment < stored.num_segments; ++segment) {
            const size_t size = 4 * static_cast<size_t>(stored.lengths[segment]);
            if (crc32c(data, size) != stored.checksums[segment]) return {Damage::kChecksum, segment};
            data += size;
        }
        return {Damage::kNone, 0};
    }

    static Damage read(int file, int64_t byte, int64_t size, uint8_t* data) {
        for (int64_t done = 0; done < size;) {
            const ssize_t got = pread(file, data + done, static_cast<size_t>(size - done), byte + done);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) return {Damage::kUnreadable, errno};
            if (got == 0) return {Damage::kShort, byte + done};
            done += got;
        }
        return {Damage::kNone, 0};
    }

    void segments(const Stored& stored) {
        bool talk = false;
        for (int64_t segment = 0; segment < stored.num_segments; ++segment) talk |= stored.modes[segment] == kPromptMode;
        const int32_t* ids = scratch_.data();
        for (int64_t segment = 0; segment < stored.num_segments; ids += stored.lengths[segment++]) {
            const int64_t count = stored.lengths[segment];
            if (stored.modes[segment] == kSpanMode) {
                span(ids, count);
            } else if (stored.modes[segment] == kPromptMode) {
                text(ids, count, kPrompt);
            } else {
                text(ids, count, kText);
                if (talk) ends(ids, count);
            }
        }
    }

    void control(int32_t id) { text(&id, 1, kControl); }

    void text(const int32_t* ids, int64_t count, Modality modality) {
        lay(ids, count);
        const auto [from, to] = labelled(count);
        if (from < to) std::fill(label_class(from), label_class(to), modality);
        position_ += count;
    }

    // The end of every answer but the last is stored with it.
    void ends(const int32_t* ids, int64_t count) {
        position_ -= count;
        const auto [from, to] = labelled(count);
        for (int64_t place = from; place < to; ++place)
            if (ids[place - position_] == rules_.eos_id) *label_class(place) = kControl;
        position_ += count;
    }

    void span(const int32_t* ids, int64_t count) {
        constexpr int64_t kBlock = 16;
        lay(ids, count);
        const auto [from, to] = labelled(count);
        for (int64_t place = from; place < to; place += kBlock) {
            const int64_t end = std::min(to, place + kBlock);
            const int32_t* block = ids + (place - position_);
            int32_t least = block[0], most = block[0];
            for (int64_t index = 1; index < end - place; ++index) {
                least = std::min(least, block[index]);
                most = std::max(most, block[index]);
            }
            if (least < 0 || most >= rules_.vocabulary_size) {
                unknown_ = least < 0 ? least : most;
            } else if (least >= rules_.vision_offset) {
                std::fill(label_class(place), label_class(end), kVision);
            } else {
                for (int64_t index = 0; index < end - place; ++index)
                    *label_class(place + index) =
                        block[index] < rules_.vision_offset ? rules_.classes[block[index]] : uint8_t{kVision};
            }
        }
        position_ += count;
    }

    // Tokens and labels of the next `count` ids of the rendered document, as far as they lie in the piece.
    void lay(const int32_t* ids, int64_t count) {
        const int64_t shift = placement_.at - placement_.start;
        const int64_t end = placement_.start + placement_.length;
        const int64_t from = std::max(position_, placement_.start), to = std::min(position_ + count, end);
        for (int64_t place = from; place < to; ++place) canvas_.tokens[shift + place] = ids[place - position_];
        const auto [first, last] = labelled(count);
        for (int64_t place = first; place < last; ++place)
            canvas_.labels[shift + place - 1] = ids[place - position_];
    }

    // Which of the next `count` ids are labels: those after the piece's first token, and the one after its last.
    std::pair<int64_t, int64_t> labelled(int64_t count) const {
        return {std::max(position_, placement_.start + 1),
                std::min(position_ + count, placement_.start + placement_.length + 1)};
    }

    uint8_t* label_class(int64_t place) const {
        return canvas_.modality + (placement_.at - placement_.start + place - 1);
    }

    Canvas canvas_;
    Rules rules_;
    Placement placement_{};
    int64_t position_ = 0;
    std::optional<int32_t> unknown_;
    std::vector<int32_t>& scratch_ = scratch();
};

}  // namespace emu3
