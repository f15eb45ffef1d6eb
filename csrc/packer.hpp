// Packing documents into windows; the rules are in docs/packing.md, the same in plain Python in
// emu3_megatron/data/packing_reference.py.
#pragma once

#include <cstdint>
#include <vector>

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
};

// Pieces in window order: window w holds pieces [offsets[w], offsets[w + 1]).
struct Packed {
    std::vector<int64_t> offsets{0};
    std::vector<int32_t> document;
    std::vector<int32_t> start;    // first token of the piece within its document
    std::vector<int32_t> length;   // tokens of the piece, before alignment
    std::vector<int32_t> dropped;  // documents that are longer than a window and may not be split
};

// Both throw std::invalid_argument on bad options or lengths.

// Best fit over at most open_windows windows, in the order given; the oldest is closed first.
Packed pack_online(const PackInput& input, const PackOptions& options);

// Best-fit decreasing over all documents.
Packed pack_offline(const PackInput& input, const PackOptions& options);

}  // namespace emu3
