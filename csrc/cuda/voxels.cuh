// Labels, weights and logits as a thread reads them.
#pragma once

#include <cstring>

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

template <typename L, int kVoxels>
__device__ __forceinline__ void load_labels_of(const Volume& v, int64_t sample, int64_t voxel, int (&labels)[kVoxels],
                                               bool& bad) {
  const L* p = static_cast<const L*>(v.target.data) + sample * v.target.sample_stride;
  if (v.target.resampling.active) {
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
template <int kVoxels>
__device__ __forceinline__ void load_labels(const Volume& v, int64_t sample, int64_t voxel, int (&labels)[kVoxels],
                                            bool& bad) {
  switch (v.target.type) {
    case ElementType::kBool:
    case ElementType::kUint8: return load_labels_of<uint8_t>(v, sample, voxel, labels, bad);
    case ElementType::kInt8: return load_labels_of<int8_t>(v, sample, voxel, labels, bad);
    case ElementType::kInt16: return load_labels_of<int16_t>(v, sample, voxel, labels, bad);
    case ElementType::kInt32: return load_labels_of<int32_t>(v, sample, voxel, labels, bad);
    default: return load_labels_of<int64_t>(v, sample, voxel, labels, bad);
  }
}

// One value of a weight or dense target.
template <typename A>
__device__ __forceinline__ A load_value(const VoxelView& x, int64_t at) {
  switch (x.type) {
    case ElementType::kBool:
    case ElementType::kUint8: return static_cast<A>(static_cast<const uint8_t*>(x.data)[at]);
    case ElementType::kInt8: return static_cast<A>(static_cast<const int8_t*>(x.data)[at]);
    case ElementType::kInt16: return static_cast<A>(static_cast<const int16_t*>(x.data)[at]);
    case ElementType::kInt32: return static_cast<A>(static_cast<const int32_t*>(x.data)[at]);
    case ElementType::kInt64: return static_cast<A>(static_cast<const int64_t*>(x.data)[at]);
    case ElementType::kHalf: return static_cast<A>(static_cast<float>(static_cast<const Half*>(x.data)[at]));
    case ElementType::kBFloat16: return static_cast<A>(static_cast<float>(static_cast<const BFloat16*>(x.data)[at]));
    case ElementType::kDouble: return static_cast<A>(static_cast<const double*>(x.data)[at]);
    default: return static_cast<A>(static_cast<const float*>(x.data)[at]);
  }
}

// The weight of a voxel, 1 where none is given; a voxel of weight 0 does not count, one below 0 or NaN is bad.
template <typename A>
__device__ __forceinline__ A weigh(const Volume& v, int64_t sample, int64_t voxel, int& label, bool& bad) {
  if (v.weight.data == nullptr) return A(1);
  const A w = load_value<A>(v.weight, sample * v.weight.sample_stride + v.weight.offset(voxel));
  bad |= !(w >= A(0));
  if (w == A(0)) label = kUncounted;
  return w;
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
