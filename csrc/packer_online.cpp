// The online policy: best fit over a bounded number of open windows, in the order given, the oldest closed first.
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "packer.hpp"
#include "room_index.hpp"

namespace emu3 {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

template <bool Crowded>
class OnlinePacker {
   public:
    OnlinePacker(const Units& units, int64_t open_windows, int64_t expected)
        : units_(units), limit_(open_windows), rooms_(units.capacity) {
        out_.document.reserve(static_cast<size_t>(expected) + Window::kHere);
        out_.length.reserve(static_cast<size_t>(expected) + Window::kHere);
        out_.offsets.reserve(static_cast<size_t>(expected) + 1);  // pages never written cost nothing
        out_.offsets.push_back(0);
    }

    void add_whole(const Piece& piece, int32_t size) {
        const int32_t room = rooms_.tightest(size);
        put(room < 0 ? open() : rooms_.pop(room), piece, size);
    }

    // Cut what is longer than a window into whole windows and a rest.
    void add_split(Piece piece, int32_t size) {
        while (size > units_.capacity) {
            const int32_t taken = units_.window_piece(size);
            add_whole(units_.take(piece, taken), taken);
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
                put(rooms_.pop(room), units_.take(piece, taken), taken);
            } else if (size > units_.capacity) {
                taken = units_.window_piece(size);
                put(open(), units_.take(piece, taken), taken);
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
        // Nearly all pieces begin their document, so only the others were noted.
        out_.start = Buffer<int32_t>::zeros(out_.document.size());
        for (const auto& [piece, start] : later_) out_.start[piece] = start;
        out_.document.shrink();
        out_.length.shrink();
        out_.offsets.shrink();
        return std::move(out_);
    }

   private:
    // A piece that begins its document is one entry, {document, length}; any other is two: {~document, start} and
    // {length, 0}.
    struct Entry {
        int32_t first, second;
    };

    // One cache line; what does not fit into it follows in more_.
    struct alignas(64) Window {
        static constexpr int32_t kHere = 5;
        int32_t room, older, newer;
        int32_t entries = 0, pieces = 0;
        Entry held[kHere];
    };

    int32_t open() {
        if (open_ == limit_) {
            rooms_.remove(oldest_, windows_[oldest_].room);
            close(oldest_);
        }
        if (free_.empty()) {
            free_.push_back(static_cast<int32_t>(windows_.size()));
            windows_.emplace_back();
            more_.emplace_back();
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
        if (piece.start == 0) {
            hold(number, {piece.document, piece.length});
        } else {
            hold(number, {~piece.document, piece.start});
            hold(number, {piece.length, 0});
        }
        ++window.pieces;
        window.room -= size;
        if (window.room == 0) {
            close(number);
        } else {
            rooms_.insert(number, window.room);
        }
    }

    void hold(int32_t number, const Entry& entry) {
        Window& window = windows_[number];
        if (window.entries < Window::kHere) {
            window.held[window.entries] = entry;
        } else {
            more_[number].push_back(entry);
        }
        ++window.entries;
    }

    void close(int32_t number) {
        Window& window = windows_[number];
        const size_t first = out_.document.size(), count = static_cast<size_t>(window.pieces);
        out_.document.make_room(count + Window::kHere);
        out_.length.make_room(count + Window::kHere);
        if (window.pieces == window.entries && window.entries <= Window::kHere) {
            // All that could be there is copied: a loop whose end is not known costs more.
            int32_t *document = out_.document.end(), *length = out_.length.end();
            for (int32_t place = 0; place < Window::kHere; ++place) {
                document[place] = window.held[place].first;
                length[place] = window.held[place].second;
            }
        } else {
            copy_entries(number);
        }
        out_.document.extend(count);
        out_.length.extend(count);
        out_.offsets.push_back(static_cast<int64_t>(first + count));
        if (window.entries > Window::kHere) more_[number].clear();
        window.entries = window.pieces = 0;
        (window.older < 0 ? oldest_ : windows_[window.older].newer) = window.newer;
        (window.newer < 0 ? newest_ : windows_[window.newer].older) = window.older;
        free_.push_back(number);
        --open_;
    }

    // Writes the pieces of any window behind what was written before.
    void copy_entries(int32_t number) {
        const Window& window = windows_[number];
        int32_t *document = out_.document.end(), *length = out_.length.end();
        const Entry* more = more_[number].data();
        const auto entry = [&](int32_t place) {
            return place < Window::kHere ? window.held[place] : more[place - Window::kHere];
        };
        for (int32_t place = 0; place < window.entries; ++place, ++document, ++length) {
            const Entry held = entry(place);
            if (held.first >= 0) {
                *document = held.first;
                *length = held.second;
            } else {
                later_.emplace_back(static_cast<size_t>(document - out_.document.data()), held.second);
                *document = ~held.first;
                *length = entry(++place).first;
            }
        }
    }

    Units units_;
    int64_t limit_;
    RoomIndex<true, Crowded> rooms_;
    std::vector<Window> windows_;
    std::vector<std::vector<Entry>> more_;
    std::vector<int32_t> free_;
    int64_t open_ = 0;
    int32_t oldest_ = -1, newest_ = -1;
    std::vector<std::pair<size_t, int32_t>> later_;  // pieces that do not begin their document
    Packed out_;
};

template <bool Crowded>
Packed pack(const PackInput& input, const PackOptions& options, const Units& units) {
    OnlinePacker<Crowded> packer(units, options.open_windows, input.size);
    for (int64_t index = 0; index < input.size; ++index) {
        const int32_t document = static_cast<int32_t>(index);
        const int32_t size = units.of(input.lengths[index]);
        const Piece piece{document, 0, input.lengths[index]};
        if (size <= units.capacity && !(options.fill && input.splits(index))) {
            packer.add_whole(piece, size);
        } else if (!input.splits(index)) {
            packer.drop(document);
        } else if (options.fill) {
            packer.add_poured(piece, size);
        } else {
            packer.add_split(piece, size);
        }
    }
    return packer.finish();
}

}  // namespace

Units Units::check(const PackInput& input, const PackOptions& options) {
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
    int32_t least = 1;  // branchless, so that it runs as fast as memory gives
    for (int64_t document = 0; document < input.size; ++document) least = std::min(least, input.lengths[document]);
    if (least < 1) refuse("a document has length " + number(least) + "; every length must be at least 1");
    const int64_t capacity = options.capacity / options.align;
    // The last piece loses up to align - 1 tokens to rounding, so the bound is raised by as much. A piece of
    // more than half a window could not be kept together with a second one, so the bound stops there.
    const int64_t min_piece = std::min(options.min_piece, options.capacity) + 2 * (options.align - 1);
    return Units{static_cast<int32_t>(capacity), static_cast<int32_t>(options.align),
                 static_cast<int32_t>(std::max<int64_t>(1, std::min(min_piece / options.align, capacity / 2)))};
}

Packed pack_online(const PackInput& input, const PackOptions& options) {
    const Units units = Units::check(input, options);
    // Measured with documents of text, images and video: a tenth faster at 5,120, slower from 16,384 on.
    const bool crowded = units.capacity <= 8192;
    return crowded ? pack<true>(input, options, units) : pack<false>(input, options, units);
}

}  // namespace emu3
