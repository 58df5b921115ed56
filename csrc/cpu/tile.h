// A tile: a run of voxels of one sample as both passes want them, whatever layout the tensors have: logits as one row a
// class, labels as integers of the width in which is computed, everything padded to whole blocks. Rows that are stored
// so already are not copied. See simd.h for why all of this has internal linkage.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace {

using namespace tversky_kernels;       // NOLINT: internal header of two files
using namespace tversky_kernels::cpu;  // NOLINT

constexpr int kBlockVectors = 4;      // vectors of voxels that a pass works on at once
constexpr int kTileVoxels = 1024;     // at most
constexpr int kRowBytes = 48 * 1024;  // of copied rows, so that they stay in the first-level cache
constexpr int kUncounted = -1;        // label of a voxel that does not count

template <typename A>
constexpr int kBlock = kBlockVectors * Lanes<A>::count;

template <typename T>
struct Tile {
  using A = Compute<T>;
  const T* rows;  // logits of class c: rows + c * row_stride
  int64_t row_stride;
  const typename Lanes<A>::Int* labels;
  const A* weights;  // null: all are 1
  int voxels;        // before padding
  bool masked;       // some label is kUncounted

  int padded_voxels() const { return (voxels + kBlock<A> - 1) / kBlock<A> * kBlock<A>; }
};

TK_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
TK_INLINE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

template <typename T, typename A>
TK_INLINE A to_accumulation(T x) {
  return static_cast<A>(x);
}
template <>
TK_INLINE float to_accumulation<Half, float>(Half x) {
  return widen(HalfVector{x.bits}, x)[0];
}
template <>
TK_INLINE float to_accumulation<BFloat16, float>(BFloat16 x) {
  return widen(HalfVector{x.bits}, x)[0];
}
template <>
TK_INLINE double to_accumulation<Half, double>(Half x) {
  return to_accumulation<Half, float>(x);
}
template <>
TK_INLINE double to_accumulation<BFloat16, double>(BFloat16 x) {
  return to_accumulation<BFloat16, float>(x);
}

// ---- Labels and weights

// Labels of type T become Int, those that do not count kUncounted. Wide is the type in which they are compared.
template <typename T, typename Wide, typename Int>
TK_INLINE void load_labels_as(const T* p, int64_t stride, int count, Wide label_count, bool has_ignore_index,
                              Wide ignore_index, Int* out, bool& masked, BadInput& bad) {
  constexpr int kLanes = Integers<Wide>::count;
  using V = typename Integers<Wide>::Vector;
  V uncounted{}, unknown{};
  const auto convert = [&](const T* from, Int* to) __attribute__((always_inline)) {
    const V label = load_widened<Wide>(from);
    const V not_known = (label < 0) | (label >= label_count);
    const V ignored = has_ignore_index ? label == ignore_index : V{};
    const V not_counted = not_known | ignored;
    uncounted |= not_counted;
    unknown |= not_known & ~ignored;
    store_narrowed(to, label | not_counted);  // kUncounted is all ones
  };
  int i = 0;
  if (stride == 1) {
    for (; i + kLanes <= count; i += kLanes) convert(p + i, out + i);
  }
  for (; i < count; i += kLanes) {
    const int lanes = static_cast<int>(smaller(kLanes, count - i));
    T gathered[kLanes];
    Int converted[kLanes];
    for (int k = 0; k < kLanes; ++k) gathered[k] = p[(i + smaller(k, lanes - 1)) * stride];
    convert(gathered, converted);
    for (int k = 0; k < lanes; ++k) out[i + k] = converted[k];
  }
  masked |= any(uncounted);
  if (any(unknown) && !bad.label) {
    for (int k = 0; k < count; ++k) {
      const Wide label = static_cast<Wide>(p[k * stride]);
      if ((label < 0 || label >= label_count) && !(has_ignore_index && label == ignore_index)) {
        bad.label = true;
        bad.value = static_cast<int64_t>(label);
        break;
      }
    }
  }
}

