// The Python face of the kernels: arrays in, arrays out, the GIL released in between.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "color.hpp"
#include "few_rows.hpp"
#include "index.hpp"
#include "packer.hpp"
#include "permutation.hpp"
#include "window.hpp"

namespace py = pybind11;

namespace {

template <class T>
using InputArray = py::array_t<T, py::array::c_style>;

// Hands an array over to numpy without a copy.
template <class T>
py::array_t<T> to_array(emu3::Buffer<T>&& values) {
    const auto size = static_cast<py::ssize_t>(values.size());
    if (size == 0) return py::array_t<T>(0);
    T* data = values.release();
    return py::array_t<T>(size, data, py::capsule(data, [](void* pointer) { std::free(pointer); }));
}

template <class T>
void check_one_dimension(const InputArray<T>& array, const char* name) {
    if (array.ndim() != 1)
        throw std::invalid_argument(std::string(name) + " must have one dimension, got " +
                                    std::to_string(array.ndim()));
}

py::tuple pack(const InputArray<int32_t>& lengths, const std::optional<InputArray<uint8_t>>& splittable,
               int64_t capacity, int64_t align, bool online, int64_t open_windows, bool fill, int64_t min_piece) {
    check_one_dimension(lengths, "lengths");
    if (splittable) {
        check_one_dimension(*splittable, "splittable");
        if (splittable->size() != lengths.size())
            throw std::invalid_argument("splittable has " + std::to_string(splittable->size()) + " entries for " +
                                        std::to_string(lengths.size()) + " lengths");
    }
    const emu3::PackInput input{lengths.data(), splittable ? splittable->data() : nullptr, lengths.size()};
    const emu3::PackOptions options{capacity, align, open_windows, min_piece, fill};
    emu3::Packed packed;
    {
        const py::gil_scoped_release released;
        packed = online ? emu3::pack_online(input, options) : emu3::pack_offline(input, options);
    }
    return py::make_tuple(to_array(std::move(packed.offsets)), to_array(std::move(packed.document)),
                          to_array(std::move(packed.start)), to_array(std::move(packed.length)),
                          to_array(std::move(packed.dropped)));
}

py::array_t<int64_t> permute(const InputArray<int64_t>& positions, int64_t size, uint64_t key) {
    check_one_dimension(positions, "positions");
    py::array_t<int64_t> values(positions.size());
    int64_t* data = values.mutable_data();
    std::copy(positions.data(), positions.data() + positions.size(), data);
    const int64_t count = positions.size();
    const py::gil_scoped_release released;
    emu3::permute(data, count, size, key);
    return values;
}

py::array_t<double> uniform(const InputArray<int64_t>& positions, uint64_t key) {
    check_one_dimension(positions, "positions");
    py::array_t<double> values(positions.size());
    emu3::uniform(positions.data(), positions.size(), key, values.mutable_data());
    return values;
}

// Windows of a packing in another order: (window_offsets, document, start, length).
py::tuple take_windows(const InputArray<int64_t>& windows, const InputArray<int64_t>& offsets,
                       const InputArray<int32_t>& document, const InputArray<int32_t>& start,
                       const InputArray<int32_t>& length) {
    const int64_t* from = offsets.data();
    const int64_t count = windows.size(), known = offsets.size() - 1;
    py::array_t<int64_t> taken(count + 1);
    int64_t* to = taken.mutable_data();
    to[0] = 0;
    for (int64_t place = 0; place < count; ++place) {
        const int64_t window = windows.data()[place];
        if (window < 0 || window >= known)
            throw std::invalid_argument("window " + std::to_string(window) + " must lie in [0, " +
                                        std::to_string(known) + ")");
        to[place + 1] = to[place] + (from[window + 1] - from[window]);
    }
    const auto column = [&](const InputArray<int32_t>& values) {
        py::array_t<int32_t> result(to[count]);
        for (int64_t place = 0; place < count; ++place) {
            const int64_t window = windows.data()[place];
            std::copy(values.data() + from[window], values.data() + from[window + 1],
                      result.mutable_data() + to[place]);
        }
        return result;
    };
    return py::make_tuple(taken, column(document), column(start), column(length));
}

// Maps a file without keeping it open: Python's own mmap holds a descriptor for as long as it lives, so that a
// thousand shards would take a thousand of them.
py::array_t<uint8_t> map_file(int descriptor, size_t size) {
    if (size == 0) return py::array_t<uint8_t>(0);
    void* data = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
    if (data == MAP_FAILED) {
        PyErr_SetFromErrno(PyExc_OSError);
        throw py::error_already_set();
    }
    struct Mapping {
        void* data;
        size_t size;
    };
    const py::capsule owner(new Mapping{data, size}, [](void* pointer) {
        auto* mapping = static_cast<Mapping*>(pointer);
        munmap(mapping->data, mapping->size);
        delete mapping;
    });
    py::array_t<uint8_t> array(static_cast<py::ssize_t>(size), static_cast<uint8_t*>(data), owner);
    array.attr("setflags")(py::arg("write") = false);
    return array;
}

// The indices of a dataset's shards; keeps the arrays that they are read from.
class ShardIndices {
   public:
    // Which caption of each document is meant; the first of all where it is left out.
    using Chosen = std::optional<InputArray<uint8_t>>;

