// What a segment of a stored document is (emu3_megatron/data/format.py, docs/data-format.md).
#pragma once

#include <cstdint>

namespace emu3 {

enum Mode : int8_t { kTextMode = 0, kSpanMode = 1, kPromptMode = 2, kAlternativeMode = 3 };

// Captions of one document; their numbers fit in a byte.
constexpr int64_t kMaxCaptions = 256;

}  // namespace emu3
