// The ordinary row of the source head: one row of R, in float32 or in the logits' type, logits that shared memory
// holds, all numbers finite.
//
// Its loops have neither masks nor tests. With L = log2 e,
//   y = z L - max z L    s = sum 2^y    loss = Q log s - log 2 sum q y    dloss/dz = (Q / s) 2^y - q
// The rounding of max z L is an error of all y of a row alike, and it cancels: a larger y is a larger s. What is not
// finite spoils the sums: NaN and +inf make s NaN, -inf makes q y NaN or infinite. Then soft_cross_entropy (row.cuh)
// does the row from its start.
#pragma once

#include <type_traits>

#include "row.cuh"

namespace cotuning::cuda {

// The whole vectors of a row of logits along which a row of R can be read in whole vectors, too. The columns before and
// after them are fewer than 32.
struct WholeVectors {
  int first = 0;  // their first column
  int count = 0;
  int offset = 0;  // the row of R starts so many bytes past a multiple of 16

  template <class T, class R>
  __device__ WholeVectors(const T* logits, const R* r, int columns) {
    const Columns cut = columns_of(logits, columns);
    offset = static_cast<int>(reinterpret_cast<uintptr_t>(r + cut.first) & 15);
    // With an offset the aligned vectors around a vector of R reach from this many columns before it.
    const int before = offset / static_cast<int>(sizeof(R)), after = offset == 0 ? 0 : kLanes<R> - before;
    first = cut.first + (before - cut.first + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    count = (columns - after - first) / kLanes<T>;
  }
  // For logits without a row of R.
  template <class T>
  __device__ WholeVectors(const T* logits, int columns) : WholeVectors(logits, logits, columns) {}
};

// Which vectors a thread takes: pairs of them, a warp apart, so that the second one's addresses are the first one's and
// a constant.
struct Pairs {
  int first, step;  // of the first vectors of the pairs
  int lanes_after;  // lanes of the warp after this one