    explicit ShardIndices(const InputArray<int64_t>& starts) : table_(checked(starts)), kept_(table_.num_shards()) {}

    // A shard's index, which may come late, and a byte for each of its pages that says whether it was verified.
    // Each sequence's checksum lies in `checksums`, which may stand at any address. The first index given stays:
    // another thread may be reading it.
    void set(size_t shard, const InputArray<uint8_t>& index, const InputArray<uint8_t>& checksums,
             const py::array_t<bool, py::array::c_style>& verified, int64_t num_sequences, int64_t page_bytes) {
        if (shard >= table_.num_shards()) throw std::invalid_argument("no shard " + std::to_string(shard));
        if (kept_[shard]) return;
        const int64_t documents = table_.num_documents(shard);
        const int64_t needed = emu3::ShardIndex::bytes(num_sequences, documents);
        if (num_sequences < 0 || index.size() != needed)
            throw std::invalid_argument("an index of " + std::to_string(index.size()) + " bytes, not the " +
                                        std::to_string(needed) + " that its counts ask for");
        if (page_bytes < 1 || verified.size() != (needed + page_bytes - 1) / page_bytes)
            throw std::invalid_argument("verified has " + std::to_string(verified.size()) + " pages");
        if (checksums.size() != 4 * num_sequences)
            throw std::invalid_argument("checksums of " + std::to_string(checksums.size()) + " bytes");
        const auto* flags = reinterpret_cast<const uint8_t*>(verified.data());
        kept_[shard] = py::make_tuple(index, checksums, verified);
        table_.set(shard, {index.data(), checksums.data(), num_sequences, documents, flags, page_bytes});
    }

    // Tokens, tokens of a pair's chosen caption, kind (0 text, 1 pair, 2 other), number of its captions, and what is
    // missing to say so.
    py::tuple describe(const InputArray<int64_t>& documents, const Chosen& chosen) const {
        const uint8_t* numbers_chosen = check_chosen(documents, chosen);
        const py::ssize_t count = documents.size();
        py::array_t<int64_t> length(count), caption(count), kind(count);
        py::array_t<int32_t> captions(count);
        const int64_t* numbers = documents.data();
        const emu3::Description out{length.mutable_data(), caption.mutable_data(), kind.mutable_data(),
                                    captions.mutable_data()};
        std::vector<emu3::Missing> missing;
        emu3::ShardIndices table = table_;  // while the lock is released another thread may add a shard
        {
            const py::gil_scoped_release released;
            missing = table.describe(numbers, numbers_chosen, count, out);
        }
        return py::make_tuple(length, caption, kind, captions, missing);
    }

    // (shard, segments, sequence, byte, lengths, modes, checksums, missing), see emu3::Location.
    py::tuple locate(const InputArray<int64_t>& documents, const Chosen& chosen) {
        const uint8_t* numbers_chosen = check_chosen(documents, chosen);
        emu3::Location found;
        const auto missing = table_.locate(documents.data(), numbers_chosen, documents.size(), found);
        return py::make_tuple(copied(found.shard), copied(found.segments), copied(found.sequence), copied(found.byte),
                              copied(found.lengths), copied(found.modes), copied(found.checksums), missing);
    }

