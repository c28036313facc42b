// One row of one head: cross entropy against a distribution q that need not sum to 1, and its gradient.
//
//   Q = sum q    s = sum exp(z - max z)    loss = Q log s - sum q (z - max z)    dloss/dz = (Q / s) exp(z - max z) - q
//
// Three sweeps: the maximum; the sums; the gradient. What the plan keeps, in shared memory or in registers, is read
// once. A thread takes the same vectors in every sweep, so what it keeps is its own, and no barrier is needed.
#pragma once

#include "team.cuh"
#include "vectors.cuh"

namespace cotuning::cuda {

// A vector's part of a row of R, or of probabilities, of a type that is known only now: q += share * row. Returns
// whether any element differs from 0 (a NaN does).
template <class U, class C, int kCount>
__device__ __forceinline__ bool add_columns(const void* row, int columns, int first, C share, C (&q)[kCount]) {
  constexpr int kPiece = kCount < kLanes<U> ? kCount : kLanes<U>;
  bool any = false;
#pragma unroll
  for (int start = 0; start < kCount; start += kPiece) {
    const auto pack = load_columns<U, kPiece>(static_cast<const U*>(row), columns, first + start);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const auto value = widen(pack.at[i]);
      any |= value != 0;
      q[start + i] += share * static_cast<C>(value);
    }
  }
  return any;
}

template <class C, int kCount>
__device__ __forceinline__ bool add_row(const void* row, ScalarType type, int columns, int first, C share,
                                        C (&q)[kCount]) {
  switch (type) {
    case ScalarType::kFloat32: return add_columns<float>(row, columns, first, share, q);
    case ScalarType::kBFloat16: return add_columns<BFloat16>(row, columns, first, share, q);
    case ScalarType::kFloat16: return add_columns<Float16>(row, columns, first, share, q);
    default: return add_columns<double>(row, columns, first, share, q);
  }
}

// The source head's distribution: a row of R, or a mixture of two.
template <class C>
struct TranslatedTarget {
  static constexpr int kSums = 6;
  const void* rows[2];  // null: no part
  C shares[2];
  ScalarType type;
  bool kl_divergence;
  // The one row that there is, where it is float32 and a whole part: the ordinary case. Its vectors start `offset`
  // bytes beyond multiples of 16 (in double, of 8), all of them alike. Those at `plain_count` columns from
  // `plain_first` on are read whole, with the aligned vectors around them where there is an offset.
  const float* plain = nullptr;
  int offset = 0, plain_first = 0;
  unsigned plain_count = 0;

  // Looks for it, along the columns of a row of logits.
  template <class T>
  __device__ __forceinline__ void find_plain(const T* logits, int columns) {
    if (rows[0] == nullptr || rows[1] != nullptr || shares[0] != 1 || type != ScalarType::kFloat32) return;
    constexpr int kBytes = kLanes<T> < 4 ? kLanes<T> * 4 : 16;
    plain = static_cast<const float*>(rows[0]);
    offset = static_cast<int>(reinterpret_cast<uintptr_t>(plain + columns_of(logits, 1).first) & (kBytes - 1));
    if (offset != 0 && kBytes != 16) return;
    plain_first = offset / 4;
    const int count = columns + 1 - kLanes<T> - (offset == 0 ? 0 : 4);
    plain_count = count > 0 ? static_cast<unsigned>(count) : 0;
  }