  __device__ explicit Pairs(const Team& team)
      : first(team.rank() + (team.rank() & -kWarpThreads)),
        step(2 * team.threads()),
        lanes_after(kWarpThreads - 1 - team.rank() % kWarpThreads) {}
  // All lanes of the warp have both vectors of the pairs that start below this: they agree about it.
  __device__ __forceinline__ int end(int count) const { return count - kWarpThreads - lanes_after; }
  __device__ __forceinline__ int next(int k) const {
    return k + ((k & kWarpThreads) ? step - kWarpThreads : kWarpThreads);
  }
  __device__ __forceinline__ int previous(int k) const {
    return k - ((k & kWarpThreads) ? kWarpThreads : step - kWarpThreads);
  }
};

// Puts kPairs pairs of vectors of logits into shared memory and returns the maxima of top and them. All loads are
// issued before the first is used, as in row_maximum.
template <class T, int kPairs, bool kMasked>
__device__ __forceinline__ uint32_t stage_pairs(const Pairs& pairs, int k, const Bytes16* from, int count,
                                                const Stage<T>& stage, uint32_t top) {
  Bytes16 loaded[2 * kPairs] = {};
#pragma unroll
  for (int i = 0; i < 2 * kPairs; ++i) {
    const int vector = k + i / 2 * pairs.step + i % 2 * kWarpThreads;
    if (kMasked && vector >= count) continue;
    COTUNING_COUNT_READ(16);
    loaded[i] = load_once(from + vector);
  }
#pragma unroll
  for (int i = 0; i < 2 * kPairs; ++i) {
    const int vector = k + i / 2 * pairs.step + i % 2 * kWarpThreads;
    if (kMasked && vector >= count) continue;
    stage.put_words(vector, loaded[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) top = larger_words<T>(top, loaded[i].words[j]);
  }
  return top;
}

// Puts all of a thread's vectors of logits into shared memory, and returns their maxima.
template <class T>
__device__ __forceinline__ uint32_t stage_vectors(const Pairs& pairs, const Bytes16* from, int count,
                                                  const Stage<T>& stage) {
  uint32_t words = word_of(minus_infinity<T>());
  int k = pairs.first;
  for (; k + pairs.step < pairs.end(count); k += 2 * pairs.step) {
    words = stage_pairs<T, 2, false>(pairs, k, from, count, stage, words);
  }
  // At most three vectors of a lane are left; a warp takes each of these turns at most once.
  for (; k + pairs.lanes_after - (kWarpThreads - 1) + pairs.step < count; k += 2 * pairs.step) {
    words = stage_pairs<T, 2, true>(pairs, k, from, count, stage, words);
  }
  for (; k < count; k += pairs.step) words = stage_pairs<T, 1, true>(pairs, k, from, count, stage, words);
  return words;
}

// Stores a warp's gradients of the columns beside the whole vectors. A lane has column `edge`, if it is below `end`,
// and the lanes after it have the columns after it. A vector of the gradient whose R is not in whole vectors is one
// store.
template <class T>
__device__ __forceinline__ void store_edges(T* gradient, int columns, int edge, int end, float own) {
  constexpr int kCount = kLanes<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  float g[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) g[i] = __shfl_sync(kAllLanes, own, (lane + i) % kWarpThreads);
  if (edge >= end) return;
  const int place = (edge - columns_of(gradient, columns).first) % kCount, start = edge - place;
  if (start >= 0 && start + kCount <= end) {
    if (place != 0) return;
    COTUNING_COUNT_WRITTEN(16);
    *reinterpret_cast<Bytes16*>(gradient + edge) = narrow_words<T>(g);
  } else {
    COTUNING_COUNT_WRITTEN(sizeof(T));
    narrow(own, &gradient[edge]);
  }
}

// Returns false, and has written no gradient, if the row is not ordinary. R is float or T.
template <class T, class R, class StoredFactor>
__device__ __forceinline__ bool ordinary_row(const Team& team, const T* logits, const R* r, int columns,
                                             const StoredFactor& stored_factor, T* gradient, const Stage<T>& stage,
                                             float* loss) {
  constexpr int kCount = kLanes<T>;
  constexpr bool kAsWide = sizeof(T) == sizeof(float);
  // If a vector of R has 16 bytes as a vector of logits has, it replaces the staged logits, and the exponentials are
  // staged in the target's place. The gradient then computes no exponential again.
  constexpr bool kNarrowR = sizeof(R) < sizeof(float);
  using TargetVector = Pack<R, kCount>;
  constexpr float kLog2E = 1.4426950408889634f, kLog2 = 0.6931471805599453f;
  const WholeVectors whole(logits, r, columns);
  if (whole.count <= 0) return false;
  const Pairs pairs(team);

  // Each of the columns before and after the whole vectors is one thread's, which keeps it.
  const int beyond = team.rank() - whole.first;
  const int edge = beyond < 0 ? team.rank() : whole.first + whole.count * kCount + beyond;
  const bool has_edge = edge < columns;
  float edge_z = -INFINITY, edge_q = 0;
  if (has_edge) {
    COTUNING_COUNT_READ(sizeof(T));
    COTUNING_COUNT_READ(sizeof(R));
    edge_z = widen(logits[edge]);
    edge_q = widen(r[edge]);
  }
  const auto* from = reinterpret_cast<const Bytes16*>(logits + whole.first);
  const uint32_t words = stage_vectors<T>(pairs, from, whole.count, stage);
  float top[1] = {fmaxf(edge_z, largest_of_word<T>(words))};
  team.reduce<Largest>(top);

  const float shift = -top[0] * kLog2E;
  float sums[3] = {};  // 2^y, q y, q
  const auto add = [&](float z, float q) {
    const float y = fmaf(z, kLog2E, shift), e = power_of_2(y);
    sums[0] += e;
    sums[1] = fmaf(q, y, sums[1]);
    sums[2] += q;
    return e;
  };
  if (has_edge) add(edge_z, edge_q);
  const int staged = stage.targets_of(whole.count);
  int k;
  RegisterStack<float, kCount> rest;
  const auto* r_vectors =
      reinterpret_cast<const Bytes16*>(reinterpret_cast<const char*>(r + whole.first) - whole.offset);
  constexpr int kVectorsOfR = kCount / kLanes<R>;  // beside a vector of logits
  const auto sweep = [&](auto alike) {
    const auto add_vector = [&](int vector, TargetVector* target, float(&e)[kCount]) {
      float z[kCount], q[kCount];
      load_row<decltype(alike)::value>(r_vectors + vector * kVectorsOfR, whole.offset, target);
      widen_words<T>(stage.words(vector), z);
      widen_pack(*target, q);
#pragma unroll
      for (int i = 0; i < kCount; ++i) e[i] = add(z[i], q[i]);
      if constexpr (kAsWide) stage.put_exponentials(vector, e);
    };
    const auto keep = [&](int vector, const TargetVector& target, const float(&e)[kCount]) {
      if constexpr (kNarrowR) {
        stage.put_words(vector, same_bits<Bytes16>(target));
        stage.put_target(vector, e);
      } else {
        stage.put_target(vector, target.at);
      }
    };
    k = pairs.first;
    for (; k < pairs.end(staged); k += pairs.step) {
      TargetVector target[2];
      float e[2][kCount];
      add_vector(k, &target[0], e[0]);
      add_vector(k + kWarpThreads, &target[1], e[1]);
      keep(k, target[0], e[0]);
      keep(k + kWarpThreads, target[1], e[1]);
    }
    for (; k < staged; k = pairs.next(k)) {
      TargetVector target;
      float e[kCount];
      add_vector(k, &target, e);
      keep(k, target, e);
    }
    for (; k < whole.count; k = pairs.next(k)) {
      TargetVector target;
      float e[kCount];
      add_vector(k, &target, e);
      if constexpr (kAsWide) rest.put(target.at);
    }
  };
  if (whole.offset == 0) {
    sweep(std::true_type{});
  } else {
    sweep(std::false_type{});
  }
  team.reduce<Sum>(sums);

  *loss = sums[2] * logf(sums[0]) - kLog2 * sums[1];
  // Of finite logits the largest adds 1 to s, but for the rounding of max z L, which is large only for absurd logits.
  // Without any mass the row may have no supervision.
  if (!(sums[0] > 0.5f && fabsf(*loss) < INFINITY && sums[2] != 0)) return false;
  if (gradient == nullptr) return true;

  const float factor = sums[2] / sums[0], stored = stored_factor();
  const auto gradient_of = [&](float e, float q) { return stored * fmaf(factor, e, -q); };
  if (team.rank() < kWarpThreads) {
    const float g = gradient_of(power_of_2(fmaf(edge_z, kLog2E, shift)), edge_q);
    store_edges(gradient, columns, edge, beyond < 0 ? whole.first : columns, g);
  }
  auto* to = reinterpret_cast<Bytes16*>(gradient + whole.first);
  const auto store = [&](int vector, float(&e)[kCount], const float(&q)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) e[i] = gradient_of(e[i], q[i]);
    COTUNING_COUNT_WRITTEN(16);
    to[vector] = narrow_words<T>(e);
  };
  // The exponentials of a vector whose logits are staged; or which took their place, in float32.
  const auto exponentials = [&](int vector, float(&e)[kCount]) {
    widen_words<T>(stage.words(vector), e);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!kAsWide) e[i] = power_of_2(fmaf(e[i], kLog2E, shift));
    }
  };
  // From the last vector to the first, the order in which `rest` returns them.
  for (k = pairs.previous(k); k >= staged; k = pairs.previous(k)) {
    float e[kCount], q[kCount];
    if (kAsWide && stage.keeps_rest()) {
      rest.take(q);
    } else {
      TargetVector target;
      if (whole.offset == 0) {
        load_row<true>(r_vectors + k * kVectorsOfR, 0, &target);
      } else {
        load_row<false>(r_vectors + k * kVectorsOfR, whole.offset, &target);
      }
      widen_pack(target, q);
    }
    exponentials(k, e);
    store(k, e, q);
  }
  const auto take = [&](int vector, float(&e)[kCount], float(&q)[kCount]) {
    if constexpr (kNarrowR) {
      widen_words<R>(stage.words(vector), q);
      stage.target(vector, e);
    } else {
      stage.target(vector, q);
    }
  };
  k = pairs.first;
  for (; k < pairs.end(staged); k += pairs.step) {
    float e[2][kCount], q[2][kCount];
    take(k, e[0], q[0]);
    take(k + kWarpThreads, e[1], q[1]);
    if constexpr (!kNarrowR) exponentials(k, e[0]);
    store(k, e[0], q[0]);
    if constexpr (!kNarrowR) exponentials(k + kWarpThreads, e[1]);
    store(k + kWarpThreads, e[1], q[1]);
  }
  for (; k < staged; k = pairs.next(k)) {
    float e[kCount], q[kCount];
    take(k, e, q);
    if constexpr (!kNarrowR) exponentials(k, e);
    store(k, e, q);
  }
  return true;
}

