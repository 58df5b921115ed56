// A tile: a run of voxels of one sample as both passes want them, whatever type and layout the tensors have: logits as
// one row a class in the accumulation type, labels as integers of that width, everything padded to whole blocks.
// Rows that are stored so already are not copied. See simd.h for why all of this has internal linkage.
#pragma once

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

template <typename A>
struct Tile {
  const A* rows;  // logits of class c: rows + c * row_stride
  int64_t row_stride;
  const typename Lanes<A>::Int* labels;
  const A* weights;  // null: all are 1
  int voxels;        // before padding
  bool masked;       // some label is kUncounted
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
// ------------------------------------------------------------------------------------------------

// Wide is the type that holds every value of T and decides whether a label is in range.
template <typename T, typename Wide, typename Int>
TK_INLINE void load_labels_as(const T* p, int64_t stride, int count, Wide label_count, bool has_ignore_index,
                              Wide ignore_index, Int* out, bool& masked, BadInput& bad) {
  Int uncounted = 0, unknown = 0;
  auto one = [&](int i, T raw) __attribute__((always_inline)) {
    const Wide label = static_cast<Wide>(raw);
    const bool ignored = has_ignore_index & (label == ignore_index);
    const bool known = (label >= 0) & (label < label_count);
    const bool counts = known & !ignored;
    out[i] = counts ? static_cast<Int>(label) : Int{kUncounted};
    uncounted |= !counts;
    unknown |= !known & !ignored;
  };
  if (stride == 1) {
    for (int i = 0; i < count; ++i) one(i, p[i]);
  } else {
    for (int i = 0; i < count; ++i) one(i, p[i * stride]);
  }
  masked |= uncounted != 0;
  if (unknown != 0 && !bad.label) {
    for (int i = 0; i < count; ++i) {
      const Wide label = static_cast<Wide>(p[i * stride]);
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
  const T* p = static_cast<const T*>(v.target.data) + offset;
  const int64_t label_count = v.classes + v.first_label;
  if constexpr (sizeof(T) <= 2 || (sizeof(T) == 4 && sizeof(Int) == 4)) {
    const bool fits = v.ignore_index >= INT32_MIN && v.ignore_index <= INT32_MAX;
    load_labels_as<T, int32_t, Int>(p, v.target.voxel_stride, count, static_cast<int32_t>(label_count),
                                    v.has_ignore_index && fits, static_cast<int32_t>(fits ? v.ignore_index : 0), out,
                                    masked, bad);
  } else {
    load_labels_as<T, int64_t, Int>(p, v.target.voxel_stride, count, label_count, v.has_ignore_index, v.ignore_index,
                                    out, masked, bad);
  }
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
// --------------------------------------------------------------------------------------------------------------

// One row of `count` elements, `stride` apart.
template <typename T, typename A>
TK_INLINE void widen_row(const T* p, int64_t stride, int count, A* out) {
  int i = 0;
  if constexpr (sizeof(T) == 2) {
    if (stride == 1) {
      for (; i + kHalfLanes <= count; i += kHalfLanes) store(out + i, widen(load<HalfVector>(p + i), T{}));
    }
  }
  for (; i < count; ++i) out[i] = to_accumulation<T, A>(p[i * stride]);
}

template <typename T, typename A>
TK_INLINE void narrow_row(const A* in, T* p, int64_t stride, int count) {
  if constexpr (sizeof(T) == 2) {
    int i = 0;
    for (; i + kHalfLanes <= count; i += kHalfLanes) {
      const HalfVector h = narrow(load<FloatVector>(in + i), T{});
      if (stride == 1) {
        store(p + i, h);
      } else {
        for (int k = 0; k < kHalfLanes; ++k) p[(i + k) * stride].bits = h[k];
      }
    }
    if (i < count) {  // the row is padded, so the whole vector may be read
      const HalfVector h = narrow(load<FloatVector>(in + i), T{});
      for (int k = 0; i + k < count; ++k) p[(i + k) * stride].bits = h[k];
    }
  } else {
    for (int i = 0; i < count; ++i) p[i * stride] = in[i];
  }
}

// Where and how a pass keeps its working memory; the same arithmetic sizes it and lays it out.
template <typename A>
struct TileBuffers {
  using Int = typename Lanes<A>::Int;
  int tile_voxels;
  A* rows;  // [C][tile_voxels]
  Int* labels;
  A* weights;
  char* rest;

  static int voxels_per_tile(const Volume& v) {
    const int64_t fit = kRowBytes / (v.classes * static_cast<int64_t>(sizeof(A))) / kBlock<A> * kBlock<A>;
    return static_cast<int>(smaller(larger(fit, kBlock<A>), kTileVoxels));
  }
  static int64_t bytes(const Volume& v) {
    const int64_t voxels = voxels_per_tile(v);
    return (v.classes + 1) * voxels * static_cast<int64_t>(sizeof(A)) + voxels * static_cast<int64_t>(sizeof(Int));
  }
  TileBuffers(const Volume& v, void* scratch) : tile_voxels(voxels_per_tile(v)) {
    rows = static_cast<A*>(scratch);
    labels = reinterpret_cast<Int*>(rows + v.classes * tile_voxels);
    weights = reinterpret_cast<A*>(labels + tile_voxels);
    rest = reinterpret_cast<char*>(weights + tile_voxels);
  }
};

// T is the logits' type.
template <typename T, typename A>
TK_INLINE Tile<A> load_tile(const Volume& v, int64_t sample, int64_t begin, int count, const TileBuffers<A>& buffers,
                            BadInput& bad) {
  Tile<A> tile;
  tile.voxels = count;
  tile.labels = buffers.labels;
  tile.weights = nullptr;
  tile.masked = false;
  const int padded = (count + kBlock<A> - 1) / kBlock<A> * kBlock<A>;
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

  const T* p = static_cast<const T*>(v.logits.data) + sample * v.logits.sample_stride + begin * v.logits.voxel_stride;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (v.logits.voxel_stride == 1 && count == padded) {
      tile.rows = reinterpret_cast<const A*>(p);
      tile.row_stride = v.logits.class_stride;
      return tile;
    }
  }
  for (int64_t c = 0; c < v.classes; ++c) {
    A* row = buffers.rows + c * buffers.tile_voxels;
    widen_row<T, A>(p + c * v.logits.class_stride, v.logits.voxel_stride, count, row);
    for (int i = count; i < padded; ++i) row[i] = 0;
  }
  tile.rows = buffers.rows;
  tile.row_stride = buffers.tile_voxels;
  return tile;
}

}  // namespace
