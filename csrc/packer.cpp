#include "packer.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "room_index.hpp"

namespace emu3 {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// All sizes in units of the alignment; lengths stay in tokens at the two ends only.
struct Units {
    int32_t capacity;
    int32_t align;
    int32_t min_piece;

    int32_t of(int32_t tokens) const {
        return align == 1 ? tokens : static_cast<int32_t>((int64_t{tokens} + align - 1) / align);
    }

    // First piece of a document of `rest` units where `room` < `rest` is left; 0: it cannot be split there.
    int32_t first_piece(int32_t rest, int32_t room) const {
        if (room < min_piece || rest < 2 * min_piece) return 0;
        return std::min(room, rest - min_piece);
    }
};

Units check(const PackInput& input, const PackOptions& options) {
    const auto refuse = [](const std::string& text) { throw std::invalid_argument(text); };
    const auto number = [](int64_t value) { return std::to_string(value); };
    if (options.capacity < 1 || options.capacity >= kMaxInt32)
        refuse("capacity=" + number(options.capacity) + " must lie in [1, 2^31 - 1)");
    if (options.align < 1 || options.capacity % options.align != 0)
        refuse("capacity=" + number(options.capacity) + " must be a multiple of align=" + number(options.align));
    if (options.open_windows < 1) refuse("open_windows=" + number(options.open_windows) + " must be at least 1");
    if (options.min_piece < 1) refuse("min_piece=" + number(options.min_piece) + " must be at least 1");
    if (input.size >= kMaxInt32)
        refuse(number(input.size) + " documents in one call; at most 2^31 - 2: pack them in blocks");
    const int32_t least =
        input.size == 0 ? 1 : *std::min_element(input.lengths, input.lengths + input.size);
    if (least < 1) refuse("a document has length " + number(least) + "; every length must be at least 1");
    const int64_t capacity = options.capacity / options.align;
    // The last piece loses up to align - 1 tokens to rounding, so the bound is raised by as much. A piece of
    // more than half a window could not be kept together with a second one, so the bound stops there.
    const int64_t min_piece = std::min(options.min_piece, options.capacity) + 2 * (options.align - 1);
    return Units{static_cast<int32_t>(capacity), static_cast<int32_t>(options.align),
                 static_cast<int32_t>(std::max<int64_t>(1, std::min(min_piece / options.align, capacity / 2)))};
}

struct Piece {
    int32_t document, start, length;
};

class OnlinePacker {
   public:
    OnlinePacker(const Units& units, int64_t open_windows, int64_t expected)
        : units_(units), limit_(open_windows), rooms_(units.capacity) {
        out_.document.reserve(expected);
        out_.start.reserve(expected);
        out_.length.reserve(expected);
    }

    void add_whole(const Piece& piece, int32_t size) {
        const int32_t room = rooms_.tightest(size);
        put(room < 0 ? open() : rooms_.pop(room), piece, size);
    }

    // Cut what is longer than a window into whole windows and a rest.
    void add_split(Piece piece, int32_t size) {
        while (size > units_.capacity) {
            const int32_t taken = std::min(units_.capacity, size - units_.min_piece);
            add_whole(take(piece, taken), taken);
            size -= taken;
        }
        add_whole(piece, size);
    }

    // Put it where it fits whole, or else into the largest holes.
    void add_poured(Piece piece, int32_t size) {
        while (size > units_.capacity || rooms_.tightest(size) < 0) {
            const int32_t room = rooms_.roomiest();
            int32_t taken = room < 0 ? 0 : units_.first_piece(size, room);
            if (taken > 0) {
                put(rooms_.pop(room), take(piece, taken), taken);
            } else if (size > units_.capacity) {
                taken = std::min(units_.capacity, size - units_.min_piece);
                put(open(), take(piece, taken), taken);
            } else {
                break;
            }
            size -= taken;
        }
        add_whole(piece, size);
    }

    void drop(int32_t document) { out_.dropped.push_back(document); }

    Packed finish() {
        while (oldest_ >= 0) {
            rooms_.remove(oldest_, windows_[oldest_].room);
            close(oldest_);
        }
        return std::move(out_);
    }

   private:
    struct Window {
        int32_t room, older, newer;
        std::vector<Piece> pieces;
    };

    Piece take(Piece& piece, int32_t units) const {
        const Piece first{piece.document, piece.start, units * units_.align};
        piece.start += first.length;
        piece.length -= first.length;
        return first;
    }

    int32_t open() {
        if (open_ == limit_) {
            rooms_.remove(oldest_, windows_[oldest_].room);
            close(oldest_);
        }
        if (free_.empty()) {
            free_.push_back(static_cast<int32_t>(windows_.size()));
            windows_.emplace_back();
            rooms_.grow(windows_.size());
        }
        const int32_t window = free_.back();
        free_.pop_back();
        windows_[window].room = units_.capacity;
        windows_[window].older = newest_;
        windows_[window].newer = -1;
        (newest_ < 0 ? oldest_ : windows_[newest_].newer) = window;
        newest_ = window;
        ++open_;
        return window;
    }

