// The offline policy: best-fit decreasing over all documents.
//
// Lengths are integers no larger than a window, so most documents share theirs with many others. Without `fill`
// the histogram is packed instead of the documents: a run of equal sizes meets a run of windows with equal room,
// and both are handled as one. The answer is the same, to the order of pieces, as placing one document at a time.
#include <utility>
#include <vector>

#include "packer.hpp"
#include "room_index.hpp"

namespace emu3 {
namespace {

// Items in decreasing order of size, equal ones in their own order.
struct Sorted {
    Buffer<int32_t> order;
    std::vector<int32_t> end;  // end[size]: where the run of items of that size ends in order

    // Calls visit(first index, count, size) for every run, for sizes of at least 1.
    template <class Visit>
    void for_each_run(const Visit& visit) const {
        int32_t index = 0;
        for (int32_t size = static_cast<int32_t>(end.size()) - 1; size > 0; --size) {
            if (index == end[size]) continue;
            visit(index, end[size] - index, size);
            index = end[size];
        }
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
    Buffer<int32_t> order;
    order.resize(static_cast<size_t>(count));
    for (int32_t item = 0; item < count; ++item) order[place[size(item)]++] = item;
    return Sorted{std::move(order), std::move(place)};
}

// A run of windows that have received the same sizes. They are numbered in one direction without gaps, because
// windows are opened in a row, buckets are stacks, and a run taken from one stack and laid on another is turned.
struct Run {
    int32_t level;  // what they hold: the last entry of a chain of levels, -1 for nothing
    int32_t top;    // the window to be used next
    int32_t step;   // 1 or -1: from one window to the next
    int32_t count;
};

// `each` items of one size, given to every window of a run.
struct Level {
    int32_t parent;         // what the windows received before, or -1
    int32_t size, each;     // units
    int32_t top, step;      // of the run at that time
    int32_t first;          // index in the sorted order of the first item of window `top`
};

class RunPacker {
   public:
    explicit RunPacker(int32_t capacity) : capacity_(capacity), rooms_(capacity) {}

    // Best fit for `count` items of one size, whose first stands at `index` of the sorted order.
    void add(int32_t index, int32_t count, int32_t size) {
        while (count > 0) {
            int32_t room = rooms_.tightest(size);
            const bool fresh = room < 0;
            if (fresh) room = capacity_;
            // Best fit stays with a window until less than `size` is left: no other has less room that suffices.
            const int32_t each = room / size;
            Run run = fresh ? open(count, each) : take(room);
            const int32_t full = std::min(run.count, count / each);
            give(run, full, index, each, size, room);
            index += full * each;
            count -= full * each;
            if (run.count > 0 && count > 0) {
                give(run, 1, index, count, size, room);
                count = 0;
            }
            if (run.count > 0) keep(run, room);
        }
    }

    int32_t num_windows() const { return num_windows_; }

    // All runs, in the order of their windows; ends the packing.
    std::vector<Run> finish() {
        std::vector<Run> all = std::move(full_);
        for (int32_t room = rooms_.tightest(1); room >= 0; room = rooms_.tightest(1)) all.push_back(take(room));
        for (Run& run : all) {
            if (run.step < 0) run = {run.level, run.top - (run.count - 1), 1, run.count};
        }
        std::sort(all.begin(), all.end(), [](const Run& left, const Run& right) { return left.top < right.top; });
        return all;
    }

    const Level& level(int32_t number) const { return levels_[number]; }

   private:
    Run open(int32_t count, int32_t each) {
        const int32_t windows = (count - 1) / each + 1;
        num_windows_ += windows;
        return {-1, num_windows_ - windows, 1, windows};
    }

    Run take(int32_t room) {
        const int32_t slot = rooms_.pop(room);
        free_.push_back(slot);
        return runs_[slot];
    }

    void keep(const Run& run, int32_t room) {
        if (room == 0) {
            full_.push_back(run);
            return;
        }
        if (free_.empty()) {
            free_.push_back(static_cast<int32_t>(runs_.size()));
            runs_.emplace_back();
            rooms_.grow(runs_.size());
        }
        runs_[free_.back()] = run;
        rooms_.insert(free_.back(), room);
        free_.pop_back();
    }

    // The first `windows` of the run receive `each` items; the run keeps the others.
    void give(Run& run, int32_t windows, int32_t index, int32_t each, int32_t size, int32_t room) {
        if (windows == 0) return;
        levels_.push_back({run.level, size, each, run.top, run.step, index});
        const Run filled{static_cast<int32_t>(levels_.size()) - 1, run.top + run.step * (windows - 1), -run.step,
                         windows};
        run.top += run.step * windows;
        run.count -= windows;
        keep(filled, room - each * size);
    }

