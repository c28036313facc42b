// One row of one head: cross entropy against a distribution q that need not sum to 1, and its gradient.
//
//   Q = sum q    s = sum exp(z - max z)    loss = Q log s - sum q (z - max z)    dloss/dz = (Q / s) exp(z - max z) - q
//
// Three sweeps: the maximum; the sums; the gradient. Vectors that the plan keeps in shared memory or registers are read
// once. A thread takes the same vectors in every sweep, so it alone uses what it keeps, and no barrier is needed.
#pragma once

#include <type_traits>

#include "team.cuh"
#include "vectors.cuh"

namespace cotuning::cuda {

// q += share * row, for one vector of a row of R or of probabilities. Returns whether any element of the row differs
// from 0 (a NaN does). add_row picks the row's type at run time.
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
  // The ordinary case: a single row with share 1, in float32. All its vectors start `offset` bytes past a multiple of
  // 16 (of 8 for double logits). Vectors that start in the `plain_count` columns from `plain_first` on are read whole;
  // with an offset, by way of the aligned vectors around them.
  const float* plain = nullptr;
  int offset = 0, plain_first = 0;
  unsigned plain_count = 0;

  // Detects the ordinary case, along the columns of a row of logits.
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

  // Sets q. Sets sums[3] and sums[4] to 1 if the two rows of R have a nonzero element. Adds q log q to sums[5].
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
    if ((bits & 0x7fffffffu) != 0) sums[3] = 1;  // ignores the sign bit of a 0
  }

  template <int kCount>
  __device__ __forceinline__ void load_any(int columns, int first, C (&q)[kCount], C (&sums)[kSums]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) q[i] = 0;
    // Not unrolled: the second row is rare, and unrolling would double the code.
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

// The target head's distribution: up to two classes, probabilities, smoothing, weights. q = w (base + scale P) + peaks.
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
    // Without a base or probabilities only the peaks are left, which are already weighted.
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

// A row's first vectors in shared memory (plan.h): the logits as they are, and the target in the compute type. The
// target lies in planes of 16 bytes, so that neighbouring threads touch neighbouring memory.
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
  __device__ __forceinline__ void put_words(int vector, const Bytes16& bytes) const { *logits_at(vector) = bytes; }
  __device__ __forceinline__ Bytes16 words(int vector) const { return *logits_at(vector); }
  // Replaces the logits, which are as wide.
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

// A thread's last vectors of the target, in registers. Registers cannot be indexed, so this is a stack: the last vector
// put is the first one taken. If a plan puts more than it holds, nothing is taken.
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
  bool supervised[2];  // whether the rows of R have a nonzero element
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
  // This sweep waits for the memory, and too few warps fit on a multiprocessor to hide that with one load in flight per
  // thread. So a thread issues several loads before it looks at the first.
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

// The sums of a row, or of a part of it, below its shift: s; Q; sum q (z - shift) - sum q log q, the second for KL.
template <class C>
struct RowSums {
  C exponentials, mass, cross;
  bool supervised[2];  // whether the rows of R have a nonzero element
  // The divergence of a good prediction is far smaller than its parts, so KL in float adds the same sums in double.
  bool exact;
  double exact_exponentials, exact_mass, exact_cross;

  __device__ __forceinline__ bool takes_part() const { return supervised[0] || supervised[1]; }
  __device__ __forceinline__ C loss() const {
    if (exact) return static_cast<C>(exact_mass * log(exact_exponentials) - exact_cross);
    return mass * logarithm(exponentials) - cross;
  }
};