   private:
    static const uint8_t* check_chosen(const InputArray<int64_t>& documents, const Chosen& chosen) {
        check_one_dimension(documents, "documents");
        if (!chosen) return nullptr;
        check_one_dimension(*chosen, "chosen");
        if (chosen->size() != documents.size())
            throw std::invalid_argument("chosen has " + std::to_string(chosen->size()) + " entries for " +
                                        std::to_string(documents.size()) + " documents");
        return chosen->data();
    }

    template <class T>
    static py::array_t<T> copied(const std::vector<T>& values) {
        return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
    }

    static std::vector<int64_t> checked(const InputArray<int64_t>& starts) {
        check_one_dimension(starts, "starts");
        std::vector<int64_t> values(starts.data(), starts.data() + starts.size());
        if (values.empty() || values[0] != 0 || !std::is_sorted(values.begin(), values.end()))
            throw std::invalid_argument("starts must ascend from 0");
        return values;
    }

    emu3::ShardIndices table_;
    std::vector<py::object> kept_;
};

// A window's arrays, to be filled piece by piece: see emu3::WindowWriter.
class WindowWriter {
   public:
    WindowWriter(InputArray<int64_t>& tokens, InputArray<int64_t>& labels, InputArray<uint8_t>& modality,
                 const InputArray<uint8_t>& classes, int32_t vocabulary_size, int32_t bos_id, int32_t eos_id)
        : kept_{tokens, labels, modality, classes} {
        if (labels.size() != tokens.size() || modality.size() != tokens.size())
            throw std::invalid_argument("tokens, labels and modality differ in size");
        canvas_ = {tokens.mutable_data(), labels.mutable_data(), modality.mutable_data(), tokens.size()};
        rules_ = {true,  true, bos_id, eos_id, classes.data(), static_cast<int32_t>(classes.size()),
                  vocabulary_size};
    }

    // Adds pieces of documents of one source; (piece, kind, where) of the first that is damaged, kind 0 for none.
    py::tuple add(const InputArray<int32_t>& files, const InputArray<int64_t>& bytes,
                  const InputArray<int64_t>& segments, const InputArray<int32_t>& lengths,
                  const InputArray<int8_t>& modes, const InputArray<uint32_t>& checksums,
                  const InputArray<bool>& caption_after, const InputArray<int32_t>& caption_tokens,
                  const InputArray<int32_t>& start, const InputArray<int32_t>& length, const InputArray<int64_t>& at,
                  bool bos, bool eos) {
        const py::ssize_t count = files.size();
        if (segments.size() != count + 1 || caption_after.size() != count ||
            caption_tokens.size() != count || start.size() != count || length.size() != count || at.size() != count)
            throw std::invalid_argument("columns of pieces differ in size");
        emu3::Rules rules = rules_;
        rules.bos = bos;
        rules.eos = eos;
        const int64_t* borders = segments.data();
        if (borders[0] != 0 || borders[count] != lengths.size() || bytes.size() != lengths.size() ||
            modes.size() != lengths.size() || checksums.size() != lengths.size())
            throw std::invalid_argument("columns of segments differ in size");
        if (!std::is_sorted(borders, borders + count + 1))
            throw std::invalid_argument("borders of documents must ascend");
        check_not_negative(lengths, "lengths of segments");
        check_not_negative(caption_tokens, "caption_tokens");
        for (py::ssize_t piece = 0; piece < count; ++piece)
            if (start.data()[piece] < 0 || length.data()[piece] < 1 || at.data()[piece] < 0 ||
                at.data()[piece] + length.data()[piece] > canvas_.size)
                throw std::invalid_argument("piece " + std::to_string(piece) + " stands outside the window");
        const py::gil_scoped_release released;
        const auto stored = [&](py::ssize_t piece) {
            const int64_t first = borders[piece];
            return emu3::Stored{files.data()[piece],    borders[piece + 1] - first, bytes.data() + first,
                                lengths.data() + first, modes.data() + first,       checksums.data() + first};
        };
        for (py::ssize_t piece = 1; piece < count; ++piece) emu3::WindowWriter::ask_ahead(stored(piece));
        emu3::WindowWriter writer(canvas_, rules);
        for (py::ssize_t piece = 0; piece < count; ++piece) {
            const emu3::Placement placement{caption_after.data()[piece], caption_tokens.data()[piece],
                                            start.data()[piece], length.data()[piece], at.data()[piece]};
            const emu3::Damage damage = writer.add(stored(piece), placement);
            if (damage.kind != emu3::Damage::kNone) {
                const py::gil_scoped_acquire held;
                return py::make_tuple(piece, static_cast<int>(damage.kind), damage.where);
            }
        }
        const py::gil_scoped_acquire held;
        return py::make_tuple(0, 0, 0);
    }