template <typename T, typename Int>
TK_INLINE void load_labels_of(const Volume& v, int64_t offset, int count, Int* out, bool& masked, BadInput& bad) {
  using Wide = std::conditional_t<(sizeof(T) > sizeof(Int)), T, Int>;
  constexpr int64_t kLargest = sizeof(Wide) == 4 ? INT32_MAX : INT64_MAX;
  const bool ignorable = v.has_ignore_index && v.ignore_index >= -kLargest - 1 && v.ignore_index <= kLargest;
  load_labels_as<T, Wide, Int>(static_cast<const T*>(v.target.data) + offset, v.target.voxel_stride, count,
                               static_cast<Wide>(v.classes + v.first_label), ignorable,
                               static_cast<Wide>(ignorable ? v.ignore_index : 0), out, masked, bad);
}

template <typename Int>
void load_labels(const Volume& v, int64_t sample, int64_t begin, int count, Int* out, bool& masked, BadInput& bad) {
  const int64_t offset = sample * v.target.sample_stride + begin * v.target.voxel_stride;
  switch (v.target.type) {
    case ElementType::kBool:
    case ElementType::kUint8: return load_labels_of<uint8_t>(v, offset, count, out, masked, bad);
    case ElementType::kInt8: return load_labels_of<int8_t>(v, offset, count, out, masked, bad);
    case ElementType::kInt16: return load_labels_of<int16_t>(v, offset, count, out, masked, bad);
    case ElementType::kInt32: return load_labels_of<int32_t>(v, offset, count, out, masked, bad);
    default: return load_labels_of<int64_t>(v, offset, count, out, masked, bad);
  }
}

template <typename T, typename A>
TK_INLINE void load_weights_of(const Volume& v, int64_t offset, int count, A* weights, typename Lanes<A>::Int* labels,
                               bool& masked, BadInput& bad) {
  const T* p = static_cast<const T*>(v.weight.data) + offset;
  for (int i = 0; i < count; ++i) {
    const A w = to_accumulation<T, A>(p[i * v.weight.voxel_stride]);
    weights[i] = w;
    if (w == 0) {  // so that not even a NaN logit of this voxel counts
      labels[i] = kUncounted;
      masked = true;
    }
    bad.weight |= !(w >= 0);
  }
}

template <typename A>
void load_weights(const Volume& v, int64_t sample, int64_t begin, int count, A* weights, typename Lanes<A>::Int* labels,
                  bool& masked, BadInput& bad) {
  const int64_t offset = sample * v.weight.sample_stride + begin * v.weight.voxel_stride;
  switch (v.weight.type) {
    case ElementType::kBool:
    case ElementType::kUint8: return load_weights_of<uint8_t>(v, offset, count, weights, labels, masked, bad);
    case ElementType::kHalf: return load_weights_of<Half>(v, offset, count, weights, labels, masked, bad);
    case ElementType::kBFloat16: return load_weights_of<BFloat16>(v, offset, count, weights, labels, masked, bad);
    case ElementType::kDouble: return load_weights_of<double>(v, offset, count, weights, labels, masked, bad);
    default: return load_weights_of<float>(v, offset, count, weights, labels, masked, bad);
  }
}

// ---- Rows

// Copies `count` voxels of C classes into rows, or (kScatter) rows back to where the voxels are.
template <bool kScatter, typename T>
TK_INLINE void copy_rows(T* at, int64_t class_stride, int64_t voxel_stride, T* rows, int64_t row_stride,
                         int64_t classes, int count) {
  if (voxel_stride == 1) {
    for (int64_t c = 0; c < classes; ++c) {
      T* there = at + c * class_stride;
      T* row = rows + c * row_stride;
      memcpy(kScatter ? there : row, kScatter ? row : there, count * sizeof(T));
    }
    return;
  }
  constexpr int64_t kTogether = 16;  // classes of a voxel that lie in one cache line, if any do
  for (int64_t first = 0; first < classes; first += kTogether) {
    const int64_t last = smaller(first + kTogether, classes);
    for (int i = 0; i < count; ++i) {
      for (int64_t c = first; c < last; ++c) {
        T& there = at[c * class_stride + i * voxel_stride];
        T& here = rows[c * row_stride + i];
        if (kScatter) {
          there = here;
        } else {
          here = there;
        }
      }
    }
  }
}