    void put(int32_t number, const Piece& piece, int32_t size) {
        Window& window = windows_[number];
        window.pieces.push_back(piece);
        window.room -= size;
        if (window.room == 0) {
            close(number);
        } else {
            rooms_.insert(number, window.room);
        }
    }

    void close(int32_t number) {
        Window& window = windows_[number];
        for (const Piece& piece : window.pieces) {
            out_.document.push_back(piece.document);
            out_.start.push_back(piece.start);
            out_.length.push_back(piece.length);
        }
        out_.offsets.push_back(static_cast<int64_t>(out_.document.size()));
        window.pieces.clear();
        (window.older < 0 ? oldest_ : windows_[window.older].newer) = window.newer;
        (window.newer < 0 ? newest_ : windows_[window.newer].older) = window.older;
        free_.push_back(number);
        --open_;
    }

    Units units_;
    int64_t limit_;
    RoomIndex<true> rooms_;
    std::vector<Window> windows_;
    std::vector<int32_t> free_;
    int64_t open_ = 0;
    int32_t oldest_ = -1, newest_ = -1;
    Packed out_;
};

// Windows without a bound on their number, filled in decreasing order of size.
class OfflinePacker {
   public:
    explicit OfflinePacker(const Units& units) : units_(units), rooms_(units.capacity) {}

    // Window for a piece of `size` units, by best fit.
    int32_t add_whole(int32_t size) {
        const int32_t room = rooms_.tightest(size);
        return room < 0 ? put(count_, units_.capacity, size) : put(rooms_.pop(room), room, size);
    }

    // Splits as OnlinePacker::add_poured; calls emit(first unit, units, window) for every piece.
    template <class Emit>
    void add_poured(int32_t size, const Emit& emit) {
        int32_t start = 0;
        while (size > units_.capacity || rooms_.tightest(size) < 0) {
            int32_t room = rooms_.roomiest();
            int32_t taken = room < 0 ? 0 : units_.first_piece(size, room);
            int32_t window;
            if (taken > 0) {
                window = put(rooms_.pop(room), room, taken);
            } else if (size > units_.capacity) {
                taken = std::min(units_.capacity, size - units_.min_piece);
                window = put(count_, units_.capacity, taken);
            } else {
                break;
            }
            emit(start, taken, window);
            start += taken;
            size -= taken;
        }
        emit(start, size, add_whole(size));
    }

    int32_t count() const { return count_; }

   private:
    int32_t put(int32_t window, int32_t room, int32_t size) {
        if (window == count_) rooms_.grow(++count_);
        if (room > size) rooms_.insert(window, room - size);
        return window;
    }

    Units units_;
    RoomIndex<false> rooms_;
    int32_t count_ = 0;
};

// Items in decreasing order of size, equal ones in their own order.
struct Sorted {
    std::vector<int32_t> order;
    std::vector<int32_t> end;  // end[size]: where the run of items of that size ends in order