   private:
    static void check_not_negative(const InputArray<int32_t>& counts, const char* name) {
        const int32_t* end = counts.data() + counts.size();
        const int32_t* found = std::find_if(counts.data(), end, [](int32_t count) { return count < 0; });
        if (found != end)
            throw std::invalid_argument(std::string(name) + " must be 0 at least, got " + std::to_string(*found));
    }

    std::vector<py::object> kept_;
    emu3::Canvas canvas_{};
    emu3::Rules rules_{};
};

// y = x @ w.T; w and y are the caller's memory, so nothing is copied.
template <class Weight>
void few_rows(const InputArray<float>& x, const InputArray<Weight>& w, const float* scales, InputArray<float>& y,
              int64_t threads) {
    if (!emu3::few_rows_supported()) throw std::runtime_error("few_rows needs AVX-512; see few_rows_supported");
    if (x.ndim() != 2 || w.ndim() != 2 || y.ndim() != 2 || x.shape(1) != w.shape(1) || y.shape(0) != x.shape(0) ||
        y.shape(1) != w.shape(0) || x.shape(0) < 1 || threads < 1)
        throw std::invalid_argument("few_rows takes x [R, K], w [C, K], y [R, C], one row and one thread at least");
    const emu3::FewRows<Weight> product{x.data(),   w.data(),   scales,    y.mutable_data(),
                                        x.shape(0), w.shape(0), x.shape(1)};
    const py::gil_scoped_release released;
    emu3::few_rows(product, threads);
}

void few_rows_of_floats(const InputArray<float>& x, const InputArray<float>& w, InputArray<float>& y,
                        int64_t threads) {
    few_rows<float>(x, w, nullptr, y, threads);
}

void few_rows_of_bytes(const InputArray<float>& x, const InputArray<int8_t>& w, const InputArray<float>& scales,
                       InputArray<float>& y, int64_t threads) {
    if (scales.ndim() != 1 || w.ndim() != 2 || scales.shape(0) != w.shape(0))
        throw std::invalid_argument("few_rows takes a scale for every row of w");
    few_rows<int8_t>(x, w, scales.data(), y, threads);
}

emu3::Plane to_plane(const py::array_t<uint8_t>& plane, py::ssize_t height, py::ssize_t width, const char* name) {
    if (plane.ndim() != 2 || plane.shape(0) != height || plane.shape(1) != width || plane.strides(1) != 1)
        throw std::invalid_argument(std::string(name) + " must be a plane of " + std::to_string(height) + " x " +
                                    std::to_string(width) + " neighbouring bytes");
    return {plane.data(), plane.strides(0)};
}

// Rows of planes may be padded: the strides say how far they are apart.
void convert_420(const py::array_t<uint8_t>& luma, const py::array_t<uint8_t>& cb, const py::array_t<uint8_t>& cr,
                 py::array_t<uint8_t>& rgb, const std::array<int32_t, 6>& coefficients, bool left, int vertical) {
    if (luma.ndim() != 2 || luma.shape(0) < 2 || luma.shape(1) < 2 || luma.shape(0) % 2 || luma.shape(1) % 2)
        throw std::invalid_argument("luma must have an even number of rows and columns");
    const py::ssize_t height = luma.shape(0), width = luma.shape(1);
    const emu3::Plane planes[] = {to_plane(luma, height, width, "luma"),
                                  to_plane(cb, height / 2, width / 2, "cb"),
                                  to_plane(cr, height / 2, width / 2, "cr")};
    if (rgb.ndim() != 3 || rgb.shape(0) != height || rgb.shape(1) != width || rgb.shape(2) != 3 ||
        !(rgb.flags() & py::array::c_style))
        throw std::invalid_argument("rgb must be contiguous, of shape " + std::to_string(height) + " x " +
                                    std::to_string(width) + " x 3");
    const auto& c = coefficients;
    const emu3::ColorRule rule{c[0], c[1], c[2], c[3], c[4], c[5]};
    uint8_t* data = rgb.mutable_data();
    const py::gil_scoped_release released;
    emu3::convert_420(planes[0], planes[1], planes[2], height, width, rule, {left, vertical}, data);
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
    module.doc() = "C++ kernels of emu3_megatron, see csrc/.";
    module.def("pack", &pack, py::arg("lengths"), py::arg("splittable"), py::kw_only(), py::arg("capacity"),
               py::arg("align"), py::arg("online"), py::arg("open_windows"), py::arg("fill"), py::arg("min_piece"),
               "Pack documents into windows: (window_offsets, document, start, length, dropped).");
    module.def("permute", &permute, py::arg("positions"), py::arg("size"), py::arg("key"),
               "Image of each position under the keyed permutation of range(size).");
    module.def("map_file", &map_file, py::arg("descriptor"), py::arg("size"),
               "A file's bytes as a read-only array, mapped; the descriptor may be closed at once.");
    module.def("uniform", &uniform, py::arg("positions"), py::arg("key"),
               "A number in [0, 1) for each position, float64, the same for the same key and position.");
    module.def("take_windows", &take_windows, py::arg("windows"), py::arg("offsets"), py::arg("document"),
               py::arg("start"), py::arg("length"),
               "Windows of a packing in another order: (window_offsets, document, start, length).");
    py::class_<ShardIndices>(module, "ShardIndices", "The indices of a dataset's shards, in memory.")
        .def(py::init<const InputArray<int64_t>&>(), py::arg("starts"))
        .def("set", &ShardIndices::set, py::arg("shard"), py::arg("index"), py::arg("checksums"),
             py::arg("verified"), py::kw_only(),
             py::arg("num_sequences"), py::arg("page_bytes"), "Give a shard's index.")
        .def("describe", &ShardIndices::describe, py::arg("documents"), py::arg("chosen") = py::none(),
             "(length, caption, kind, captions, missing): sizes of documents, or the (shard, page) to verify first.")
        .def("locate", &ShardIndices::locate, py::arg("documents"), py::arg("chosen") = py::none(),
             "(shard, segments, sequence, byte, lengths, modes, checksums, missing): where documents lie.");
    py::class_<WindowWriter>(module, "WindowWriter", "Reads documents into a window's arrays.")
        // noconvert: a copy would be written in the arrays' place
        .def(py::init<InputArray<int64_t>&, InputArray<int64_t>&, InputArray<uint8_t>&, const InputArray<uint8_t>&,
                      int32_t, int32_t, int32_t>(),
             py::arg("tokens").noconvert(), py::arg("labels").noconvert(), py::arg("modality").noconvert(),
             py::arg("classes"), py::kw_only(), py::arg("vocabulary_size"), py::arg("bos_id"), py::arg("eos_id"))
        .def("add", &WindowWriter::add, py::kw_only(), py::arg("files"), py::arg("bytes"), py::arg("segments"),
             py::arg("lengths"), py::arg("modes"), py::arg("checksums"), py::arg("caption_after"),
             py::arg("caption_tokens"), py::arg("start"), py::arg("length"), py::arg("at"), py::arg("bos"),
             py::arg("eos"), "Add pieces; (piece, kind of damage, where), kind 0 for none.");
    module.def("few_rows_supported", &emu3::few_rows_supported, "Whether this machine can run `few_rows`.");
    // noconvert: a copy of y would be filled in its place
    module.def("few_rows", &few_rows_of_floats, py::arg("x").noconvert(), py::arg("w").noconvert(), py::arg("y").noconvert(),
               py::arg("threads"), "Fill y [R, C] with the product of x [R, K] and the rows of w [C, K].");
    module.def("few_rows_int8", &few_rows_of_bytes, py::arg("x").noconvert(), py::arg("w").noconvert(),
               py::arg("scales").noconvert(), py::arg("y").noconvert(), py::arg("threads"),
               "As few_rows, w of int8 with a scale for every row.");
    module.def("convert_420", &convert_420, py::arg("luma").noconvert(), py::arg("cb").noconvert(),
               py::arg("cr").noconvert(), py::arg("rgb").noconvert(), py::kw_only(), py::arg("coefficients"),
               py::arg("left"), py::arg("vertical"), "Fill rgb [H, W, 3] with a picture of YCbCr 4:2:0.");
}