// Which classes occur among the labels of a block. Most do not, where there are many, and need no masks.
class PresentClasses {
 public:
  static int64_t bytes(int64_t classes) { return (classes + 1 + 63) / 64 * 64; }
  PresentClasses(void* memory, int64_t classes) : flags_(static_cast<uint8_t*>(memory) - kUncounted) {
    memset(memory, 0, bytes(classes));
  }
  template <typename Int>
  TK_INLINE void set(const Int* labels, int count, bool present) {
    for (int i = 0; i < count; ++i) flags_[labels[i]] = present;
  }
  TK_INLINE bool has(int c) const { return flags_[c] != 0; }

 private:
  uint8_t* flags_;  // flags_[kUncounted] is the first byte
};

// Where and how a pass keeps its working memory; the same arithmetic sizes it and lays it out.
template <typename T>
struct TileBuffers {
  using A = Compute<T>;
  using Int = typename Lanes<A>::Int;
  int tile_voxels;
  T* rows;  // [C][tile_voxels]
  Int* labels;
  A* weights;
  char* rest;

  static int voxels_per_tile(const Volume& v) {
    const int64_t fit = kRowBytes / (v.classes * static_cast<int64_t>(sizeof(T))) / kBlock<A> * kBlock<A>;
    return static_cast<int>(smaller(larger(fit, kBlock<A>), kTileVoxels));
  }
  static int64_t bytes(const Volume& v) {
    return voxels_per_tile(v) * static_cast<int64_t>(v.classes * sizeof(T) + sizeof(Int) + sizeof(A));
  }
  TileBuffers(const Volume& v, void* scratch) : tile_voxels(voxels_per_tile(v)) {
    labels = static_cast<Int*>(scratch);
    weights = reinterpret_cast<A*>(labels + tile_voxels);
    rows = reinterpret_cast<T*>(weights + tile_voxels);
    rest = reinterpret_cast<char*>(rows + v.classes * tile_voxels);
  }
};

template <typename T>
TK_INLINE Tile<T> load_tile(const Volume& v, int64_t sample, int64_t begin, int count, const TileBuffers<T>& buffers,
                            BadInput& bad) {
  Tile<T> tile;
  tile.voxels = count;
  tile.labels = buffers.labels;
  tile.weights = nullptr;
  tile.masked = false;
  const int padded = tile.padded_voxels();
  load_labels(v, sample, begin, count, buffers.labels, tile.masked, bad);
  if (v.weight.data != nullptr) {
    load_weights(v, sample, begin, count, buffers.weights, buffers.labels, tile.masked, bad);
    tile.weights = buffers.weights;
  }
  for (int i = count; i < padded; ++i) {
    buffers.labels[i] = kUncounted;
    buffers.weights[i] = 0;
    tile.masked = true;
  }

  // Only copied from.
  T* at = const_cast<T*>(static_cast<const T*>(v.logits.data)) + sample * v.logits.sample_stride +
          begin * v.logits.voxel_stride;
  if (v.logits.voxel_stride == 1 && count == padded) {
    tile.rows = at;
    tile.row_stride = v.logits.class_stride;
    return tile;
  }
  copy_rows<false>(at, v.logits.class_stride, v.logits.voxel_stride, buffers.rows, buffers.tile_voxels, v.classes,
                   count);
  for (int64_t c = 0; c < v.classes; ++c) {
    for (int i = count; i < padded; ++i) buffers.rows[c * buffers.tile_voxels + i] = T{};
  }
  tile.rows = buffers.rows;
  tile.row_stride = buffers.tile_voxels;
  return tile;
}

}  // namespace