    int32_t capacity_, num_windows_ = 0;
    RoomIndex<false> rooms_;
    std::vector<Run> runs_, full_;
    std::vector<int32_t> free_;
    std::vector<Level> levels_;
};

// Documents longer than a window, cut into pieces; those that may not be cut are dropped.
std::vector<Piece> cut_long(const PackInput& input, const Units& units, Packed& out) {
    std::vector<Piece> pieces;
    for (int64_t document = 0; document < input.size; ++document) {
        int32_t size = units.of(input.lengths[document]);
        if (size <= units.capacity) continue;
        if (!input.splits(document)) {
            out.dropped.push_back(static_cast<int32_t>(document));
            continue;
        }
        Piece rest{static_cast<int32_t>(document), 0, input.lengths[document]};
        while (size > units.capacity) {
            const int32_t taken = units.window_piece(size);
            pieces.push_back(units.take(rest, taken));
            size -= taken;
        }
        pieces.push_back(rest);
    }
    return pieces;
}

// Writes the windows of `packer` in order. Items at or above input.size are `extra` pieces.
void write_windows(RunPacker& packer, const Buffer<int32_t>& order, int32_t num_pieces, const PackInput& input,
                   const Units& units, const std::vector<Piece>& extra, Packed& out) {
    const int32_t documents = static_cast<int32_t>(input.size);
    out.offsets.resize(static_cast<size_t>(packer.num_windows()) + 1);
    out.document.resize(static_cast<size_t>(num_pieces));
    out.length.resize(static_cast<size_t>(num_pieces));
    out.start = Buffer<int32_t>::zeros(static_cast<size_t>(num_pieces));
    out.offsets[0] = 0;
    int64_t to = 0;
    std::vector<Level> chain;
    for (const Run& run : packer.finish()) {
        chain.clear();
        for (int32_t number = run.level; number >= 0; number = packer.level(number).parent)
            chain.push_back(packer.level(number));
        std::reverse(chain.begin(), chain.end());
        for (int32_t window = run.top; window < run.top + run.count; ++window) {
            for (const Level& level : chain) {
                const int32_t* items = &order[level.first + (window - level.top) * level.step * level.each];
                for (int32_t place = 0; place < level.each; ++place, ++to) {
                    const int32_t item = items[place];
                    if (item < documents) {
                        out.document[to] = item;
                        out.length[to] = units.align == 1 ? level.size : input.lengths[item];
                    } else {
                        const Piece& piece = extra[item - documents];
                        out.document[to] = piece.document;
                        out.length[to] = piece.length;
                        if (piece.start != 0) out.start[to] = piece.start;
                    }
                }
            }
            out.offsets[window + 1] = to;
        }
    }
}

Packed offline_whole(const PackInput& input, const Units& units) {
    Packed out;
    const std::vector<Piece> extra = cut_long(input, units, out);
    const int32_t documents = static_cast<int32_t>(input.size);
    // Documents longer than a window have size 0 here: they sort last and are not visited.
    const auto size_of = [&](int32_t item) {
        if (item >= documents) return units.of(extra[item - documents].length);
        const int32_t size = units.of(input.lengths[item]);
        return size <= units.capacity ? size : 0;
    };
    const Sorted sorted = decreasing(documents + static_cast<int32_t>(extra.size()), units.capacity, size_of);
    RunPacker packer(units.capacity);
    sorted.for_each_run([&](int32_t index, int32_t count, int32_t size) { packer.add(index, count, size); });
    write_windows(packer, sorted.order, sorted.end[1], input, units, extra, out);
    return out;
}

// Windows without a bound on their number, one piece at a time: what pouring needs.
class HoleFiller {
   public:
    explicit HoleFiller(const Units& units) : units_(units), rooms_(units.capacity) {}

    // Window for a piece of `size` units, by best fit.
    int32_t add_whole(int32_t size) {
        const int32_t room = rooms_.tightest(size);
        return room < 0 ? put(count_, units_.capacity, size) : put(rooms_.pop(room), room, size);
    }

