// Labels, weights and logits as a thread reads them.
#pragma once

#include <cstring>
#include <type_traits>

#include "../views.h"
#include "platform.h"

namespace tversky_kernels {
namespace cuda {

constexpr int kUncounted = -1;  // label of a voxel that does not count

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Packed {
  T values[kCount];
};

template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using Type = uint4;
};
template <>
struct Word<8> {
  using Type = uint2;
};

// Voxels of one class that 16 bytes hold, the widest access there is.
template <typename T>
constexpr int kPack = 16 / sizeof(T);

// One access as wide as the values are together. The store is an intrinsic (streaming: the gradient is not read again
// soon), for a plain one the compiler takes apart into its members.
template <typename T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load_packed(const T* p) {
  using W = typename Word<sizeof(T) * kCount>::Type;
  const W word = *reinterpret_cast<const W*>(p);
  Packed<T, kCount> values;
  memcpy(&values, &word, sizeof word);
  return values;
}
template <typename T, int kCount>
__device__ __forceinline__ void store_packed(T* p, const Packed<T, kCount>& values) {
  using W = typename Word<sizeof(T) * kCount>::Type;
  W word;
  memcpy(&word, &values, sizeof word);
  __stcs(reinterpret_cast<W*>(p), word);
}

// One label as a class index, kUncounted where the voxel does not count; sets bad where it is out of range.
template <typename L>
__device__ __forceinline__ int checked_label(const Volume& v, L label, bool& bad) {
  // As unsigned numbers, those below 0 are large. Most labels have 32 bits at most, and no comparison needs more.
  using Number = std::conditional_t<sizeof(L) == 8, uint64_t, uint32_t>;
  const bool known = static_cast<Number>(label) < static_cast<Number>(v.classes + v.first_label);
  if (v.has_ignore_index && static_cast<int64_t>(label) == v.ignore_index) return kUncounted;
  bad |= !known;
  return known ? static_cast<int>(label) : kUncounted;
}

// Calls f(k, value) for the kCount values one stride apart, in as few loads as they allow.
template <typename X, int kCount, typename F>
__device__ __forceinline__ void load_row(const X* p, int64_t stride, F&& f) {
  if (kCount > 1 && stride == 1 && reinterpret_cast<uintptr_t>(p) % (sizeof(X) * kCount) == 0) {
    // In pieces of 16 bytes at most, the widest load there is.
    constexpr int kPiece = sizeof(X) * kCount > 16 ? 16 / sizeof(X) : kCount;
#pragma unroll
    for (int first = 0; first < kCount; first += kPiece) {
      const auto piece = *reinterpret_cast<const Packed<X, kPiece>*>(p + first);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) f(first + k, piece.values[k]);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) f(k, p[k * stride]);
}

// The targets and weights that a kernel reads: of the logits' size only; or resampled as well, below 2^31 voxels; or
// any, for which 64-bit divisions are compiled. Each costs registers.
enum class Reads { kSameSize, kResampled, kAny };

// The offsets of neighbouring voxels in a volume that is resampled.
template <Reads kReads, int kVoxels>
__device__ __forceinline__ void source_offsets(const Resampling& r, int64_t voxel, int64_t (&at)[kVoxels]) {
  if constexpr (kReads == Reads::kAny) {
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) at[k] = r.offset(voxel + k);
  } else {
    const unsigned width = static_cast<unsigned>(r.sizes[2]), height = static_cast<unsigned>(r.sizes[1]);
    const unsigned row = static_cast<unsigned>(voxel) / width;
    int x = static_cast<int>(static_cast<unsigned>(voxel) - row * width), z = static_cast<int>(row / height);
    int y = static_cast<int>(row - z * height);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      at[k] = r.source(0, z) + r.source(1, y) + r.source(2, x);
      if (++x == static_cast<int>(width)) {
        x = 0;
        if (++y == static_cast<int>(height)) {
          y = 0;
          ++z;
        }
      }
    }
  }
}

