// Memory that detects reads and writes outside a kernel's rows.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "numbers.h"

namespace cotuning::test {

// Every scalar type reads these bytes as NaN: reading outside a row gives NaN, and writing there changes the bytes.
inline constexpr unsigned char kPoison = 0xff;

enum class Place { kPageEnd, kPageStart };

// Bytes at one end of their pages, between two inaccessible pages: reading or writing past that end crashes in any
// build. (AddressSanitizer does not see the masked loads and stores of AVX2 and AVX-512.) The rest of the pages is
// poison. Bytes at the end of a page are not aligned to vectors.
class Pages {
 public:
  Pages(int64_t bytes, Place place) : bytes_(static_cast<size_t>(bytes)) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    page_bytes_ = std::max(page, (bytes_ + page - 1) / page * page);
    map_bytes_ = page_bytes_ + 2 * page;
    map_ = static_cast<char*>(mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED || mprotect(map_ + page, page_bytes_, PROT_READ | PROT_WRITE) != 0) {
      std::perror("mmap");
      std::abort();
    }
    pages_ = map_ + page;
    std::memset(pages_, kPoison, page_bytes_);
    data_ = place == Place::kPageStart ? pages_ : pages_ + page_bytes_ - bytes_;
  }
  ~Pages() { munmap(map_, map_bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  char* data() const { return data_; }
  size_t size() const { return bytes_; }
  void make_read_only() { mprotect(pages_, page_bytes_, PROT_READ); }
  bool surroundings_untouched() const {
    return is_poison(pages_, data_) && is_poison(data_ + bytes_, pages_ + page_bytes_);
  }
  static bool is_poison(const char* begin, const char* end) {
    return std::all_of(begin, end, [](char byte) { return static_cast<unsigned char>(byte) == kPoison; });
  }

 private:
  size_t bytes_, page_bytes_, map_bytes_;
  char *map_, *pages_, *data_;
};

class Row {
 public:
  Row(ScalarType type, int64_t n, Place place) : type_(type), n_(n), pages_(n * size_of(type), place) {}

  int64_t size() const { return n_; }
  void* data() { return pages_.data(); }
  long double operator[](int64_t i) const { return read_number(type_, pages_.data() + i * size_of(type_)); }
  void set(int64_t i, long double value) { write_number(type_, pages_.data() + i * size_of(type_), value); }
  long double lowest() const { return lowest_of(type_); }
  void make_read_only() { pages_.make_read_only(); }  // from now on, writing crashes
  bool surroundings_untouched() const { return pages_.surroundings_untouched(); }

 private:
  ScalarType type_;
  int64_t n_;
  Pages pages_;
};

// A matrix whose last row ends at the end of a page. The gaps between its rows are poison.
class Grid {
 public:
  Grid(ScalarType type, int64_t rows, int64_t columns, int64_t row_stride)
      : type_(type),
        rows_(rows),
        columns_(columns),
        row_stride_(row_stride),
        pages_((rows == 0 ? 0 : (rows - 1) * row_stride + columns) * size_of(type), Place::kPageEnd) {}
  Grid(ScalarType type, int64_t rows, int64_t columns) : Grid(type, rows, columns, columns) {}

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  ScalarType type() const { return type_; }
  long double at(int64_t i, int64_t j) const { return read_number(type_, address(i, j)); }
  void set(int64_t i, int64_t j, long double value) { write_number(type_, address(i, j), value); }
  char* data() { return pages_.data(); }

  ConstMatrix view() const { return {pages_.data(), type_, rows_, columns_, row_stride_}; }
  Matrix writable() { return {pages_.data(), type_, rows_, columns_, row_stride_}; }

  std::vector<char> bytes() const { return {pages_.data(), pages_.data() + pages_.size()}; }
  bool never_written() const {
    return pages_.surroundings_untouched() && Pages::is_poison(pages_.data(), pages_.data() + pages_.size());
  }
  bool gaps_untouched() const {
    for (int64_t i = 0; i + 1 < rows_; ++i) {
      if (!Pages::is_poison(address(i, columns_), address(i + 1, 0))) return false;
    }
    return pages_.surroundings_untouched();
  }

 private:
  char* address(int64_t i, int64_t j) const { return pages_.data() + (i * row_stride_ + j) * size_of(type_); }

  ScalarType type_;
  int64_t rows_, columns_, row_stride_;
  Pages pages_;
};

// Class indices as int64 or int32, with any stride.
class LabelList {
 public:
  LabelList(int64_t count, bool is_int32, int64_t stride) : is_int32_(is_int32), stride_(stride) {
    const int64_t elements = count == 0 ? 0 : (count - 1) * stride + 1;
    if (is_int32) {
      narrow_.assign(elements, -1);
    } else {
      wide_.assign(elements, -1);
    }
  }

  int64_t operator[](int64_t i) const { return is_int32_ ? narrow_[i * stride_] : wide_[i * stride_]; }
  void set(int64_t i, int64_t label) {
    if (is_int32_) {
      narrow_[i * stride_] = static_cast<int32_t>(label);
    } else {
      wide_[i * stride_] = label;
    }
  }
  Labels view() const {
    return {is_int32_ ? static_cast<const void*>(narrow_.data()) : wide_.data(), is_int32_, stride_};
  }

 private:
  bool is_int32_;
  int64_t stride_;
  std::vector<int64_t> wide_;
  std::vector<int32_t> narrow_;
};

}  // namespace cotuning::test