    // Splits as the online packer does; calls emit(piece, window) for every piece.
    template <class Emit>
    void add_poured(Piece piece, const Emit& emit) {
        int32_t size = units_.of(piece.length);
        while (size > units_.capacity || rooms_.tightest(size) < 0) {
            const int32_t room = rooms_.roomiest();
            int32_t taken = room < 0 ? 0 : units_.first_piece(size, room);
            int32_t window;
            if (taken > 0) {
                window = put(rooms_.pop(room), room, taken);
            } else if (size > units_.capacity) {
                taken = units_.window_piece(size);
                window = put(count_, units_.capacity, taken);
            } else {
                break;
            }
            emit(units_.take(piece, taken), window);
            size -= taken;
        }
        emit(piece, add_whole(size));
    }

    int32_t count() const { return count_; }

   private:
    int32_t put(int32_t window, int32_t room, int32_t size) {
        if (window == count_) rooms_.grow(static_cast<size_t>(++count_));
        if (room > size) rooms_.insert(window, room - size);
        return window;
    }

    Units units_;
    RoomIndex<false> rooms_;
    int32_t count_ = 0;
};

// Pieces in the order of their placing. Most are whole documents, so those are kept as a number alone.
struct Placed {
    Buffer<int32_t> item;    // a document, or ~index into cut
    Buffer<int32_t> window;  // where it stands
    std::vector<Piece> cut;

    void add(const Piece& piece, int32_t number, bool whole) {
        item.push_back(whole ? piece.document : ~static_cast<int32_t>(cut.size()));
        window.push_back(number);
        if (!whole) cut.push_back(piece);
    }
};

// Turns pieces in order of placing into pieces in order of windows, stably; gives memory back as it goes.
void group_by_window(Placed& placed, int32_t num_windows, const PackInput& input, Packed& out) {
    const size_t size = placed.item.size();
    out.offsets = Buffer<int64_t>::zeros(static_cast<size_t>(num_windows) + 1);
    for (const int32_t number : placed.window) ++out.offsets[number + 1];
    for (int32_t number = 0; number < num_windows; ++number) out.offsets[number + 1] += out.offsets[number];
    out.document.resize(size);
    // offsets[w] serves as the cursor of window w and ends as the start of w + 1; shifting it back restores it.
    for (size_t index = 0; index < size; ++index) out.document[out.offsets[placed.window[index]]++] = placed.item[index];
    for (int32_t number = num_windows; number > 0; --number) out.offsets[number] = out.offsets[number - 1];
    out.offsets[0] = 0;
    placed.item = Buffer<int32_t>();
    placed.window = Buffer<int32_t>();
    out.start = Buffer<int32_t>::zeros(size);
    out.length.resize(size);
    for (size_t to = 0; to < size; ++to) {
        const int32_t item = out.document[to];
        if (item >= 0) {
            out.length[to] = input.lengths[item];
        } else {
            const Piece& piece = placed.cut[~item];
            out.document[to] = piece.document;
            out.length[to] = piece.length;
            if (piece.start != 0) out.start[to] = piece.start;
        }
    }
}

Packed offline_filled(const PackInput& input, const Units& units) {
    Packed out;
    int32_t largest = units.capacity;
    for (int64_t document = 0; document < input.size; ++document)
        largest = std::max(largest, units.of(input.lengths[document]));
    Placed placed;
    int32_t num_windows = 0;
    {
        HoleFiller filler(units);
        const Sorted sorted = decreasing(static_cast<int32_t>(input.size), largest,
                                         [&](int32_t document) { return units.of(input.lengths[document]); });
        placed.item.reserve(sorted.order.size());
        placed.window.reserve(sorted.order.size());
        sorted.for_each_run([&](int32_t index, int32_t count, int32_t size) {
            for (int32_t place = index; place < index + count; ++place) {
                const int32_t document = sorted.order[place];
                if (input.splits(document)) continue;
                if (size > units.capacity) {
                    out.dropped.push_back(document);
                    continue;
                }
                placed.add({document, 0, input.lengths[document]}, filler.add_whole(size), true);
            }
        });
        for (size_t place = 0; place < sorted.order.size(); ++place) {
            const int32_t document = sorted.order[place];
            if (!input.splits(document)) continue;
            filler.add_poured({document, 0, input.lengths[document]}, [&](const Piece& piece, int32_t number) {
                placed.add(piece, number, piece.length == input.lengths[document]);
            });
        }
        num_windows = filler.count();
    }
    std::sort(out.dropped.begin(), out.dropped.end());
    group_by_window(placed, num_windows, input, out);
    return out;
}

}  // namespace

Packed pack_offline(const PackInput& input, const PackOptions& options) {
    const Units units = Units::check(input, options);
    return options.fill ? offline_filled(input, units) : offline_whole(input, units);
}

}  // namespace emu3