template <Reads kReads, typename L, int kVoxels>
__device__ __forceinline__ void load_labels_of(const Volume& v, int64_t sample, int64_t voxel, int (&labels)[kVoxels],
                                               bool& bad) {
  const L* p = static_cast<const L*>(v.target.data) + sample * v.target.sample_stride;
  if (kReads != Reads::kSameSize && v.target.resampling.active) {
    int64_t at[kVoxels];
    source_offsets<kReads>(v.target.resampling, voxel, at);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) labels[k] = checked_label(v, p[at[k]], bad);
    return;
  }
  load_row<L, kVoxels>(p + voxel * v.target.voxel_stride, v.target.voxel_stride,
                       [&](int k, L value) { labels[k] = checked_label(v, value, bad); });
}

// The type is one for the whole launch, so the branch costs nothing beside the load.
template <Reads kReads, int kVoxels>
__device__ __forceinline__ void load_labels(const Volume& v, int64_t sample, int64_t voxel, int (&labels)[kVoxels],
                                            bool& bad) {
  switch (v.target.type) {
    case ElementType::kBool:
    case ElementType::kUint8: return load_labels_of<kReads, uint8_t>(v, sample, voxel, labels, bad);
    case ElementType::kInt8: return load_labels_of<kReads, int8_t>(v, sample, voxel, labels, bad);
    case ElementType::kInt16: return load_labels_of<kReads, int16_t>(v, sample, voxel, labels, bad);
    case ElementType::kInt32: return load_labels_of<kReads, int32_t>(v, sample, voxel, labels, bad);
    default: return load_labels_of<kReads, int64_t>(v, sample, voxel, labels, bad);
  }
}

// Calls f with a value of a weight's or dense target's type; a bool is read as uint8.
template <typename F>
__device__ __forceinline__ void with_element_type(ElementType type, F&& f) {
  switch (type) {
    case ElementType::kBool:
    case ElementType::kUint8: return f(uint8_t{});
    case ElementType::kInt8: return f(int8_t{});
    case ElementType::kInt16: return f(int16_t{});
    case ElementType::kInt32: return f(int32_t{});
    case ElementType::kInt64: return f(int64_t{});
    case ElementType::kHalf: return f(Half{});
    case ElementType::kBFloat16: return f(BFloat16{});
    case ElementType::kDouble: return f(double{});
    default: return f(float{});
  }
}

template <typename A, typename X>
__device__ __forceinline__ A to_compute(X x) {
  if constexpr (sizeof(X) == 2 && !std::is_integral_v<X>) {
    return static_cast<A>(static_cast<float>(x));
  } else {
    return static_cast<A>(x);
  }
}

// Values of a weight or dense target, one stride apart from `at` on. kWide: in as few loads as they allow, which takes
// registers in every kernel that may do so.
template <typename X, bool kWide, typename A, int kCount>
__device__ __forceinline__ void load_values_of(const VoxelView& x, int64_t at, int64_t stride, A (&values)[kCount]) {
  const X* p = static_cast<const X*>(x.data) + at;
  if constexpr (kWide) {
    load_row<X, kCount>(p, stride, [&](int k, X value) { values[k] = to_compute<A>(value); });
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] = to_compute<A>(p[k * stride]);
  }
}
template <bool kWide, typename A, int kCount>
__device__ __forceinline__ void load_values(const VoxelView& x, int64_t at, int64_t stride, A (&values)[kCount]) {
  with_element_type(x.type, [&](auto element) { load_values_of<decltype(element), kWide>(x, at, stride, values); });
}
template <typename A>
__device__ __forceinline__ A load_value(const VoxelView& x, int64_t at) {
  A value[1];
  load_values<false>(x, at, 1, value);
  return value[0];
}

