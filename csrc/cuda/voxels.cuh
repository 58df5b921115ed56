// Labels, weights and logits as a thread reads them.
#pragma once

#include <cstring>
#include <type_traits>

#include "../common/views.h"
#include "launch.h"
#include "platform.h"

namespace tversky_kernels {
namespace cuda {

constexpr int kUncounted = -1;  // label of a voxel that does not count

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Packed {
  T values[kCount];
};

template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

// Voxels of one class in 16 bytes, the widest access there is.
template <typename T>
constexpr int kPack = 16 / sizeof(T);

// The widest word for a move of this number of bytes.
constexpr int word_bytes(int bytes) {
  return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes;
}

// Accesses as wide as all values together, 16 bytes at most. The stores are intrinsics, because the compiler splits
// plain stores into their members. They stream past the cache, because the gradient is not read again soon.
template <typename T, int kCount>
__device__ __forceinline__ void load_words(const T* p, T (&values)[kCount]) {
  constexpr int kBytes = sizeof(T) * kCount, kWord = word_bytes(kBytes);
  using W = Word<kWord>;
  W words[kBytes / kWord];
#pragma unroll
  for (int i = 0; i < kBytes / kWord; ++i) words[i] = reinterpret_cast<const W*>(p)[i];
  memcpy(values, words, sizeof words);
}
template <typename T, int kCount>
__device__ __forceinline__ void store_words(T* p, const T (&values)[kCount]) {
  constexpr int kBytes = sizeof(T) * kCount, kWord = word_bytes(kBytes);
  using W = Word<kWord>;
  W words[kBytes / kWord];
  memcpy(words, values, sizeof words);
#pragma unroll
  for (int i = 0; i < kBytes / kWord; ++i) __stcs(reinterpret_cast<W*>(p) + i, words[i]);
}
template <typename T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load_packed(const T* p) {
  Packed<T, kCount> values;
  load_words(p, values.values);
  return values;
}
template <typename T, int kCount>
__device__ __forceinline__ void store_packed(T* p, const Packed<T, kCount>& values) {
  store_words(p, values.values);
}

// Logits of one class of neighbouring voxels. Half-precision logits stay in pairs, as in memory: otherwise the pairs
// would have to be put together again for instructions that take two numbers at once.
template <typename T, int kVoxels>
struct Logits {
  static constexpr bool kPairs = sizeof(T) == 2 && kVoxels % 2 == 0;
  using Element = std::conditional_t<kPairs, uint32_t, T>;

  Element elements[kPairs ? kVoxels / 2 : kVoxels];

  __device__ __forceinline__ Compute<T> at(int k) const {
    if constexpr (kPairs) {
      return half_of_pair(T{}, elements[k / 2], k % 2 == 1);
    } else {
      return static_cast<Compute<T>>(elements[k]);
    }
  }
  // For rare cases: it unpacks all of them.
  __device__ __forceinline__ void set(int k, T x) {
    T values[kVoxels];
    memcpy(values, elements, sizeof values);
    values[k] = x;
    memcpy(elements, values, sizeof values);
  }
};
template <typename T, int kVoxels>
__device__ __forceinline__ Logits<T, kVoxels> logits_of(const T (&values)[kVoxels]) {
  Logits<T, kVoxels> z;
  memcpy(z.elements, values, sizeof values);
  return z;
}
template <typename T, int kVoxels>
__device__ __forceinline__ Logits<T, kVoxels> load_logits(const T* p) {
  return logits_of(load_packed<T, kVoxels>(p).values);
}

// Tensors of one value a voxel, or one a voxel and class.
template <typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void take_apart(const T (&all)[kVoxels * kClasses], Logits<T, kVoxels> (&z)[kClasses]) {
#pragma unroll
  for (int c = 0; c < kClasses; ++c) {
    T of_class[kVoxels];
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) of_class[k] = all[k * kClasses + c];
    z[c] = logits_of(of_class);
  }
}

// All classes of neighbouring voxels from `at` on, z[c].at(k). kInterleaved: the classes of a voxel lie side by
// side (channels_last), else the voxels of a class.
template <bool kInterleaved, typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void load_classes(const T* rows, int64_t class_stride, int64_t at,
                                             Logits<T, kVoxels> (&z)[kClasses]) {
  if constexpr (kInterleaved) {
    T all[kVoxels * kClasses];
    load_words(rows + at * kClasses, all);
    take_apart(all, z);
  } else {
#pragma unroll
    for (int c = 0; c < kClasses; ++c) z[c] = load_logits<T, kVoxels>(rows + c * class_stride + at);
  }
}
template <bool kInterleaved, typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void store_classes(T* rows, int64_t class_stride, int64_t at,
                                              const Packed<T, kVoxels> (&dz)[kClasses]) {
  if constexpr (kInterleaved) {
    T all[kVoxels * kClasses];
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) all[k * kClasses + c] = dz[c].values[k];
    }
    store_words(rows + at * kClasses, all);
  } else {
#pragma unroll
    for (int c = 0; c < kClasses; ++c) store_packed(rows + c * class_stride + at, dz[c]);
  }
}