// The target of an ordinary row of the target head: `base` in every column, and `peak` more in one.
struct OneClass {
  int column;
  float base, peak;
};

// The same for the target head: sum q y = base sum y + peak y_column. Returns false, and has written no gradient, if
// the row is not ordinary.
template <class T, class StoredFactor>
__device__ __forceinline__ bool ordinary_row(const Team& team, const T* logits, const OneClass& q, int columns,
                                             const StoredFactor& stored_factor, T* gradient, const Stage<T>& stage,
                                             float* loss) {
  constexpr int kCount = kLanes<T>;
  constexpr float kLog2E = 1.4426950408889634f, kLog2 = 0.6931471805599453f;
  const WholeVectors whole(logits, columns);
  if (whole.count <= 0) return false;
  const Pairs pairs(team);
  const int beyond = team.rank() - whole.first;
  const int edge = beyond < 0 ? team.rank() : whole.first + whole.count * kCount + beyond;
  const bool has_edge = edge < columns;
  float edge_z = -INFINITY;
  if (has_edge) {
    COTUNING_COUNT_READ(sizeof(T));
    edge_z = widen(logits[edge]);
  }
  const float class_z = widen(logits[q.column]);
  const auto* from = reinterpret_cast<const Bytes16*>(logits + whole.first);
  const uint32_t words = stage_vectors<T>(pairs, from, whole.count, stage);
  float top[1] = {fmaxf(edge_z, largest_of_word<T>(words))};
  team.reduce<Largest>(top);

  const float shift = -top[0] * kLog2E;
  float sums[2] = {};  // 2^y, y
  const auto add = [&](float z) {
    const float y = fmaf(z, kLog2E, shift);
    sums[0] += power_of_2(y);
    sums[1] += y;
  };
  if (has_edge) add(edge_z);
  for (int k = pairs.first; k < whole.count; k = pairs.next(k)) {
    float z[kCount];
    widen_words<T>(stage.words(k), z);
#pragma unroll
    for (int i = 0; i < kCount; ++i) add(z[i]);
  }
  team.reduce<Sum>(sums);

  const float mass = fmaf(q.base, static_cast<float>(columns), q.peak), class_y = fmaf(class_z, kLog2E, shift);
  const float cross = fmaf(q.peak, class_y, q.base == 0 ? 0 : q.base * sums[1]);  // 0 * -inf would be NaN
  *loss = mass * logf(sums[0]) - kLog2 * cross;
  if (!(sums[0] > 0.5f && fabsf(*loss) < INFINITY && mass != 0)) return false;
  if (gradient == nullptr) return true;

  const float factor = mass / sums[0], stored = stored_factor(), of_class = q.base + q.peak;
  const auto gradient_of = [&](float z, float target) {
    return stored * fmaf(factor, power_of_2(fmaf(z, kLog2E, shift)), -target);
  };
  if (team.rank() < kWarpThreads) {
    const float g = gradient_of(edge_z, edge == q.column ? of_class : q.base);
    store_edges(gradient, columns, edge, beyond < 0 ? whole.first : columns, g);
  }
  auto* to = reinterpret_cast<Bytes16*>(gradient + whole.first);
  const int vector_of_class = q.column < whole.first ? -1 : (q.column - whole.first) / kCount;
  for (int k = pairs.first; k < whole.count; k = pairs.next(k)) {
    float g[kCount];
    widen_words<T>(stage.words(k), g);
#pragma unroll
    for (int i = 0; i < kCount; ++i) g[i] = gradient_of(g[i], q.base);
    COTUNING_COUNT_WRITTEN(16);
    to[k] = narrow_words<T>(g);
    if (k == vector_of_class) narrow(gradient_of(class_z, of_class), &gradient[q.column]);
  }
  return true;
}

}  // namespace cotuning::cuda