  // Sets q, and adds to sums[3], sums[4]: whether the rows of R differ from 0, and sums[5]: sum q log q.
  template <int kCount>
  __device__ __forceinline__ void load(int columns, int first, C (&q)[kCount], C (&sums)[kSums]) const {
    if (static_cast<unsigned>(first - plain_first) < plain_count) {
      load_plain(first, q, sums);
    } else {
      load_any(columns, first, q, sums);
    }
    if (!kl_divergence) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (q[i] != 0) sums[5] += q[i] * logarithm(q[i]);
    }
  }

 private:
  template <int kCount>
  __device__ __forceinline__ void load_plain(int first, C (&q)[kCount], C (&sums)[kSums]) const {
    const auto* from = reinterpret_cast<const char*>(plain + first);
    uint32_t words[kCount];
    if (offset == 0) {
      load_aligned(from, words);
    } else {
      load_shifted<false>(from, static_cast<unsigned>(offset), words);
    }
    Pack<float, kCount> pack;
    memcpy(&pack, words, sizeof pack);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      q[i] = pack.at[i];
      bits |= words[i];
    }
    if ((bits & 0x7fffffffu) != 0) sums[3] = 1;  // but for its sign, a 0 is no bits
  }

  template <int kCount>
  __device__ __forceinline__ void load_any(int columns, int first, C (&q)[kCount], C (&sums)[kSums]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) q[i] = 0;
    // Not unrolled: the second row is rare, and half of the code.
#pragma unroll 1
    for (int k = 0; k < 2; ++k) {
      const void* row = k == 0 ? rows[0] : rows[1];
      if (row == nullptr) continue;
      const bool any = add_row(row, type, columns, first, k == 0 ? shares[0] : shares[1], q);
      if (any && k == 0) sums[3] = 1;
      if (any && k == 1) sums[4] = 1;
    }
  }
};

// The target head's: up to two classes, probabilities, smoothing, weights. q = w (base + scale P) + peaks.
template <class C>
struct ClassTarget {
  static constexpr int kSums = 4;
  int classes[2];  // -1: no part
  C peaks[2];      // weighted
  C base;
  const void* probabilities;  // a row, or null
  ScalarType type;
  C scale;
  ConstVector weight;  // null: 1

  template <int kCount>
  __device__ __forceinline__ void load(int columns, int first, C (&q)[kCount], C (&sums)[kSums]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) q[i] = base;
    if (probabilities != nullptr) add_row(probabilities, type, columns, first, scale, q);
    // Without a base or probabilities there is nothing to weigh but the peaks.
    if (weight.data != nullptr && (base != 0 || probabilities != nullptr)) weigh(columns, first, q);
    bool any = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (classes[0] == first + i) q[i] += peaks[0];
      if (classes[1] == first + i) q[i] += peaks[1];
      if (first + i < 0 || first + i >= columns) q[i] = 0;
      any |= q[i] != 0;
    }
    if (any) sums[3] = 1;
  }

 private:
  template <int kCount>
  __device__ __forceinline__ void weigh(int columns, int first, C (&q)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = first + i;
      if (column < 0 || column >= columns) continue;
      q[i] *= static_cast<C>(number_at(weight.data, weight.type, column * weight.stride));
    }
  }
};

// A row's vectors in shared memory, the first ones (plan.h): the logits as they are, the target in the compute type, in
// planes of 16 bytes, so that neighbouring threads touch neighbouring memory.
template <class T>
class Stage {
 public:
  using C = ComputeType<T>;
  static constexpr int kPlanes = kLanes<T> * sizeof(C) / 16;

  __device__ Stage(char* memory, const RowPlan& plan)
      : memory_(memory), logits_(plan.staged_logits), target_(plan.staged_target), keeps_rest_(plan.kept_target != 0) {}

  __device__ bool has_logits() const { return logits_ != 0; }  // all or none
  // How many of a row's vectors keep their target in shared memory; keeps_rest(): the others keep it in registers.
  __device__ int targets_of(int vectors) const { return target_ < vectors ? target_ : vectors; }
  __device__ bool keeps_rest() const { return keeps_rest_; }