// `shift` is the row's maximum. Logits that are not finite spoil the sums as they should: if all are -inf, or one is
// +inf or NaN, then z - shift is NaN.
template <class T, class Target>
__device__ __forceinline__ RowSums<ComputeType<T>> sum_row(const Team& team, const T* logits, int columns,
                                                           const Target& target, ComputeType<T> shift,
                                                           const Stage<T>& stage,
                                                           RegisterStack<ComputeType<T>, kLanes<T>>* rest) {
  using C = ComputeType<T>;
  constexpr int kCount = kLanes<T>;
  // If exponentials are as wide as logits, they replace the staged logits, which the gradient needs for nothing else,
  // and the rest of the target may be in registers.
  constexpr bool kAsWide = sizeof(T) == sizeof(C);
  // Exponentials, q (z - shift), q, and the target's own sums. In exact KL the middle ones and q log q leave `sums` for
  // these two after every vector.
  C sums[Target::kSums] = {};
  double divergence = 0, mass = 0;
  bool exact = false;
  if constexpr (Target::kSums > 4 && !std::is_same_v<C, double>) exact = target.kl_divergence;
  const Columns cut = columns_of(logits, columns);
  const auto add = [&](int k, C(&q)[kCount]) {
    const int first = cut.first + k * kCount;
    C z[kCount], e[kCount];
    widen_all<T>(stage.has_logits() ? stage.logits(k) : load_logits(logits, columns, first), z);
    target.load(columns, first, q, sums);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const C below = z[i] - shift;
      e[i] = exponential(below);
      sums[0] += e[i];
      if (q[i] != 0) sums[1] += q[i] * below;  // 0 * -inf would be NaN
      sums[2] += q[i];
    }
    if constexpr (Target::kSums > 4) {
      if (exact) {
        divergence += sums[5] - sums[1];
        mass += sums[2];
        sums[1] = sums[2] = sums[5] = 0;
      }
    }
    if (kAsWide && stage.has_logits()) stage.put_exponentials(k, e);
  };
  // Two loops, for vectors whose target is staged and for the rest: a branch in a single loop costs instructions.
  const int staged = stage.targets_of(cut.vectors);
  int k = team.rank();
  for (; k < staged; k += team.threads()) {
    C q[kCount];
    add(k, q);
    stage.put_target(k, q);
  }
  for (; k < cut.vectors; k += team.threads()) {
    C q[kCount];
    add(k, q);
    if (kAsWide) rest->put(q);
  }
  double parts[3] = {mass, static_cast<double>(sums[0]), divergence};
  if (exact) team.reduce<Sum>(parts);
  team.reduce<Sum>(sums);

  RowSums<C> row{sums[0], sums[2], sums[1], {sums[3] != 0, false}, exact, parts[1], parts[0], -parts[2]};
  if constexpr (Target::kSums > 4) {
    row.supervised[1] = sums[4] != 0;
    row.cross -= sums[5];
    if (exact) row.mass = static_cast<C>(parts[0]);
  }
  return row;
}

// Stores `stored` (factor exp(z - shift) - q), with what sum_row has kept in `stage` and `rest`. `gradient` may be the
// logits themselves.
template <class T, class Target>
__device__ __forceinline__ void store_gradient(const Team& team, const T* logits, int columns, const Target& target,
                                               ComputeType<T> shift, ComputeType<T> factor, ComputeType<T> stored,
                                               T* gradient, const Stage<T>& stage,
                                               RegisterStack<ComputeType<T>, kLanes<T>>* rest) {
  using C = ComputeType<T>;
  constexpr int kCount = kLanes<T>;
  constexpr bool kAsWide = sizeof(T) == sizeof(C);
  const Columns written = columns_of(gradient, columns);
  const bool same = same_cut(gradient, logits);  // else a thread takes vectors that it has not staged
  const bool kept = stage.has_logits() && same;
  const bool rest_kept = kAsWide && stage.keeps_rest() && same;
  const auto store = [&](int k, const C(&q)[kCount]) {
    const int first = written.first + k * kCount;
    C e[kCount];
    widen_all<T>(kept ? stage.logits(k) : load_columns<T, kCount>(logits, columns, first, minus_infinity<T>()), e);
    if (!(kAsWide && kept)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) e[i] = exponential(e[i] - shift);
    }
    Pack<T, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) narrow(stored * (factor * e[i] - q[i]), &pack.at[i]);
    store_vector(gradient, columns, first, pack);
  };
  // From the last vector to the first, the order in which `rest` returns them.
  const int first_of_rest = same ? stage.targets_of(written.vectors) : 0;
  int k = team.last_of(written.vectors);
  for (; k >= first_of_rest; k -= team.threads()) {
    C q[kCount], unused[Target::kSums];
    if (rest_kept) {
      rest->take(q);
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
}

// `gradient` may be null, and may be the logits themselves. It is multiplied by stored_factor() (co_tuning_loss.cuh),
// which is called late because the sums need the registers.
template <class T, class Target, class StoredFactor>
__device__ __forceinline__ RowResult<ComputeType<T>> soft_cross_entropy(const Team& team, const T* logits, int columns,
                                                                        const Target& target,
                                                                        const StoredFactor& stored_factor, T* gradient,
                                                                        const Stage<T>& stage) {
  using C = ComputeType<T>;
  const C top = row_maximum(team, logits, columns, &stage);
  RegisterStack<C, kLanes<T>> rest;
  const RowSums<C> sums = sum_row(team, logits, columns, target, top, stage, &rest);
  RowResult<C> result{0, {sums.supervised[0], sums.supervised[1]}};
  if (sums.takes_part()) result.loss = sums.loss();
  if (gradient == nullptr) return result;
  if (!sums.takes_part()) {
    zero_row(team, gradient, columns);
    return result;
  }
  store_gradient(team, logits, columns, target, top, sums.mass / sums.exponentials, stored_factor(), gradient, stage,
                 &rest);
  return result;
}

}  // namespace cotuning::cuda
