// Rows in memory: 128-bit loads and stores wherever a row starts, and no access outside it.
//
// A row of logits is cut into vectors of 16 bytes at multiples of 16 bytes. If the row starts or ends in between, its
// first or last vector is partial, and is read and written element by element. Another row that is read along the same
// columns, such as a row of R, may start elsewhere. Then the aligned vectors around each of its vectors are read, one
// more than it fills, and shifted into place.
#pragma once

#include "plan.h"
#include "scalars.cuh"

namespace cotuning::cuda {

// Elements of a vector of 16 bytes.
template <class T>
inline constexpr int kLanes = 16 / sizeof(T);

template <class T, int kCount>
struct Pack {
  T at[kCount];
};
struct alignas(16) Bytes16 {
  uint32_t words[4];
};
struct alignas(8) Bytes8 {
  uint32_t words[2];
};

// A vector that is read once: the caches drop it before others, such as those of R.
__device__ __forceinline__ Bytes16 load_once(const Bytes16* from) {
  return same_bits<Bytes16>(__ldcs(reinterpret_cast<const uint4*>(from)));
}

__device__ __forceinline__ bool is_aligned(const void* p, unsigned bytes) {
  return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0;
}

// The vectors of a row. Vector k covers the kLanes columns from first + k * kLanes on, as far as the row has them.
struct Columns {
  int first = 0;  // 0 or negative
  int vectors = 0;
};

template <class T>
__device__ __forceinline__ Columns columns_of(const T* row, int columns) {
  const auto beyond = static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
  return {-beyond, (columns + beyond + kLanes<T> - 1) / kLanes<T>};
}

// Whether two rows are cut at the same columns.
template <class T>
__device__ __forceinline__ bool same_cut(const T* a, const T* b) {
  return ((reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) & 15) == 0;
}

// Whether a row has all columns [first, first + count). One comparison; loops compute its limit once.
__device__ __forceinline__ bool has_columns(int columns, int first, int count) {
  const int firsts = columns - count + 1;
  return static_cast<unsigned>(first) < static_cast<unsigned>(firsts > 0 ? firsts : 0);
}

template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_elements(const T* row, int columns, int first, T elsewhere) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = first + i;
    pack.at[i] = elsewhere;
    if (column < 0 || column >= columns) continue;
    COTUNING_COUNT_READ(sizeof(T));
    pack.at[i] = row[column];
  }
  return pack;
}

// Loads words from an address `offset` bytes past a multiple of 16. Reads the aligned vectors around them, one more
// than the words fill. Halves may start in the middle of a word.
template <bool kHalves, int kWords>
__device__ __forceinline__ void load_shifted(const char* from, unsigned offset, uint32_t (&out)[kWords]) {
  constexpr int kVectors = (kWords + 3) / 4 + 1, kMore = kHalves ? 2 : 1;
  const auto* vectors = reinterpret_cast<const Bytes16*>(from - offset);
  uint32_t words[4 * kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    COTUNING_COUNT_READ(16);
    const Bytes16 vector = vectors[k];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[4 * k + i] = vector.words[i];
  }
  // Shifts by 2 words, by 1, by half a word. Selections, since registers cannot be indexed.
#pragma unroll
  for (int i = 0; i < kWords + kMore; ++i) words[i] = offset & 8 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < kWords + kMore - 1; ++i) words[i] = offset & 4 ? words[i + 1] : words[i];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    out[i] = kHalves ? shifted_words(words[i], words[i + 1], 8 * (offset & 2)) : words[i];
  }
}