// The weights of neighbouring voxels, 1 where none are given; a voxel of weight 0 does not count, one below 0 or NaN is
// bad.
template <Reads kReads, typename A, int kVoxels>
__device__ __forceinline__ void weigh(const Volume& v, int64_t sample, int64_t voxel, int (&labels)[kVoxels],
                                      A (&weights)[kVoxels], bool& bad) {
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) weights[k] = A(1);
  if (v.weight.data == nullptr) return;
  const int64_t start = sample * v.weight.sample_stride, stride = v.weight.voxel_stride;
  if (kReads != Reads::kSameSize && v.weight.resampling.active) {
    int64_t at[kVoxels];
    source_offsets<kReads>(v.weight.resampling, voxel, at);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) weights[k] = load_value<A>(v.weight, start + at[k]);
  } else {
    load_values<false>(v.weight, start + voxel * stride, stride, weights);
  }
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    bad |= !(weights[k] >= A(0));
    if (weights[k] == A(0)) labels[k] = kUncounted;
  }
}

// The labels, kUncounted where a voxel does not count, and weights of neighbouring voxels.
template <Reads kReads, typename A, int kVoxels>
__device__ __forceinline__ void load_voxels(const Volume& v, int64_t sample, int64_t voxel, int (&labels)[kVoxels],
                                            A (&weights)[kVoxels], bool& bad) {
  load_labels<kReads>(v, sample, voxel, labels, bad);
  weigh<kReads>(v, sample, voxel, labels, weights, bad);
}

// The logits of voxels that do not count, which may be anything, as 0. Few have any, so that a branch is the cheapest.
template <typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void clear_uncounted(Packed<T, kVoxels> (&z)[kClasses], const int (&labels)[kVoxels]) {
  bool all_count = true;
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) all_count &= labels[k] != kUncounted;
  if (all_count) return;
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
#pragma unroll
    for (int c = 0; c < kClasses; ++c) z[c].values[k] = labels[k] == kUncounted ? T(0) : z[c].values[k];
  }
}

// The largest of a thread's classes.
template <typename A, typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void largest_of_thread(const Packed<T, kVoxels> (&z)[kClasses], A (&top)[kVoxels]) {
  if constexpr (sizeof(T) == 2) {  // in pairs, before they are converted
    constexpr int kPairs = kVoxels / 2;
    uint32_t largest[kPairs], pairs[kPairs];
    memcpy(largest, &z[0], sizeof largest);
#pragma unroll
    for (int c = 1; c < kClasses; ++c) {
      memcpy(pairs, &z[c], sizeof pairs);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) largest[i] = larger_pair(T{}, largest[i], pairs[i]);
    }
    Packed<T, kVoxels> values;
    memcpy(&values, largest, sizeof largest);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) top[k] = static_cast<A>(values.values[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      top[k] = static_cast<A>(z[0].values[k]);
#pragma unroll
      for (int c = 1; c < kClasses; ++c) top[k] = larger(top[k], static_cast<A>(z[c].values[k]));
    }
  }
}

// For exponential_below, whose factor is near 1 only where a voxel's largest logit is not huge: takes it off where it
// is.
template <typename A, typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void take_off_huge(Packed<T, kVoxels> (&z)[kClasses], A (&top)[kVoxels]) {
  if constexpr (!std::is_same_v<T, Half>) {  // which has none
    constexpr A kHuge = 1 << 20;
    bool any = false;
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) any |= top[k] > kHuge || top[k] < -kHuge;
    if (!any) return;
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
#pragma unroll
      for (int c = 0; c < kClasses; ++c) z[c].values[k] = static_cast<T>(static_cast<A>(z[c].values[k]) - top[k]);
      top[k] = A(0);
    }
  }
}

// A program's share of the work: every `programs`-th piece of one sample.
struct Share {
  int64_t sample, first;
};
__device__ __forceinline__ Share share_of_block(int programs) {
  return {static_cast<int64_t>(blockIdx.x) / programs, static_cast<int64_t>(blockIdx.x) % programs};
}

// The same where a block takes one channel of a sample.
struct ChannelShare {
  int64_t sample, channel, first;
};
__device__ __forceinline__ ChannelShare channel_share_of_block(int programs, int channels) {
  const Share share = share_of_block(programs);
  return {share.sample / channels, share.sample % channels, share.first};
}

}  // namespace cuda
}  // namespace tversky_kernels