  __device__ __forceinline__ void put_logits(int vector, const Pack<T, kLanes<T>>& pack) const {
    Bytes16 bytes;
    memcpy(&bytes, &pack, sizeof bytes);
    *logits_at(vector) = bytes;
  }
  __device__ __forceinline__ Pack<T, kLanes<T>> logits(int vector) const {
    const Bytes16 bytes = *logits_at(vector);
    Pack<T, kLanes<T>> pack;
    memcpy(&pack, &bytes, sizeof pack);
    return pack;
  }
  // Over the logits, as wide as they are.
  __device__ __forceinline__ void put_exponentials(int vector, const C (&e)[kLanes<T>]) const {
    Bytes16 bytes;
    memcpy(&bytes, e, sizeof bytes);
    *logits_at(vector) = bytes;
  }
  __device__ __forceinline__ void put_target(int vector, const C (&q)[kLanes<T>]) const {
#pragma unroll
    for (int k = 0; k < kPlanes; ++k) {
      Bytes16 bytes;
      memcpy(&bytes, q + k * kLanes<C>, sizeof bytes);
      *target_at(k, vector) = bytes;
    }
  }
  __device__ __forceinline__ void target(int vector, C (&q)[kLanes<T>]) const {
#pragma unroll
    for (int k = 0; k < kPlanes; ++k) {
      const Bytes16 bytes = *target_at(k, vector);
      memcpy(q + k * kLanes<C>, &bytes, sizeof bytes);
    }
  }

 private:
  __device__ __forceinline__ Bytes16* logits_at(int vector) const {
    return reinterpret_cast<Bytes16*>(memory_) + vector;
  }
  __device__ __forceinline__ Bytes16* target_at(int plane, int vector) const {
    return logits_at(logits_ + plane * target_ + vector);
  }

  char* memory_;
  int logits_, target_;  // vectors
  bool keeps_rest_;
};

// A thread's last vectors of the target, in registers. Registers have no index, so this is a stack: the last one put is
// the first one taken. A plan that puts more than it holds takes none.
template <class C, int kCount>
class RegisterStack {
 public:
  __device__ __forceinline__ void put(const C (&q)[kCount]) {
    static_assert(kKeptVectors == 2);
    below_ = top_;
    memcpy(&top_, q, sizeof top_);
  }
  __device__ __forceinline__ void take(C (&q)[kCount]) {
    memcpy(q, &top_, sizeof top_);
    top_ = below_;
  }

 private:
  Pack<C, kCount> top_{}, below_{};
};

template <class C>
struct RowResult {
  C loss;
  bool supervised[2];  // whether the rows of R have any entry
};

template <class T>
__device__ __forceinline__ void zero_row(const Team& team, T* row, int columns) {
  const Columns cut = columns_of(row, columns);
  for (int k = team.rank(); k < cut.vectors; k += team.threads()) {
    store_vector(row, columns, cut.first + k * kLanes<T>, Pack<T, kLanes<T>>{});
  }
}

template <class T>
__device__ __forceinline__ ComputeType<T> row_maximum(const Team& team, const T* logits, int columns,
                                                      const Stage<T>* stage) {
  using C = ComputeType<T>;
  const Columns cut = columns_of(logits, columns);
  C top[1] = {-static_cast<C>(INFINITY)};
  // This sweep is the one that waits for the memory, and too few warps fit on a processor to hide that with one load a
  // thread on its way: several are, before the first is looked at.
  constexpr int kAtOnce = 4;
  for (int start = team.rank(); start < cut.vectors; start += kAtOnce * team.threads()) {
    Pack<T, kLanes<T>> packs[kAtOnce];
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      const int k = start + b * team.threads();
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) packs[b].at[i] = minus_infinity<T>();
      if (k < cut.vectors) packs[b] = load_logits(logits, columns, cut.first + k * kLanes<T>);
    }
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      const int k = start + b * team.threads();
      if (stage != nullptr && stage->has_logits() && k < cut.vectors) stage->put_logits(k, packs[b]);
      C z[kLanes<T>];
      widen_all<T>(packs[b], z);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) top[0] = Largest::of(z[i], top[0]);
    }
  }
  team.reduce<Largest>(top);
  return top[0];
}