// The same, copied ahead. expect begins a copy to this thread's place in shared memory; after wait_for_copies take
// reads it.
template <bool kInterleaved, typename T, int kClasses, int kVoxels>
struct ClassesAhead {
  // As they are read: one piece of memory, or one for each class.
  static constexpr int kPieces = kInterleaved ? 1 : kClasses, kOfPiece = kVoxels * kClasses / kPieces;
  static constexpr int kWord = word_bytes(static_cast<int>(sizeof(T)) * kOfPiece);
  static constexpr int kOfWord = kWord / static_cast<int>(sizeof(T)), kWords = kOfPiece / kOfWord;
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * kVoxels * kClasses * Plan::kThreads;

  unsigned char* slots;  // [kPieces][kWords][threads] words

  __device__ __forceinline__ void expect(const T* rows, int64_t class_stride, int64_t at) const {
    const T* from = rows + (kInterleaved ? at * kClasses : at);
#pragma unroll
    for (int i = 0; i < kPieces; ++i, from += class_stride) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) begin_copy<kWord, false>(slot(i, w), from + w * kOfWord);
    }
  }
  __device__ __forceinline__ void take(Logits<T, kVoxels> (&z)[kClasses]) const {
    T all[kPieces][kOfPiece];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const auto word = load_packed<T, kOfWord>(slot(i, w));
        memcpy(&all[i][w * kOfWord], &word, sizeof word);
      }
    }
    if constexpr (kInterleaved) {
      take_apart(all[0], z);
    } else {
#pragma unroll
      for (int c = 0; c < kClasses; ++c) z[c] = logits_of(all[c]);
    }
  }

 private:
  __device__ __forceinline__ T* slot(int piece, int word) const {
    return reinterpret_cast<T*>(slots + ((piece * kWords + word) * Plan::kThreads + threadIdx.x) * kWord);
  }
};

template <typename T, int kCount>
__device__ __forceinline__ void store_shared(T* p, const Packed<T, kCount>& values) {
  using W = Word<sizeof(T) * kCount>;
  W word;
  memcpy(&word, &values, sizeof word);
  *reinterpret_cast<W*>(p) = word;
}

// One label as a class index, kUncounted where the voxel does not count; sets bad where it is out of range.
template <typename L>
__device__ __forceinline__ int checked_label(const Volume& v, L label, bool& bad) {
  // As unsigned numbers, negative labels are large. Most labels have 32 bits at most; only longer ones need a longer
  // comparison.
  using Number = std::conditional_t<sizeof(L) == 8, uint64_t, uint32_t>;
  const bool known = static_cast<Number>(label) < static_cast<Number>(v.classes + v.first_label);
  if (v.has_ignore_index && static_cast<int64_t>(label) == v.ignore_index) return kUncounted;
  bad |= !known;
  return known ? static_cast<int>(label) : kUncounted;
}

