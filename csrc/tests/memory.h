// Memory that notices what a kernel does outside its rows.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "numbers.h"

namespace cotuning::test {

// Every scalar type reads these bytes as NaN: who reads a neighbour gets NaN, who writes one is seen.
inline constexpr unsigned char kPoison = 0xff;

enum class Place { kPageEnd, kPageStart };

// A row at one end of its pages, between two pages that may not be touched: reading or writing past that end crashes,
// in any build. What the pages hold beside the row is poison. At the end of a page a row is aligned to its elements only.
class Row {
 public:
  Row(ScalarType type, int64_t n, Place place) : type_(type), n_(n), row_bytes_(n * cpu::size_of(type)) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    page_bytes_ = (row_bytes_ + page - 1) / page * page;
    map_bytes_ = page_bytes_ + 2 * page;
    map_ = static_cast<char*>(mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED || mprotect(map_ + page, page_bytes_, PROT_READ | PROT_WRITE) != 0) {
      std::perror("mmap");
      std::abort();
    }
    pages_ = map_ + page;
    std::memset(pages_, kPoison, page_bytes_);
    data_ = place == Place::kPageStart ? pages_ : pages_ + page_bytes_ - row_bytes_;
  }
  ~Row() { munmap(map_, map_bytes_); }
  Row(const Row&) = delete;
  Row& operator=(const Row&) = delete;

  int64_t size() const { return n_; }
  ScalarType type() const { return type_; }
  void* data() { return data_; }
  const void* data() const { return data_; }
  long double operator[](int64_t i) const { return read_number(type_, data_ + i * cpu::size_of(type_)); }
  void set(int64_t i, long double value) { write_number(type_, data_ + i * cpu::size_of(type_), value); }

  // From now on writing to it crashes: an input.
  void make_read_only() { mprotect(pages_, page_bytes_, PROT_READ); }

  bool surroundings_untouched() const {
    const auto poisoned = [](char byte) { return static_cast<unsigned char>(byte) == kPoison; };
    return std::all_of(pages_, data_, poisoned) && std::all_of(data_ + row_bytes_, pages_ + page_bytes_, poisoned);
  }

 private:
  ScalarType type_;
  int64_t n_;
  size_t row_bytes_, page_bytes_, map_bytes_;
  char *map_, *pages_, *data_;
};

// A matrix on the heap that ends with its last row, where AddressSanitizer watches. Between its rows is poison.
class Grid {
 public:
  Grid(ScalarType type, int64_t rows, int64_t columns, int64_t row_stride)
      : type_(type), rows_(rows), columns_(columns), row_stride_(row_stride) {
    const int64_t elements = rows == 0 ? 0 : (rows - 1) * row_stride + columns;
    bytes_ = static_cast<size_t>(elements * cpu::size_of(type));
    data_.reset(new char[bytes_]);
    std::memset(data_.get(), kPoison, bytes_);
  }
  Grid(ScalarType type, int64_t rows, int64_t columns) : Grid(type, rows, columns, columns) {}

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  ScalarType type() const { return type_; }
  long double at(int64_t i, int64_t j) const { return read_number(type_, address(i, j)); }
  void set(int64_t i, int64_t j, long double value) { write_number(type_, address(i, j), value); }
  char* data() { return data_.get(); }

  cpu::ConstMatrix view() const { return {data_.get(), type_, rows_, columns_, row_stride_}; }
  cpu::Matrix writable() { return {data_.get(), type_, row_stride_}; }

  std::vector<char> bytes() const { return {data_.get(), data_.get() + bytes_}; }
  bool all_poison() const {
    return std::all_of(data_.get(), data_.get() + bytes_,
                       [](char byte) { return static_cast<unsigned char>(byte) == kPoison; });
  }
  bool gaps_untouched() const {
    const int64_t row_bytes = columns_ * cpu::size_of(type_), stride_bytes = row_stride_ * cpu::size_of(type_);
    for (int64_t i = 0; i + 1 < rows_; ++i) {
      for (int64_t byte = row_bytes; byte < stride_bytes; ++byte) {
        if (static_cast<unsigned char>(data_[i * stride_bytes + byte]) != kPoison) return false;
      }
    }
    return true;
  }

 private:
  char* address(int64_t i, int64_t j) const { return data_.get() + (i * row_stride_ + j) * cpu::size_of(type_); }

  ScalarType type_;
  int64_t rows_, columns_, row_stride_;
  size_t bytes_;
  std::unique_ptr<char[]> data_;
};

// Class indices as int64 or int32, at any distance from each other.
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
  cpu::Labels view() const {
    return {is_int32_ ? static_cast<const void*>(narrow_.data()) : wide_.data(), is_int32_, stride_};
  }

 private:
  bool is_int32_;
  int64_t stride_;
  std::vector<int64_t> wide_;
  std::vector<int32_t> narrow_;
};

}  // namespace cotuning::test
