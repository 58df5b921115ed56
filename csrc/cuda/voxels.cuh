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
__device__ __forceinline__ void load_labels_of(const Volume& v, int64_t offset, int (&labels)[kVoxels], bool& bad) {
  const L* p = static_cast<const L*>(v.target.data) + offset;
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
  const int64_t offset = sample * v.target.sample_stride + voxel * v.target.voxel_stride;
  switch (v.target.type) {
    case ElementType::kBool:
    case ElementType::kUint8: return load_labels_of<uint8_t>(v, offset, labels, bad);
    case ElementType::kInt8: return load_labels_of<int8_t>(v, offset, labels, bad);
    case ElementType::kInt16: return load_labels_of<int16_t>(v, offset, labels, bad);
    case ElementType::kInt32: return load_labels_of<int32_t>(v, offset, labels, bad);
    default: return load_labels_of<int64_t>(v, offset, labels, bad);
  }
}

template <typename A>
__device__ __forceinline__ A load_weight(const Volume& v, int64_t sample, int64_t voxel) {
  const int64_t at = sample * v.weight.sample_stride + voxel * v.weight.voxel_stride;
  switch (v.weight.type) {
    case ElementType::kBool:
    case ElementType::kUint8: return static_cast<A>(static_cast<const uint8_t*>(v.weight.data)[at]);
    case ElementType::kHalf: return static_cast<A>(static_cast<float>(static_cast<const Half*>(v.weight.data)[at]));
    case ElementType::kBFloat16:
      return static_cast<A>(static_cast<float>(static_cast<const BFloat16*>(v.weight.data)[at]));
    case ElementType::kDouble: return static_cast<A>(static_cast<const double*>(v.weight.data)[at]);
    default: return static_cast<A>(static_cast<const float*>(v.weight.data)[at]);
  }
}

// The weight of a voxel, 1 where none is given; a voxel of weight 0 does not count, one below 0 or NaN is bad.
template <typename A>
__device__ __forceinline__ A weigh(const Volume& v, int64_t sample, int64_t voxel, int& label, bool& bad) {
  if (v.weight.data == nullptr) return A(1);
  const A w = load_weight<A>(v, sample, voxel);
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