// The same for neighbouring voxels: kUncounted where a voxel does not count; sets bad where a label is out of range.
// True: all labels are classes. That takes one or two comparisons a label; other labels are rare.
template <typename L, int kVoxels>
__device__ __forceinline__ bool checked_labels(const Volume& v, const L (&values)[kVoxels], int (&labels)[kVoxels],
                                               bool& bad) {
  if constexpr (kVoxels == 1) {
    labels[0] = checked_label(v, values[0], bad);
    return labels[0] != kUncounted;
  }
  using Number = std::conditional_t<sizeof(L) == 8, uint64_t, uint32_t>;
  const Number most = static_cast<Number>(v.classes + v.first_label);
  const bool ignores_one = v.has_ignore_index && static_cast<uint64_t>(v.ignore_index) < most;
  const int ignored = ignores_one ? static_cast<int>(v.ignore_index) : -1;
  bool all_known = true;
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    labels[k] = static_cast<int>(values[k]);
    all_known &= (static_cast<Number>(values[k]) < most) & (labels[k] != ignored);
  }
  if (all_known) return true;
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
    using Wide = std::conditional_t<sizeof(L) == 8, int64_t, int>;
    labels[k] = checked_label(v, static_cast<L>(recomputed(static_cast<Wide>(values[k]))), bad);
  }
  return false;
}

// Calls f(k, value) for kCount values, one stride apart, from number `first` of p on. It takes as few loads as
// possible.
template <typename X, int kCount, typename F>
__device__ __forceinline__ void load_row(const X* p, int64_t first, int64_t stride, F&& f) {
  const X* here = p + first;
  if (kCount > 1 && stride == 1 && reinterpret_cast<uintptr_t>(here) % (sizeof(X) * kCount) == 0) {
    // In pieces of 16 bytes at most, the widest load there is.
    constexpr int kPiece = sizeof(X) * kCount > 16 ? 16 / sizeof(X) : kCount;
#pragma unroll
    for (int i = 0; i < kCount; i += kPiece) {
      const auto piece = *reinterpret_cast<const Packed<X, kPiece>*>(here + i);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) f(i + k, piece.values[k]);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) f(k, p[(first + k) * stride]);
}

// Which targets and weights a kernel reads: only those of the logits' size; also resampled ones, below 2^31 voxels; or
// all, with 64-bit divisions. Each step costs registers.
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

// Calls f with a value of the type of labels that are not unsigned bytes.
template <typename F>
__device__ __forceinline__ auto with_other_label_type(ElementType type, F&& f) {
  switch (type) {
    case ElementType::kInt8: return f(int8_t{});
    case ElementType::kInt16: return f(int16_t{});
    case ElementType::kInt32: return f(int32_t{});
    default: return f(int64_t{});
  }
}
// The same for all types; a bool is read as uint8.
template <typename F>
__device__ __forceinline__ auto with_label_type(ElementType type, F&& f) {
  if (type == ElementType::kUint8 || type == ElementType::kBool) return f(uint8_t{});
  return with_other_label_type(type, f);
}

// The labels of a sample as a thread reads them, kVoxels neighbouring ones at once.
template <Reads kReads, int kVoxels>
struct LabelRow {
  // Whether whole loads read them, and whether they are bytes. Bytes are looked for first: to find another type takes
  // longer than to read bytes.
  enum Kind { kSingle, kBytes, kWhole };

  const Volume& v;
  int64_t start;  // of the sample
  int kind;

