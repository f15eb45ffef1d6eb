// The Python face of the kernels: arrays in, arrays out, the GIL released in between.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sys/mman.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "color.hpp"
#include "index.hpp"
#include "packer.hpp"
#include "permutation.hpp"

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
py::array_t<T> to_array(std::vector<T>&& values) {
    auto* owned = new std::vector<T>(std::move(values));
    const py::capsule owner(owned, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
    return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
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
    std::vector<int64_t> values;
    {
        const int64_t* data = positions.data();
        const int64_t count = positions.size();
        const py::gil_scoped_release released;
        values = emu3::permute(data, count, size, key);
    }
    return to_array(std::move(values));
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

// Documents of a shard by its index: tokens, tokens of a pair's caption, kind (0 text, 1 pair, 2 other).
py::tuple describe(const InputArray<uint8_t>& index, const InputArray<int64_t>& documents, int64_t num_sequences,
                   int64_t num_documents) {
    check_one_dimension(documents, "documents");
    const int64_t needed = emu3::ShardIndex::kHeader + 13 * num_sequences + 8 * (num_documents + 1);
    if (num_sequences < 0 || num_documents < 0 || index.size() != needed)
        throw std::invalid_argument("an index of " + std::to_string(index.size()) + " bytes, not the " +
                                    std::to_string(needed) + " that its counts ask for");
    const py::ssize_t count = documents.size();
    py::array_t<int64_t> length(count), caption(count), kind(count);
    const emu3::ShardIndex shard(index.data(), num_sequences, num_documents);
    const int64_t* numbers = documents.data();
    emu3::Description out{length.mutable_data(), caption.mutable_data(), kind.mutable_data()};
    {
        const py::gil_scoped_release released;
        shard.describe(numbers, count, out);
    }
    return py::make_tuple(length, caption, kind);
}

emu3::Plane to_plane(const py::array_t<uint8_t>& plane, py::ssize_t height, py::ssize_t width, const char* name) {
    if (plane.ndim() != 2 || plane.shape(0) != height || plane.shape(1) != width || plane.strides(1) != 1)
        throw std::invalid_argument(std::string(name) + " must be a plane of " + std::to_string(height) + " x " +
                                    std::to_string(width) + " neighbouring bytes");
    return {plane.data(), plane.strides(0)};
}

// Rows of planes may be padded: the strides say how far they are apart.
py::array_t<uint8_t> convert_420(const py::array_t<uint8_t>& luma, const py::array_t<uint8_t>& cb,
                                 const py::array_t<uint8_t>& cr, const std::array<int32_t, 6>& coefficients,
                                 bool left, int vertical) {
    if (luma.ndim() != 2 || luma.shape(0) < 2 || luma.shape(1) < 2 || luma.shape(0) % 2 || luma.shape(1) % 2)
        throw std::invalid_argument("luma must have an even number of rows and columns");
    const py::ssize_t height = luma.shape(0), width = luma.shape(1);
    const emu3::Plane planes[] = {to_plane(luma, height, width, "luma"),
                                  to_plane(cb, height / 2, width / 2, "cb"),
                                  to_plane(cr, height / 2, width / 2, "cr")};
    const auto& c = coefficients;
    const emu3::ColorRule rule{c[0], c[1], c[2], c[3], c[4], c[5]};
    py::array_t<uint8_t> rgb({height, width, py::ssize_t{3}});
    uint8_t* data = rgb.mutable_data();
    {
        const py::gil_scoped_release released;
        emu3::convert_420(planes[0], planes[1], planes[2], height, width, rule, {left, vertical}, data);
    }
    return rgb;
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
    module.doc() = "C++ kernels of emu3_megatron: the packer, the keyed permutation, the reader of indices, colours.";
    module.def("pack", &pack, py::arg("lengths"), py::arg("splittable"), py::kw_only(), py::arg("capacity"),
               py::arg("align"), py::arg("online"), py::arg("open_windows"), py::arg("fill"), py::arg("min_piece"),
               "Pack documents into windows: (window_offsets, document, start, length, dropped).");
    module.def("permute", &permute, py::arg("positions"), py::arg("size"), py::arg("key"),
               "Image of each position under the keyed permutation of range(size).");
    module.def("map_file", &map_file, py::arg("descriptor"), py::arg("size"),
               "A file's bytes as a read-only array, mapped; the descriptor may be closed at once.");
    module.def("describe", &describe, py::arg("index"), py::arg("documents"), py::kw_only(),
               py::arg("num_sequences"), py::arg("num_documents"),
               "Sizes of a shard's documents: (length, caption, kind).");
    module.def("convert_420", &convert_420, py::arg("luma").noconvert(), py::arg("cb").noconvert(),
               py::arg("cr").noconvert(), py::kw_only(), py::arg("coefficients"), py::arg("left"),
               py::arg("vertical"), "A picture of YCbCr 4:2:0 as RGB.");
}
