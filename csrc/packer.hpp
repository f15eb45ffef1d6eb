// Packing documents into windows; the rules are in docs/packing.md, the same in plain Python in
// emu3_megatron/data/packing_reference.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "buffer.hpp"

namespace emu3 {

struct PackOptions {
    int64_t capacity;      // tokens of a window, a multiple of align
    int64_t align;         // every piece is rounded up to a multiple of this
    int64_t open_windows;  // online: windows open at the same time, at most
    int64_t min_piece;     // tokens of the smallest piece of a split document
    bool fill;             // pour splittable documents into holes
};

struct PackInput {
    const int32_t* lengths;     // tokens of each document, each >= 1
    const uint8_t* splittable;  // nonzero: may be split; null: none may
    int64_t size;

    bool splits(int64_t document) const { return splittable != nullptr && splittable[document] != 0; }
};

// Pieces in window order: window w holds pieces [offsets[w], offsets[w + 1]).
struct Packed {
    Buffer<int64_t> offsets;
    Buffer<int32_t> document;
    Buffer<int32_t> start;    // first token of the piece within its document
    Buffer<int32_t> length;   // tokens of the piece, before alignment
    Buffer<int32_t> dropped;  // documents that are longer than a window and may not be split
};

struct Piece {
    int32_t document, start, length;
};

// All sizes in units of the alignment; lengths stay in tokens at the two ends only.
struct Units {
    int32_t capacity;
    int32_t align;
    int32_t min_piece;

    // Checks everything; throws std::invalid_argument.
    static Units check(const PackInput& input, const PackOptions& options);

    int32_t of(int32_t tokens) const {
        return align == 1 ? tokens : static_cast<int32_t>((int64_t{tokens} + align - 1) / align);
    }

    // First piece of a document of `rest` units where `room` < `rest` is left; 0: it cannot be split there.
    int32_t first_piece(int32_t rest, int32_t room) const {
        if (room < min_piece || rest < 2 * min_piece) return 0;
        return std::min(room, rest - min_piece);
    }

    // First piece of a document of `rest` > capacity units that opens a window.
    int32_t window_piece(int32_t rest) const { return std::min(capacity, rest - min_piece); }

    // The first `units` units of `piece`, which keeps the rest.
    Piece take(Piece& piece, int32_t units) const {
        const Piece first{piece.document, piece.start, units * align};
        piece.start += first.length;
        piece.length -= first.length;
        return first;
    }
};

// Both throw std::invalid_argument on bad options or lengths.

// Best fit over at most open_windows windows, in the order given; the oldest is closed first.
Packed pack_online(const PackInput& input, const PackOptions& options);

// Best-fit decreasing over all documents.
Packed pack_offline(const PackInput& input, const PackOptions& options);

}  // namespace emu3
