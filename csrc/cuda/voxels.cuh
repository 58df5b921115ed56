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
__device__ __forceinline__ int checked_label(const Volume& v, int64_t label, bool& bad) {
  const bool ignored = v.has_ignore_index && label == v.ignore_index;
  const bool known = label >= 0 && label < v.classes + v.first_label;
  bad |= !known && !ignored;
  return known && !ignored ? static_cast<int>(label) : kUncounted;
}

// kResampled: the volume may be resampled, for which 64-bit divisions are compiled that cost registers.
template <bool kResampled, typename L, int kVoxels>
__device__ __forceinline__ void load_labels_of(const Volume& v, int64_t sample, int64_t voxel, int (&labels)[kVoxels],
                                               bool& bad) {
  const L* p = static_cast<const L*>(v.target.data) + sample * v.target.sample_stride;
  if (kResampled && v.target.resampling.active) {
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) labels[k] = checked_label(v, p[v.target.resampling.offset(voxel + k)], bad);
    return;
  }
  p += voxel * v.target.voxel_stride;
  if (kVoxels > 1 && v.target.voxel_stride == 1 && reinterpret_cast<uintptr_t>(p) % (sizeof(L) * kVoxels) == 0) {
    // In pieces of 16 bytes at most, the widest load there is.
    constexpr int kPiece = sizeof(L) * kVoxels > 16 ? 16 / sizeof(L) : kVoxels;
#pragma unroll
    for (int first = 0; first < kVoxels; first += kPiece) {
      const auto piece = *reinterpret_cast<const Packed<L, kPiece>*>(p + first);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) labels[first + k] = checked_label(v, piece.values[k], bad);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) labels[k] = checked_label(v, p[k * v.target.voxel_stride], bad);
}

// The type is one for the whole launch, so the branch costs nothing beside the load.
template <bool kResampled, int kVoxels>
__device__ __forceinline__ void load_labels(const Volume& v, int64_t sample, int64_t voxel, int (&labels)[kVoxels],
                                            bool& bad) {
  switch (v.target.type) {
    case ElementType::kBool:
    case ElementType::kUint8: return load_labels_of<kResampled, uint8_t>(v, sample, voxel, labels, bad);
    case ElementType::kInt8: return load_labels_of<kResampled, int8_t>(v, sample, voxel, labels, bad);
    case ElementType::kInt16: return load_labels_of<kResampled, int16_t>(v, sample, voxel, labels, bad);
    case ElementType::kInt32: return load_labels_of<kResampled, int32_t>(v, sample, voxel, labels, bad);
    default: return load_labels_of<kResampled, int64_t>(v, sample, voxel, labels, bad);
  }
}

// Values of a weight or dense target.
template <typename X, typename A, int kCount>
__device__ __forceinline__ void load_values_of(const void* data, const int64_t (&at)[kCount], A (&values)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const X x = static_cast<const X*>(data)[at[k]];
    if constexpr (sizeof(X) == 2 && !std::is_integral_v<X>) {
      values[k] = static_cast<A>(static_cast<float>(x));
    } else {
      values[k] = static_cast<A>(x);
    }
  }
}
template <typename A, int kCount>
__device__ __forceinline__ void load_values(const VoxelView& x, const int64_t (&at)[kCount], A (&values)[kCount]) {
  switch (x.type) {
    case ElementType::kBool:
    case ElementType::kUint8: return load_values_of<uint8_t>(x.data, at, values);
    case ElementType::kInt8: return load_values_of<int8_t>(x.data, at, values);
    case ElementType::kInt16: return load_values_of<int16_t>(x.data, at, values);
    case ElementType::kInt32: return load_values_of<int32_t>(x.data, at, values);
    case ElementType::kInt64: return load_values_of<int64_t>(x.data, at, values);
    case ElementType::kHalf: return load_values_of<Half>(x.data, at, values);
    case ElementType::kBFloat16: return load_values_of<BFloat16>(x.data, at, values);
    case ElementType::kDouble: return load_values_of<double>(x.data, at, values);
    default: return load_values_of<float>(x.data, at, values);
  }
}
template <typename A>
__device__ __forceinline__ A load_value(const VoxelView& x, int64_t at) {
  A value[1];
  load_values(x, {at}, value);
  return value[0];
}

// The weights of neighbouring voxels, 1 where none are given; a voxel of weight 0 does not count, one below 0 or NaN is
// bad.
template <bool kResampled, typename A, int kVoxels>
__device__ __forceinline__ void weigh(const Volume& v, int64_t sample, int64_t voxel, int (&labels)[kVoxels],
                                      A (&weights)[kVoxels], bool& bad) {
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) weights[k] = A(1);
  if (v.weight.data == nullptr) return;
  int64_t at[kVoxels];
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    const int64_t offset = kResampled ? v.weight.offset(voxel + k) : (voxel + k) * v.weight.voxel_stride;
    at[k] = sample * v.weight.sample_stride + offset;
  }
  load_values(v.weight, at, weights);
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    bad |= !(weights[k] >= A(0));
    if (weights[k] == A(0)) labels[k] = kUncounted;
  }
}

// The labels, kUncounted where a voxel does not count, and weights of neighbouring voxels.
template <bool kResampled, typename A, int kVoxels>
__device__ __forceinline__ void load_voxels(const Volume& v, int64_t sample, int64_t voxel, int (&labels)[kVoxels],
                                            A (&weights)[kVoxels], bool& bad) {
  load_labels<kResampled>(v, sample, voxel, labels, bad);
  weigh<kResampled>(v, sample, voxel, labels, weights, bad);
}

// A program's share of the work: every `programs`-th piece of one sample.
struct Share {
  int64_t sample, first;
};
__device__ __forceinline__ Share share_of_block(int programs) {
  return {static_cast<int64_t>(blockIdx.x) / programs, static_cast<int64_t>(blockIdx.x) % programs};
}

}  // namespace cuda
}  // namespace tversky_kernels