  __device__ __forceinline__ LabelRow(const Volume& volume, int64_t start_of_sample)
      : v(volume), start(start_of_sample), kind(kSingle) {
    const bool resampled = kReads != Reads::kSameSize && v.target.resampling.active;
    if (kVoxels == 1 || v.target.voxel_stride != 1 || resampled) return;
    kind = with_label_type(v.target.type, [&](auto element) {
      using L = decltype(element);
      constexpr int kAligned = sizeof(L) * kVoxels < 16 ? sizeof(L) * kVoxels : 16;
      if (reinterpret_cast<uintptr_t>(static_cast<const L*>(v.target.data) + start) % kAligned != 0) return kSingle;
      return std::is_same_v<L, uint8_t> ? kBytes : kWhole;
    });
  }
  __device__ __forceinline__ bool whole() const { return kind != kSingle; }
  // From a multiple of kVoxels on. As checked_labels.
  __device__ __forceinline__ bool load(int64_t voxel, int (&labels)[kVoxels], bool& bad) const {
    if (whole()) {
      return with_type_of_whole([&](auto element) {
        using L = decltype(element);
        return of_values(load_packed<L, kVoxels>(static_cast<const L*>(v.target.data) + start + voxel), labels, bad);
      });
    }
    int64_t at[kVoxels];
    if (kReads != Reads::kSameSize && v.target.resampling.active) {
      source_offsets<kReads>(v.target.resampling, voxel, at);
    } else {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) at[k] = (voxel + k) * v.target.voxel_stride;
    }
    return with_label_type(v.target.type, [&](auto element) {
      using L = decltype(element);
      L values[kVoxels];
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) values[k] = (static_cast<const L*>(v.target.data) + start)[at[k]];
      return checked_labels(v, values, labels, bad);
    });
  }
  template <typename L>
  __device__ __forceinline__ bool of_values(const Packed<L, kVoxels>& values, int (&labels)[kVoxels], bool& bad) const {
    if constexpr (std::is_same_v<L, uint8_t> && kVoxels % 4 == 0) {
      uint32_t words[kVoxels / 4];
      memcpy(words, &values, sizeof words);
      int bytes[kVoxels];
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) bytes[k] = byte_of(words[k / 4], k % 4);
      return checked_labels(v, bytes, labels, bad);
    } else {
      return checked_labels(v, values.values, labels, bad);
    }
  }

  // The same through shared memory, where whole(). expect begins the copy; after wait_for_copies take reads it. slots:
  // [16-byte pieces][threads of a block], or smaller pieces.
  __device__ __forceinline__ void expect(int64_t voxel, unsigned char* slots) const {
    with_type_of_whole([&](auto element) {
      using L = decltype(element);
      const L* from = static_cast<const L*>(v.target.data) + start + voxel;
#pragma unroll
      for (int i = 0; i < kPieces<L>; ++i) {
        begin_copy<kPieceBytes<L>, true>(slot<L>(slots, i), from + i * (kVoxels / kPieces<L>));
      }
    });
  }
  __device__ __forceinline__ bool take(unsigned char* slots, int (&labels)[kVoxels], bool& bad) const {
    return with_type_of_whole([&](auto element) {
      using L = decltype(element);
      constexpr int kOfPiece = kVoxels / kPieces<L>;
      Packed<L, kVoxels> values;
#pragma unroll
      for (int i = 0; i < kPieces<L>; ++i) {
        const auto piece = load_packed<L, kOfPiece>(reinterpret_cast<const L*>(slot<L>(slots, i)));
        memcpy(&values.values[i * kOfPiece], &piece, sizeof piece);
      }
      return of_values(values, labels, bad);
    });
  }

 private:
  template <typename F>
  __device__ __forceinline__ auto with_type_of_whole(F&& f) const {
    if (kind == kBytes) return f(uint8_t{});
    return with_other_label_type(v.target.type, f);
  }
  template <typename L>
  static constexpr int kPieceBytes = sizeof(L) * kVoxels < 16 ? static_cast<int>(sizeof(L)) * kVoxels : 16;
  template <typename L>
  static constexpr int kPieces = static_cast<int>(sizeof(L)) * kVoxels / kPieceBytes<L>;
  template <typename L>
  static __device__ __forceinline__ unsigned char* slot(unsigned char* slots, int piece) {
    return slots + (piece * Plan::kThreads + static_cast<int>(threadIdx.x)) * kPieceBytes<L>;
  }
};

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

// Values of a weight or dense target, one stride apart, from number `first` of x.data + start on. kWide: in as few
// loads as possible. That takes registers in every kernel that can do it.
template <typename X, bool kWide, typename A, int kCount>
__device__ __forceinline__ void load_values_of(const VoxelView& x, int64_t start, int64_t first, int64_t stride,
                                               A (&values)[kCount]) {
  const X* p = static_cast<const X*>(x.data) + start;
  if constexpr (kWide) {
    load_row<X, kCount>(p, first, stride, [&](int k, X value) { values[k] = to_compute<A>(value); });
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] = to_compute<A>(p[(first + k) * stride]);
  }
}
template <bool kWide, typename A, int kCount>
__device__ __forceinline__ void load_values(const VoxelView& x, int64_t start, int64_t first, int64_t stride,
                                            A (&values)[kCount]) {
  with_element_type(x.type,
                    [&](auto element) { load_values_of<decltype(element), kWide>(x, start, first, stride, values); });
}
// The same from any places.
template <typename A, int kCount>
__device__ __forceinline__ void load_values_at(const VoxelView& x, int64_t start, const int64_t (&at)[kCount],
                                               A (&values)[kCount]) {
  with_element_type(x.type, [&](auto element) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      values[k] = to_compute<A>((static_cast<const decltype(element)*>(x.data) + start)[at[k]]);
    }
  });
}