    // Calls visit(index, size) along the order, for sizes of at least 1; no look-up of sizes is needed.
    template <class Visit>
    void for_each(const Visit& visit) const {
        int32_t index = 0;
        for (int32_t size = static_cast<int32_t>(end.size()) - 1; size > 0; --size)
            for (; index < end[size]; ++index) visit(index, size);
    }
};

// Counting sort; sizes are in units, none above `largest`.
template <class Size>
Sorted decreasing(int32_t count, int32_t largest, const Size& size) {
    std::vector<int32_t> place(static_cast<size_t>(largest) + 1, 0);
    for (int32_t item = 0; item < count; ++item) ++place[size(item)];
    int32_t total = 0;
    for (int32_t value = largest; value >= 0; --value) {
        const int32_t here = place[value];
        place[value] = total;
        total += here;
    }
    std::vector<int32_t> order(count);
    for (int32_t item = 0; item < count; ++item) order[place[size(item)]++] = item;
    return Sorted{std::move(order), std::move(place)};
}

// Turns pieces in order of placing into pieces in order of windows, stably.
template <class PieceAt>
void group_by_window(const std::vector<int32_t>& window, int32_t num_windows, const PieceAt& piece_at, Packed& out) {
    out.offsets.assign(static_cast<size_t>(num_windows) + 1, 0);
    for (const int32_t number : window) ++out.offsets[number + 1];
    for (int32_t number = 0; number < num_windows; ++number) out.offsets[number + 1] += out.offsets[number];
    out.document.resize(window.size());
    out.start.resize(window.size());
    out.length.resize(window.size());
    // offsets[w] serves as the cursor of window w and ends as the start of w + 1; shifting it back restores it.
    for (size_t index = 0; index < window.size(); ++index) {
        const Piece piece = piece_at(index);
        const int64_t to = out.offsets[window[index]]++;
        out.document[to] = piece.document;
        out.start[to] = piece.start;
        out.length[to] = piece.length;
    }
    for (int32_t number = num_windows; number > 0; --number) out.offsets[number] = out.offsets[number - 1];
    out.offsets[0] = 0;
}

Packed offline_whole(const PackInput& input, const Units& units) {
    Packed out;
    std::vector<Piece> extra;  // pieces of documents longer than a window; items after all documents
    for (int64_t document = 0; document < input.size; ++document) {
        int32_t size = units.of(input.lengths[document]);
        if (size <= units.capacity) continue;
        if (input.splittable == nullptr || input.splittable[document] == 0) {
            out.dropped.push_back(static_cast<int32_t>(document));
            continue;
        }
        Piece rest{static_cast<int32_t>(document), 0, input.lengths[document]};
        while (size > 0) {
            const int32_t taken =
                size <= units.capacity ? size : std::min(units.capacity, size - units.min_piece);
            const int32_t tokens = taken == size ? rest.length : taken * units.align;
            extra.push_back({rest.document, rest.start, tokens});
            rest.start += tokens;
            rest.length -= tokens;
            size -= taken;
        }
    }
    const int32_t documents = static_cast<int32_t>(input.size);
    // Documents longer than a window have size 0 here: they sort last and are not visited.
    const auto size_of = [&](int32_t item) {
        if (item >= documents) return units.of(extra[item - documents].length);
        const int32_t size = units.of(input.lengths[item]);
        return size <= units.capacity ? size : 0;
    };
    const Sorted sorted = decreasing(documents + static_cast<int32_t>(extra.size()), units.capacity, size_of);
    OfflinePacker packer(units);
    std::vector<int32_t> window(sorted.end[1]);
    sorted.for_each([&](int32_t index, int32_t size) { window[index] = packer.add_whole(size); });
    const auto piece_at = [&](size_t index) {
        const int32_t item = sorted.order[index];
        return item < documents ? Piece{item, 0, input.lengths[item]} : extra[item - documents];
    };
    group_by_window(window, packer.count(), piece_at, out);
    return out;
}

Packed offline_filled(const PackInput& input, const Units& units) {
    Packed out;
    const auto splits = [&](int32_t document) {
        return input.splittable != nullptr && input.splittable[document] != 0;
    };
    int32_t largest = units.capacity;
    for (int64_t document = 0; document < input.size; ++document)
        largest = std::max(largest, units.of(input.lengths[document]));
    const Sorted sorted = decreasing(static_cast<int32_t>(input.size), largest,
                                     [&](int32_t document) { return units.of(input.lengths[document]); });
    OfflinePacker packer(units);
    std::vector<Piece> pieces;
    std::vector<int32_t> window;
    pieces.reserve(sorted.order.size());
    window.reserve(sorted.order.size());
    sorted.for_each([&](int32_t index, int32_t size) {
        const int32_t document = sorted.order[index];
        if (splits(document)) return;
        if (size > units.capacity) {
            out.dropped.push_back(document);
            return;
        }
        pieces.push_back({document, 0, input.lengths[document]});
        window.push_back(packer.add_whole(size));
    });
    for (const int32_t document : sorted.order) {
        if (!splits(document)) continue;
        const int32_t tokens = input.lengths[document];
        packer.add_poured(units.of(tokens), [&](int32_t start, int32_t taken, int32_t number) {
            const int32_t first = start * units.align;
            pieces.push_back({document, first, std::min(taken * units.align, tokens - first)});
            window.push_back(number);
        });
    }
    std::sort(out.dropped.begin(), out.dropped.end());
    group_by_window(window, packer.count(), [&](size_t index) { return pieces[index]; }, out);
    return out;
}

}  // namespace

Packed pack_online(const PackInput& input, const PackOptions& options) {
    const Units units = check(input, options);
    OnlinePacker packer(units, options.open_windows, input.size);
    for (int64_t index = 0; index < input.size; ++index) {
        const int32_t document = static_cast<int32_t>(index);
        const int32_t size = units.of(input.lengths[index]);
        const bool splits = input.splittable != nullptr && input.splittable[index] != 0;
        const Piece piece{document, 0, input.lengths[index]};
        if (splits && options.fill) {
            packer.add_poured(piece, size);
        } else if (size <= units.capacity) {
            packer.add_whole(piece, size);
        } else if (splits) {
            packer.add_split(piece, size);
        } else {
            packer.drop(document);
        }
    }
    return packer.finish();
}

Packed pack_offline(const PackInput& input, const PackOptions& options) {
    const Units units = check(input, options);
    return options.fill ? offline_filled(input, units) : offline_whole(input, units);
}

}  // namespace emu3
