// The ordinary row of the source head: one row of R in float32, logits that shared memory holds, all numbers finite.
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

  template <class T>
  __device__ WholeVectors(const T* logits, const float* r, int columns) {
    const Columns cut = columns_of(logits, columns);
    offset = static_cast<int>(reinterpret_cast<uintptr_t>(r + cut.first) & 15);
    // With an offset the aligned vectors around a vector of R reach from offset / 4 columns before it.
    const int before = offset / 4, after = offset == 0 ? 0 : 4 - before;
    first = cut.first + (before - cut.first + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    count = (columns - after - first) / kLanes<T>;
  }
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
    loaded[i] = from[vector];
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

// Returns false, and has written no gradient, if the row is not ordinary.
template <class T, class StoredFactor>
__device__ __forceinline__ bool ordinary_row(const Team& team, const T* logits, const float* r, int columns,
                                             const StoredFactor& stored_factor, T* gradient, const Stage<T>& stage,
                                             float* loss) {
  constexpr int kCount = kLanes<T>;
  constexpr bool kAsWide = sizeof(T) == sizeof(float);
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
    COTUNING_COUNT_READ(sizeof(float));
    edge_z = widen(logits[edge]);
    edge_q = r[edge];
  }
  uint32_t words = word_of(minus_infinity<T>());
  const auto* from = reinterpret_cast<const Bytes16*>(logits + whole.first);
  int k = pairs.first;
  for (; k + pairs.step < pairs.end(whole.count); k += 2 * pairs.step) {
    words = stage_pairs<T, 2, false>(pairs, k, from, whole.count, stage, words);
  }
  // At most three vectors of a lane are left; a warp takes each of these turns at most once.
  for (; k + pairs.lanes_after - (kWarpThreads - 1) + pairs.step < whole.count; k += 2 * pairs.step) {
    words = stage_pairs<T, 2, true>(pairs, k, from, whole.count, stage, words);
  }
  for (; k < whole.count; k += pairs.step) words = stage_pairs<T, 1, true>(pairs, k, from, whole.count, stage, words);
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
  RegisterStack<float, kCount> rest;
  const auto* r_vectors =
      reinterpret_cast<const Bytes16*>(reinterpret_cast<const char*>(r + whole.first) - whole.offset);
  const auto sweep = [&](auto alike) {
    const auto add_vector = [&](int vector, float(&q)[kCount]) {
      float z[kCount], e[kCount];
      load_numbers<decltype(alike)::value>(r_vectors + vector * (kCount / 4), whole.offset, q);
      widen_words<T>(stage.words(vector), z);
#pragma unroll
      for (int i = 0; i < kCount; ++i) e[i] = add(z[i], q[i]);
      if constexpr (kAsWide) stage.put_exponentials(vector, e);
    };
    k = pairs.first;
    for (; k < pairs.end(staged); k += pairs.step) {
      float q[2][kCount];
      add_vector(k, q[0]);
      add_vector(k + kWarpThreads, q[1]);
      stage.put_target(k, q[0]);
      stage.put_target(k + kWarpThreads, q[1]);
    }
    for (; k < staged; k = pairs.next(k)) {
      float q[kCount];
      add_vector(k, q);
      stage.put_target(k, q);
    }
    for (; k < whole.count; k = pairs.next(k)) {
      float q[kCount];
      add_vector(k, q);
      if (kAsWide) rest.put(q);
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
  const auto store = [&](int vector, const float(&q)[kCount]) {
    float e[kCount];
    widen_words<T>(stage.words(vector), e);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!kAsWide) e[i] = power_of_2(fmaf(e[i], kLog2E, shift));
      e[i] = gradient_of(e[i], q[i]);
    }
    COTUNING_COUNT_WRITTEN(16);
    to[vector] = narrow_words<T>(e);
  };
  // From the last vector to the first, the order in which `rest` returns them.
  for (k = pairs.previous(k); k >= staged; k = pairs.previous(k)) {
    float q[kCount];
    if (kAsWide && stage.keeps_rest()) {
      rest.take(q);
    } else if (whole.offset == 0) {
      load_numbers<true>(r_vectors + k * (kCount / 4), 0, q);
    } else {
      load_numbers<false>(r_vectors + k * (kCount / 4), whole.offset, q);
    }
    store(k, q);
  }
  k = pairs.first;
  for (; k < pairs.end(staged); k += pairs.step) {
    float q[2][kCount];
    stage.target(k, q[0]);
    stage.target(k + kWarpThreads, q[1]);
    store(k, q[0]);
    store(k + kWarpThreads, q[1]);
  }
  for (; k < staged; k = pairs.next(k)) {
    float q[kCount];
    stage.target(k, q);
    store(k, q);
  }
  return true;
}

}  // namespace cotuning::cuda