// Loads words from an address that is a multiple of 16 bytes, or of their size in bytes if that is less.
template <int kWords>
__device__ __forceinline__ void load_aligned(const char* from, uint32_t (&out)[kWords]) {
  static_assert(kWords <= 2 || kWords % 4 == 0);
  if constexpr (kWords < 4) COTUNING_COUNT_READ(4 * kWords);
  if constexpr (kWords == 1) {
    out[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kWords == 2) {
    const Bytes8 vector = *reinterpret_cast<const Bytes8*>(from);
    out[0] = vector.words[0];
    out[1] = vector.words[1];
  } else {
#pragma unroll
    for (int k = 0; k < kWords / 4; ++k) {
      COTUNING_COUNT_READ(16);
      const Bytes16 vector = reinterpret_cast<const Bytes16*>(from)[k];
#pragma unroll
      for (int i = 0; i < 4; ++i) out[4 * k + i] = vector.words[i];
    }
  }
}

// Numbers that start `offset` bytes past `from`, a multiple of 16; kAlike: no bytes past it.
template <bool kAlike, class R, int kCount>
__device__ __forceinline__ void load_row(const Bytes16* from, int offset, Pack<R, kCount>* out) {
  const auto* bytes = reinterpret_cast<const char*>(from);
  uint32_t words[kCount * sizeof(R) / 4];
  if constexpr (kAlike) {
    load_aligned(bytes, words);
  } else {
    load_shifted<sizeof(R) == 2>(bytes + offset, static_cast<unsigned>(offset), words);
  }
  memcpy(out, words, sizeof *out);
}

// Columns [first, first + kCount), at most 16 bytes, of a row that may start anywhere; `elsewhere` for missing columns.
template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_columns(const T* row, int columns, int first, T elsewhere = T{}) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const auto* from = reinterpret_cast<const char*>(row + first);
  const bool whole = has_columns(columns, first, kCount), aligned = is_aligned(from, kBytes);
  const char* begin = from - (reinterpret_cast<uintptr_t>(from) & 15);
  const bool inside =
      begin >= reinterpret_cast<const char*>(row) && begin + 32 <= reinterpret_cast<const char*>(row + columns);
  if (!whole || !(aligned || inside)) return load_elements<T, kCount>(row, columns, first, elsewhere);
  uint32_t words[kBytes / 4];
  if (aligned) {
    load_aligned(from, words);
  } else {
    load_shifted<sizeof(T) == 2>(from, static_cast<unsigned>(from - begin), words);
  }
  Pack<T, kCount> pack;
  memcpy(&pack, words, sizeof pack);
  return pack;
}

// A vector of a row cut by columns_of.
template <class T>
__device__ __forceinline__ Pack<T, kLanes<T>> load_vector(const T* row, int columns, int first, T elsewhere = T{}) {
  if (!has_columns(columns, first, kLanes<T>)) return load_elements<T, kLanes<T>>(row, columns, first, elsewhere);
  COTUNING_COUNT_READ(16);
  const Bytes16 vector = *reinterpret_cast<const Bytes16*>(row + first);
  Pack<T, kLanes<T>> pack;
  memcpy(&pack, &vector, sizeof pack);
  return pack;
}

template <class T>
__device__ __forceinline__ void store_vector(T* row, int columns, int first, const Pack<T, kLanes<T>>& pack) {
  if (has_columns(columns, first, kLanes<T>)) {
    Bytes16 vector;
    memcpy(&vector, &pack, sizeof vector);
    COTUNING_COUNT_WRITTEN(16);
    *reinterpret_cast<Bytes16*>(row + first) = vector;
    return;
  }
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    if (first + i < 0 || first + i >= columns) continue;
    COTUNING_COUNT_WRITTEN(sizeof(T));
    row[first + i] = pack.at[i];
  }
}

template <class T>
__device__ __forceinline__ Pack<T, kLanes<T>> load_logits(const T* row, int columns, int first) {
  return load_vector(row, columns, first, minus_infinity<T>());
}

template <class T>
__device__ __forceinline__ void widen_all(const Pack<T, kLanes<T>>& pack, ComputeType<T> (&z)[kLanes<T>]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) z[i] = widen(pack.at[i]);
}

// The same of a whole vector of a type that computes in float, a word at a time.
template <class T>
__device__ __forceinline__ void widen_words(const Bytes16& vector, float (&z)[kLanes<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) widen_word<T>(vector.words[i], z + i * kWordNumbers<T>);
}

template <int kCount>
__device__ __forceinline__ void widen_pack(const Pack<float, kCount>& pack, float (&x)[kCount]) {
  memcpy(x, &pack, sizeof x);
}
template <class T>
__device__ __forceinline__ void widen_pack(const Pack<T, kLanes<T>>& pack, float (&x)[kLanes<T>]) {
  widen_words<T>(same_bits<Bytes16>(pack), x);
}

template <class T>
__device__ __forceinline__ Bytes16 narrow_words(const float (&x)[kLanes<T>]) {
  Bytes16 vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) vector.words[i] = narrow_word<T>(x + i * kWordNumbers<T>);
  return vector;
}

}  // namespace cotuning::cuda
