// An array that numpy can take over: grown by realloc (which moves pages, not bytes, when large), never zeroed
// unless asked for, so that a result costs its own size in memory and one write.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace emu3 {

// Ask for huge pages where they pay: of a result of many megabytes, most of the time is spent on page faults.
inline void prefer_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
    constexpr uintptr_t kHuge = uintptr_t{1} << 21;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

template <class T>
class Buffer {
   public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Buffer() { std::free(data_); }

    // Pages of zeros that take memory only when they are written or read.
    static Buffer zeros(size_t size) {
        Buffer buffer;
        buffer.data_ = static_cast<T*>(std::calloc(size == 0 ? 1 : size, sizeof(T)));
        if (buffer.data_ == nullptr) throw std::bad_alloc();
        buffer.size_ = buffer.capacity_ = size;
        return buffer;
    }

    void reserve(size_t capacity) {
        if (capacity <= capacity_ && data_ != nullptr) return;
        T* moved = static_cast<T*>(std::realloc(data_, (capacity == 0 ? 1 : capacity) * sizeof(T)));
        if (moved == nullptr) throw std::bad_alloc();
        data_ = moved;
        capacity_ = capacity;
        prefer_huge_pages(data_, capacity * sizeof(T));
    }

    // New entries are not initialised.
    void resize(size_t size) {
        reserve(size);
        size_ = size;
    }

    // Room for `count` more entries behind end(), to be written before `extend` counts them.
    void make_room(size_t count) {
        if (size_ + count > capacity_) reserve(size_ + count + size_ / 4);
    }

    // Room for `count` more entries, not initialised; returns the first.
    T* extend(size_t count) {
        make_room(count);
        T* first = data_ + size_;
        size_ += count;
        return first;
    }

    void push_back(T value) { *extend(1) = value; }

    // Give the spare capacity back.
    void shrink() {
        void* moved = std::realloc(data_, (size_ == 0 ? 1 : size_) * sizeof(T));
        if (moved != nullptr) data_ = static_cast<T*>(moved);
        capacity_ = size_;
    }

    // The caller frees what this returns with std::free.
    T* release() {
        T* data = data_;
        data_ = nullptr;
        size_ = capacity_ = 0;
        return data;
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    T* begin() { return data_; }
    T* end() { return data_ + size_; }
    size_t size() const { return size_; }
    T& operator[](size_t index) { return data_[index]; }
    const T& operator[](size_t index) const { return data_[index]; }

   private:
    void swap(Buffer& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(capacity_, other.capacity_);
    }

    T* data_ = nullptr;
    size_t size_ = 0, capacity_ = 0;
};

}  // namespace emu3