// The weights of neighbouring voxels: 1 where there are none, 0 where a voxel does not count. A voxel of weight 0 does
// not count. A weight below 0 or NaN is bad. all_count: no label is kUncounted so far. True: all voxels count.
template <Reads kReads, typename A, int kVoxels>
__device__ __forceinline__ bool weigh(const Volume& v, int64_t sample, int64_t voxel, int (&labels)[kVoxels],
                                      A (&weights)[kVoxels], bool all_count, bool& bad) {
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) weights[k] = A(1);
  if (v.weight.data != nullptr) {
    const int64_t start = sample * v.weight.sample_stride;
    if (kReads != Reads::kSameSize && v.weight.resampling.active) {
      int64_t at[kVoxels];
      source_offsets<kReads>(v.weight.resampling, voxel, at);
      load_values_at(v.weight, start, at, weights);
    } else {
      load_values<false>(v.weight, start, voxel, v.weight.voxel_stride, weights);
    }
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      bad |= !(weights[k] >= A(0));
      if (magnitude(weights[k]) < kSmallestNormal<A>) labels[k] = kUncounted;
      all_count &= labels[k] != kUncounted;
    }
  }
  if (all_count) return true;
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) weights[k] = labels[k] == kUncounted ? A(0) : weights[k];
  return false;
}

// The labels (kUncounted where a voxel does not count) and weights (0 there) of neighbouring voxels. True: all count.
template <Reads kReads, typename A, int kVoxels>
__device__ __forceinline__ bool load_voxels(const Volume& v, const LabelRow<kReads, kVoxels>& row, int64_t sample,
                                            int64_t voxel, int (&labels)[kVoxels], A (&weights)[kVoxels], bool& bad) {
  const bool all_known = row.load(voxel, labels, bad);
  return weigh<kReads>(v, sample, voxel, labels, weights, all_known, bad);
}

// Sets the logits of voxels that do not count, which may be anything, to 0. Those of half precision in pairs: to put
// single ones back would take instructions also where all voxels count.
template <typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void clear_uncounted(Logits<T, kVoxels> (&z)[kClasses], const int (&labels)[kVoxels]) {
  if constexpr (Logits<T, kVoxels>::kPairs) {
    uint32_t masks[kVoxels / 2];
#pragma unroll
    for (int i = 0; i < kVoxels / 2; ++i) {
      masks[i] = (labels[2 * i] == kUncounted ? 0u : 0xffffu) | (labels[2 * i + 1] == kUncounted ? 0u : 0xffff0000u);
    }
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
#pragma unroll
      for (int i = 0; i < kVoxels / 2; ++i) z[c].elements[i] &= masks[i];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
#pragma unroll
      for (int c = 0; c < kClasses; ++c) z[c].elements[k] = labels[k] == kUncounted ? T(0) : z[c].elements[k];
    }
  }
}

// The largest of a thread's classes.
template <typename A, typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void largest_of_thread(const Logits<T, kVoxels> (&z)[kClasses], A (&top)[kVoxels]) {
  if constexpr (Logits<T, kVoxels>::kPairs) {  // before the conversion
    Logits<T, kVoxels> largest = z[0];
#pragma unroll
    for (int c = 1; c < kClasses; ++c) {
#pragma unroll
      for (int i = 0; i < kVoxels / 2; ++i) {
        largest.elements[i] = larger_pair(T{}, largest.elements[i], z[c].elements[i]);
      }
    }
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) top[k] = largest.at(k);
  } else {
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      top[k] = z[0].at(k);
#pragma unroll
      for (int c = 1; c < kClasses; ++c) top[k] = larger(top[k], z[c].at(k));
    }
  }
}