// `gradient` may be null, and may be the logits themselves; it is multiplied by what `stored_factor` says (loss.cuh),
// which is asked late: the sums need the registers.
template <class T, class Target, class StoredFactor>
__device__ __forceinline__ RowResult<ComputeType<T>> soft_cross_entropy(const Team& team, const T* logits, int columns,
                                                                        const Target& target,
                                                                        const StoredFactor& stored_factor, T* gradient,
                                                                        const Stage<T>& stage) {
  using C = ComputeType<T>;
  constexpr int kCount = kLanes<T>;
  // Where they are as wide as the logits, the exponentials take the place of those that are staged, which the gradient
  // needs for nothing else, and what is left of the target may be in registers.
  constexpr bool kAsWide = sizeof(T) == sizeof(C);
  const C top = row_maximum(team, logits, columns, &stage);

  // sums: exponentials, q (z - max), q, and what the target adds. A number that is not finite spoils them as it should:
  // all of the row is -inf, or one is +inf or NaN, then z - max is NaN.
  C sums[Target::kSums] = {};
  const Columns cut = columns_of(logits, columns);
  const auto add = [&](int k, C(&q)[kCount]) {
    const int first = cut.first + k * kCount;
    C z[kCount], e[kCount];
    widen_all<T>(stage.has_logits() ? stage.logits(k) : load_logits(logits, columns, first), z);
    target.load(columns, first, q, sums);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const C below = z[i] - top;
      e[i] = exponential(below);
      sums[0] += e[i];
      if (q[i] != 0) sums[1] += q[i] * below;  // 0 * -inf would be NaN
      sums[2] += q[i];
    }
    if (kAsWide && stage.has_logits()) stage.put_exponentials(k, e);
  };
  // A loop for the vectors whose target is staged and one for the rest: a branch in one loop costs instructions.
  const int staged = stage.targets_of(cut.vectors);
  RegisterStack<C, kCount> rest;
  int k = team.rank();
  for (; k < staged; k += team.threads()) {
    C q[kCount];
    add(k, q);
    stage.put_target(k, q);
  }
  for (; k < cut.vectors; k += team.threads()) {
    C q[kCount];
    add(k, q);
    if (kAsWide) rest.put(q);
  }
  team.reduce<Sum>(sums);

  RowResult<C> result{};
  result.supervised[0] = sums[3] != 0;
  if constexpr (Target::kSums > 4) result.supervised[1] = sums[4] != 0;
  const bool takes_part = result.supervised[0] || result.supervised[1];
  if (takes_part) {
    result.loss = sums[2] * logarithm(sums[0]) - sums[1];
    if constexpr (Target::kSums > 4) result.loss += sums[5];
  }
  if (gradient == nullptr) return result;
  if (!takes_part) {
    zero_row(team, gradient, columns);
    return result;
  }
  const C factor = sums[2] / sums[0], stored = stored_factor();
  const Columns written = columns_of(gradient, columns);
  const bool same = same_cut(gradient, logits);  // else a thread takes other vectors than it has staged
  const bool kept = stage.has_logits() && same;
  const bool rest_kept = kAsWide && stage.keeps_rest() && same;
  const auto store = [&](int k, const C(&q)[kCount]) {
    const int first = written.first + k * kCount;
    C e[kCount];
    widen_all<T>(kept ? stage.logits(k) : load_columns<T, kCount>(logits, columns, first, minus_infinity<T>()), e);
    if (!(kAsWide && kept)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) e[i] = exponential(e[i] - top);
    }
    Pack<T, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) narrow(stored * (factor * e[i] - q[i]), &pack.at[i]);
    store_vector(gradient, columns, first, pack);
  };
  // From the last vector to the first, as `rest` gives them back.
  const int first_of_rest = same ? staged : 0;
  for (k = team.last_of(written.vectors); k >= first_of_rest; k -= team.threads()) {
    C q[kCount], unused[Target::kSums];
    if (rest_kept) {
      rest.take(q);
    } else {
      target.load(columns, written.first + k * kCount, q, unused);
    }
    store(k, q);
  }
  for (; k >= 0; k -= team.threads()) {
    C q[kCount];
    stage.target(k, q);
    store(k, q);
  }
  return result;
}

}  // namespace cotuning::cuda