// For exponential_below, whose factor is near 1 only where the largest logit of a voxel is not huge. Where one is, it
// is taken off first.
template <typename T, typename A, int kVoxels>
__device__ __forceinline__ bool any_huge(const A (&top)[kVoxels]) {
  bool any = false;
  if constexpr (!std::is_same_v<T, Half>) {  // which has no huge numbers
    constexpr A kHuge = 1 << 20;
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) any |= magnitude(top[k]) > kHuge;
  }
  return any;
}
template <typename A, typename T, int kClasses, int kVoxels>
__device__ __forceinline__ void take_off(Logits<T, kVoxels> (&z)[kClasses], A (&top)[kVoxels]) {
#pragma unroll
  for (int k = 0; k < kVoxels; ++k) {
#pragma unroll
    for (int c = 0; c < kClasses; ++c) z[c].set(k, static_cast<T>(z[c].at(k) - top[k]));
    top[k] = A(0);
  }
}

// A block's share of the work: the pieces of one sample from begin to last, a step apart. The pieces between belong to
// other blocks.
struct Share {
  int64_t sample;
  int64_t program;      // the number of this block among the sample's blocks
  int64_t begin, last;  // voxel at which the piece starts
  int64_t end;          // of the group's voxels
  int64_t step;
};
template <Order kOrder>
__device__ __forceinline__ Share share_of_block(const Volume& v, const Blocks& blocks) {
  const unsigned block = kOrder == Order::kForward ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const unsigned sample = block / static_cast<unsigned>(blocks.programs);
  const int program = static_cast<int>(block - sample * static_cast<unsigned>(blocks.programs));
  const int group = program / blocks.group, place = program - group * blocks.group;
  const int longer_before = group < blocks.longer ? group : blocks.longer;
  const int pieces = blocks.pieces + (group < blocks.longer);
  const int64_t start = (static_cast<int64_t>(group) * blocks.pieces + longer_before) * blocks.piece;
  const int64_t end = start + static_cast<int64_t>(pieces) * blocks.piece;
  const int64_t begin = start + static_cast<int64_t>(place) * blocks.piece;
  const int64_t step = static_cast<int64_t>(blocks.group) * blocks.piece;
  const int64_t last = begin + (pieces - 1 - place) / blocks.group * step;
  return {sample, program, begin, last, end < v.voxels ? end : v.voxels, step};
}

// The same where a block takes one channel of a sample.
struct ChannelShare {
  Share share;
  int64_t channel;
};
template <Order kOrder>
__device__ __forceinline__ ChannelShare channel_share_of_block(const Volume& v, const Blocks& blocks) {
  Share share = share_of_block<kOrder>(v, blocks);
  const int64_t channel = share.sample % v.classes;
  share.sample /= v.classes;
  return {share, channel};
}

// Calls f(at) for the place `offset` voxels into each of the block's pieces, unless the volume ends before it.
template <Order kOrder, typename F>
__device__ __forceinline__ void for_each_piece(const Share& share, int offset, F&& f) {
  const int64_t first = share.begin + offset;
  if constexpr (kOrder == Order::kForward) {
    for (int64_t at = first; at < share.end; at += share.step) f(at);
  } else {
    int64_t at = share.last + offset;
    if (at >= share.end) at -= share.step;
    for (; at >= first; at -= share.step) f(at);
  }
}

// The same with f(at, next). next: where this thread's next piece begins; -1: there is none. Calls expect(at) once
// before, with the first piece. in_piece: added to both.
template <Order kOrder, typename E, typename F>
__device__ __forceinline__ void for_each_piece_ahead(const Share& share, int offset, int in_piece, E&& expect, F&& f) {
  const int64_t first = share.begin + offset;
  const int64_t step = kOrder == Order::kForward ? share.step : -share.step;
  int64_t at = first;
  if (kOrder == Order::kBackward) {
    at = share.last + offset;
    if (at >= share.end) at -= share.step;
  }
  const auto has = [&](int64_t x) { return kOrder == Order::kForward ? x < share.end : x >= first; };
  if (has(at)) expect(at + in_piece);
  while (has(at)) {
    const int64_t next = at + step;
    f(at + in_piece, has(next) ? next + in_piece : int64_t{-1});
    at = next;
  }
}

// Calls f(at) for the voxels that belong to one thread alone, kVoxels from `at` on.
template <Order kOrder, int kVoxels, typename F>
__device__ __forceinline__ void for_each_own(const Share& share, F&& f) {
  for_each_piece<kOrder>(share, static_cast<int>(threadIdx.x) * kVoxels, f);
}

}  // namespace cuda
}  // namespace tversky_kernels
