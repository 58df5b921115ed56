// A tile: a run of voxels of one sample in the form that both passes take, whatever layout the tensors have. Logits are
// one row for each class, labels are integers as wide as the type of the computation, and everything is padded to whole
// blocks. Rows that are stored so already are not copied. simd.h says why all of this has internal linkage.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"
#include "transpose.h"

namespace {

using namespace tversky_kernels;       // NOLINT: internal header of two files
using namespace tversky_kernels::cpu;  // NOLINT

constexpr int kBlockVectors = 4;      // vectors of voxels that a pass works on at once
constexpr int kTileVoxels = 1024;     // at most
constexpr int kCopiedVoxels = 128;    // at most, where a tile's logits are copied
constexpr int kRowBytes = 48 * 1024;  // of copied rows, so that they stay in the first-level cache
constexpr int kUncounted = -1;        // label of a voxel that does not count
constexpr int kFewClasses = 4;        // the most classes for which softmax kernels know the number of classes

template <typename A>
constexpr int kBlock = kBlockVectors * Lanes<A>::count;

// Calls f with a value of the logits' type, and returns its result.
template <typename F>
auto with_logits_type(ElementType type, const F& f) {
  switch (type) {
    case ElementType::kDouble: return f(double{});
    case ElementType::kHalf: return f(Half{});
    case ElementType::kBFloat16: return f(BFloat16{});
    default: return f(float{});
  }
}

// The cross-entropy of a softmax whose label is the target: with a focal exponent, or with label smoothing, not with
// both.
enum class CeForm { kNone, kPlain, kFocal, kSmoothed };

TK_INLINE CeForm ce_form(const Volume& v) {
  if (v.cross_entropy == CrossEntropy::kNone) return CeForm::kNone;
  if (v.focal_gamma != 0) return CeForm::kFocal;
  return v.cross_entropy == CrossEntropy::kSmoothed ? CeForm::kSmoothed : CeForm::kPlain;
}

TK_INLINE bool has_ce_option(const Volume& v) {
  return ce_form(v) == CeForm::kFocal || ce_form(v) == CeForm::kSmoothed;
}

// Whether every class of a voxel needs its own g and its own term. The kernels for one label a voxel do not make them.
TK_INLINE bool takes_general_kernels(const Volume& v) {
  if (v.dense || v.activation != Activation::kSoftmax) return v.is_general();
  const bool both = v.focal_gamma != 0 && v.cross_entropy == CrossEntropy::kSmoothed;
  return both || (has_ce_option(v) && v.overlap == OverlapForm::kSquared);
}

// A tile's labels: bytes in place, which all count; or converted, where all count (kAll) or some do not (kSome).
enum class Labels { kBytes, kAll, kSome };

template <typename T>
struct Tile {
  using A = Compute<T>;
  const T* rows;  // logits of class c: rows + c * row_stride
  int64_t row_stride;
  const typename Lanes<A>::Int* labels;
  const uint8_t* bytes;  // instead of labels; null: the labels are converted
  const A* weights;      // null: all are 1
  const A* targets;      // g of class c: targets + c * target_stride; null: g follows from the labels
  int64_t target_stride;
  typename Lanes<A>::Int first_label;  // of class 0
  int voxels;                          // before padding
  bool masked;                         // some label is kUncounted
  bool is_inner;                       // the classes of a voxel lie side by side from `rows` on and are read there
  A focal_gamma;                       // of the cross-entropy; 0: none

  int padded_voxels() const { return (voxels + kBlock<A> - 1) / kBlock<A> * kBlock<A>; }
  template <Labels kLabels>
  TK_INLINE IntVector<A> label(int i) const {
    if constexpr (kLabels == Labels::kBytes) {
      return (IntVector<A>)load_widened<typename Lanes<A>::Int>(bytes + i);
    } else {
      return load<IntVector<A>>(labels + i);
    }
  }
};

// Calls work with the tile's Labels as a constant.
template <typename T, typename F>
TK_INLINE void with_labels(const Tile<T>& tile, const F& work) {
  if (tile.bytes != nullptr) {
    work(std::integral_constant<Labels, Labels::kBytes>{});
  } else if (tile.masked) {
    work(std::integral_constant<Labels, Labels::kSome>{});
  } else {
    work(std::integral_constant<Labels, Labels::kAll>{});
  }
}

// Calls work with the form of the cross-entropy and whether errors are squared, as constants. For a softmax whose label
// is the target.
template <typename F>
TK_INLINE void with_ce_forms(const Volume& v, const F& work) {
  const auto with_form = [&](auto cross_entropy) __attribute__((always_inline)) {
    if (v.overlap == OverlapForm::kSquared) {
      work(cross_entropy, std::true_type{});
    } else {
      work(cross_entropy, std::false_type{});
    }
  };
  switch (ce_form(v)) {
    case CeForm::kNone: return with_form(std::integral_constant<CeForm, CeForm::kNone>{});
    case CeForm::kPlain: return with_form(std::integral_constant<CeForm, CeForm::kPlain>{});
    case CeForm::kFocal: return work(std::integral_constant<CeForm, CeForm::kFocal>{}, std::false_type{});
    case CeForm::kSmoothed: return work(std::integral_constant<CeForm, CeForm::kSmoothed>{}, std::false_type{});
  }
}

// Calls work with all that decides the code of a softmax whose label is the target, as constants: the Labels of the
// tile, the form of the cross-entropy, and whether errors are squared.
template <typename T, typename F>
TK_INLINE void with_softmax_options(const Volume& v, const Tile<T>& tile, const F& work) {
  with_labels(tile, [&](auto labels) __attribute__((always_inline)) {
    const auto with_form = [&](auto cross_entropy) __attribute__((always_inline)) {
      if (v.overlap == OverlapForm::kSquared) {
        work(labels, cross_entropy, std::true_type{});
      } else {
        work(labels, cross_entropy, std::false_type{});
      }
    };
    const CeForm form = ce_form(v);
    if (form == CeForm::kNone) return with_form(std::integral_constant<CeForm, CeForm::kNone>{});
    if (form == CeForm::kPlain) return with_form(std::integral_constant<CeForm, CeForm::kPlain>{});
    if constexpr (decltype(labels)::value != Labels::kBytes) {
      if (form == CeForm::kFocal) {
        return work(labels, std::integral_constant<CeForm, CeForm::kFocal>{}, std::false_type{});
      }
      work(labels, std::integral_constant<CeForm, CeForm::kSmoothed>{}, std::false_type{});
    }
  });
}

// x^gamma for x in [0, 1], gamma > 0.
struct FocalPower {
  template <typename V, typename A>
  TK_INLINE V operator()(V x, A gamma) const {
    const V power = exp_nonpositive<A>(log_positive<A>(x) * gamma);
    return x > 0 ? power : x * 0;  // NaN stays NaN
  }
};

constexpr TK_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr TK_INLINE int64_t larger(int64_t a, int64_t b) {
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

// The place of each of the tile's voxels in a volume of another size, as offsets from the start of the sample.
TK_INLINE void resampled_offsets(const Resampling& r, int64_t begin, int count, int64_t* offsets) {
  for (int i = 0; i < count;) {
    const int64_t row = (begin + i) / r.sizes[2], first = (begin + i) % r.sizes[2];
    const int64_t start = r.source(0, row / r.sizes[1]) + r.source(1, row % r.sizes[1]);
    const int run = static_cast<int>(smaller(r.sizes[2] - first, count - i));
    for (int k = 0; k < run; ++k) offsets[i + k] = start + r.source(2, first + k);
    i += run;
  }
}

// The tile's values of a resampled volume, gathered; null where the volume is not resampled.
template <typename T>
TK_INLINE const T* gather_resampled(const VoxelView& view, const T* sample, int64_t begin, int count, T* gathered) {
  if (!view.resampling.active) return nullptr;
  int64_t offsets[kTileVoxels];
  resampled_offsets(view.resampling, begin, count, offsets);
  for (int i = 0; i < count; ++i) gathered[i] = sample[offsets[i]];
  return gathered;
}

// Labels of type T become Int; kUncounted where a voxel does not count. Wide is the type in which they are compared.
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
TK_INLINE void load_labels_of(const Volume& v, int64_t sample, int64_t begin, int count, Int* out, bool& masked,
                              BadInput& bad) {
  using Wide = std::conditional_t<(sizeof(T) > sizeof(Int)), T, Int>;
  constexpr int64_t kLargest = sizeof(Wide) == 4 ? INT32_MAX : INT64_MAX;
  const bool ignorable = v.has_ignore_index && v.ignore_index >= -kLargest - 1 && v.ignore_index <= kLargest;
  const T* labels = static_cast<const T*>(v.target.data) + sample * v.target.sample_stride;
  T memory[kTileVoxels];
  const T* gathered = gather_resampled(v.target, labels, begin, count, memory);
  load_labels_as<T, Wide, Int>(gathered != nullptr ? gathered : labels + begin * v.target.voxel_stride,
                               gathered != nullptr ? 1 : v.target.voxel_stride, count,
                               static_cast<Wide>(v.classes + v.first_label), ignorable,
                               static_cast<Wide>(ignorable ? v.ignore_index : 0), out, masked, bad);
}

template <typename Int>
void load_labels(const Volume& v, int64_t sample, int64_t begin, int count, Int* out, bool& masked, BadInput& bad) {
  switch (v.target.type) {
    case ElementType::kBool:
    case ElementType::kUint8: return load_labels_of<uint8_t>(v, sample, begin, count, out, masked, bad);
    case ElementType::kInt8: return load_labels_of<int8_t>(v, sample, begin, count, out, masked, bad);
    case ElementType::kInt16: return load_labels_of<int16_t>(v, sample, begin, count, out, masked, bad);
    case ElementType::kInt32: return load_labels_of<int32_t>(v, sample, begin, count, out, masked, bad);
    default: return load_labels_of<int64_t>(v, sample, begin, count, out, masked, bad);
  }
}

// The labels as they are stored, where the kernels for few classes can read them; else null.
TK_INLINE const uint8_t* labels_in_place(const Volume& v, int64_t sample, int64_t begin, int count) {
  const bool bytes = v.target.type == ElementType::kBool || v.target.type == ElementType::kUint8 ||
                     v.target.type == ElementType::kInt8;
  const bool ignores_a_class = v.has_ignore_index && v.ignore_index >= 0 && v.ignore_index < v.classes;
  if (!bytes || ignores_a_class || v.classes > kFewClasses || v.activation != Activation::kSoftmax ||
      takes_general_kernels(v) || has_ce_option(v) || v.weight.data != nullptr || v.target.resampling.active ||
      v.target.voxel_stride != 1 || count % kVectorBytes) {
    return nullptr;
  }
  const uint8_t* labels = static_cast<const uint8_t*>(v.target.data) + sample * v.target.sample_stride + begin;
  ByteVector largest{};
  for (int i = 0; i < count; i += kVectorBytes) {
    const ByteVector next = load<ByteVector>(labels + i);
    largest = next > largest ? next : largest;
  }
  return any(largest > static_cast<uint8_t>(v.classes - 1)) ? nullptr : labels;
}

template <typename T, typename A>
TK_INLINE void load_weights_of(const Volume& v, int64_t sample, int64_t begin, int count, A* weights,
                               typename Lanes<A>::Int* labels, bool& masked, BadInput& bad) {
  const T* p = static_cast<const T*>(v.weight.data) + sample * v.weight.sample_stride;
  T memory[kTileVoxels];
  const T* gathered = gather_resampled(v.weight, p, begin, count, memory);
  const int64_t stride = gathered != nullptr ? 1 : v.weight.voxel_stride;
  p = gathered != nullptr ? gathered : p + begin * stride;
  for (int i = 0; i < count; ++i) {
    const A w = to_accumulation<T, A>(p[i * stride]);
    weights[i] = w;
    if (!(w >= 0) && !bad.weight) {
      bad.weight = true;
      bad.weight_value = static_cast<double>(w);
    }
    if (w < kSmallestNormal<A> && w > -kSmallestNormal<A>) {  // hides the voxel, and so a NaN logit
      weights[i] = 0;
      labels[i] = kUncounted;
      masked = true;
    }
  }
}

template <typename A>
void load_weights(const Volume& v, int64_t sample, int64_t begin, int count, A* weights, typename Lanes<A>::Int* labels,
                  bool& masked, BadInput& bad) {
  switch (v.weight.type) {
    case ElementType::kBool:
    case ElementType::kUint8: return load_weights_of<uint8_t>(v, sample, begin, count, weights, labels, masked, bad);
    case ElementType::kHalf: return load_weights_of<Half>(v, sample, begin, count, weights, labels, masked, bad);
    case ElementType::kBFloat16:
      return load_weights_of<BFloat16>(v, sample, begin, count, weights, labels, masked, bad);
    case ElementType::kDouble: return load_weights_of<double>(v, sample, begin, count, weights, labels, masked, bad);
    default: return load_weights_of<float>(v, sample, begin, count, weights, labels, masked, bad);
  }
}

// ---- Dense targets

// n numbers that lie side by side. load_widened has better instructions than gcc 12 finds, where there are any.
template <typename T, typename A>
TK_INLINE void convert(const T* p, int n, A* out) {
  using V = Vector<A>;
  using Int = typename Lanes<A>::Int;
  constexpr int kLanes = Lanes<A>::count;
  constexpr bool kWidens = kVectorBytes == 64 || (kVectorBytes == 32 && sizeof(Int) == 4);
  int i = 0;
  if constexpr (sizeof(A) == 4 && (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>)) {
    for (; i + kLanes <= n; i += kLanes) store(out + i, widen(load<HalfVector>(p + i), T{}));
  } else if constexpr (kWidens && std::is_integral_v<T> && sizeof(T) <= sizeof(Int)) {
    for (; i + kLanes <= n; i += kLanes) store(out + i, __builtin_convertvector(load_widened<Int>(p + i), V));
  } else if constexpr (sizeof(A) == 4 && std::is_same_v<T, int64_t>) {
    for (; i + kLanes <= n; i += kLanes) store(out + i, convert_long(p + i));
  }
  for (; i < n; ++i) out[i] = to_accumulation<T, A>(p[i]);
}

// One class's g of `count` voxels.
template <typename T, typename A>
TK_INLINE void load_targets_row(const T* p, int64_t stride, const int64_t* offsets, int count, A* out) {
  if (offsets != nullptr) {
    for (int i = 0; i < count; ++i) out[i] = to_accumulation<T, A>(p[offsets[i]]);
  } else if (stride == 1) {
    constexpr int kLine = 64 / sizeof(T);
    for (int i = 0; i < count; i += kLine) prefetch(p + count + i);  // the next tile's
    convert(p, count, out);
  } else {
    for (int i = 0; i < count; ++i) out[i] = to_accumulation<T, A>(p[i * stride]);
  }
}

// The g of voxels whose classes lie side by side, as one_hot leaves them. Returns how many voxels it has read, from the
// first one on. converted: memory for a vector of voxels.
template <typename T, typename A>
TK_INLINE int load_inner_targets(const T* p, int classes, int count, A* converted, A* rows, int64_t row_stride) {
  constexpr int kLanes = Lanes<A>::count, kLine = 64 / sizeof(T);
  int done = 0;
  for (; done + kLanes <= count; done += kLanes) {
    const T* at = p + static_cast<int64_t>(done) * classes;
    const T* later = at + static_cast<int64_t>(count) * classes;  // the next tile's
    for (int i = 0; i < kLanes * classes; i += kLine) prefetch_to_second_level(later + i);
    const A* from = converted;
    if constexpr (std::is_same_v<T, A>) {
      from = at;
    } else {
      convert(at, kLanes * classes, converted);
    }
    if (copy_class_inner<false>(const_cast<A*>(from), classes, rows + done, row_stride, kLanes) == 0) return 0;
  }
  return done;
}

template <typename T, typename A>
TK_INLINE void load_targets_of(const Volume& v, int64_t sample, int64_t begin, int count, A* converted, A* rows,
                               int64_t row_stride, typename Lanes<A>::Int* labels, bool& masked) {
  const VoxelView& t = v.target;
  const T* p = static_cast<const T*>(t.data) + sample * t.sample_stride;
  int64_t memory[kTileVoxels];
  const int64_t* offsets = nullptr;
  if (t.resampling.active) {
    resampled_offsets(t.resampling, begin, count, memory);
    offsets = memory;
  } else {
    p += begin * t.voxel_stride;
  }
  int done = 0;
  // With short vectors few classes are gathered as fast.
  const bool by_vectors = kVectorBytes > 16 || v.classes > kFewClasses;
  if (by_vectors && offsets == nullptr && t.class_stride == 1 && t.voxel_stride == v.classes) {
    done = load_inner_targets<T, A>(p, static_cast<int>(v.classes), count, converted, rows, row_stride);
    p += done * t.voxel_stride;
  }
  for (int64_t c = 0; done < count && c < v.classes; ++c) {
    A* row = rows + c * row_stride + done;
    load_targets_row<T, A>(p + c * t.class_stride, t.voxel_stride, offsets, count - done, row);
  }
  for (int i = 0; i < count; ++i) labels[i] = 0;
  if (!v.has_ignore_index) return;
  // A voxel that holds the ignore_index in every class does not count.
  const A ignored = static_cast<A>(v.ignore_index);
  for (int i = 0; i < count; ++i) {
    bool all = true;
    for (int64_t c = 0; all && c < v.classes; ++c) all = rows[c * row_stride + i] == ignored;
    labels[i] = all ? kUncounted : 0;
    masked |= all;
  }
}

// The dense target as rows of g; labels become 0, or kUncounted where a voxel does not count.
template <typename A>
void load_targets(const Volume& v, int64_t sample, int64_t begin, int count, A* converted, A* rows, int64_t row_stride,
                  typename Lanes<A>::Int* labels, bool& masked) {
  switch (v.target.type) {
    case ElementType::kBool:
    case ElementType::kUint8:
      return load_targets_of<uint8_t>(v, sample, begin, count, converted, rows, row_stride, labels, masked);
    case ElementType::kInt8:
      return load_targets_of<int8_t>(v, sample, begin, count, converted, rows, row_stride, labels, masked);
    case ElementType::kInt16:
      return load_targets_of<int16_t>(v, sample, begin, count, converted, rows, row_stride, labels, masked);
    case ElementType::kInt32:
      return load_targets_of<int32_t>(v, sample, begin, count, converted, rows, row_stride, labels, masked);
    case ElementType::kInt64:
      return load_targets_of<int64_t>(v, sample, begin, count, converted, rows, row_stride, labels, masked);
    case ElementType::kHalf:
      return load_targets_of<Half>(v, sample, begin, count, converted, rows, row_stride, labels, masked);
    case ElementType::kBFloat16:
      return load_targets_of<BFloat16>(v, sample, begin, count, converted, rows, row_stride, labels, masked);
    case ElementType::kDouble:
      return load_targets_of<double>(v, sample, begin, count, converted, rows, row_stride, labels, masked);
    default: return load_targets_of<float>(v, sample, begin, count, converted, rows, row_stride, labels, masked);
  }
}

// ---- Rows

// Copies `count` voxels of C classes into rows or, with kScatter, from rows back to the voxels.
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
  const int done = class_stride == 1 && voxel_stride == classes
                       ? copy_class_inner<kScatter>(at, static_cast<int>(classes), rows, row_stride, count)
                       : 0;
  constexpr int64_t kTogether = 16;  // classes of a voxel in one cache line, where they lie side by side
  for (int64_t first = 0; first < classes; first += kTogether) {
    const int64_t last = smaller(first + kTogether, classes);
    for (int i = done; i < count; ++i) {
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

// Where the channel after c begins: the next row, or after the last row the first row of the next tile. Kernels that go
// from channel to channel prefetch it: a row is too short a stream for the processor's own prefetching.
template <typename T>
TK_INLINE const T* next_channel(const Tile<T>& tile, int c, int classes) {
  return c + 1 < classes ? tile.rows + (c + 1) * tile.row_stride : tile.rows + tile.padded_voxels();
}

constexpr int kFewChannels = 8;  // for fewer it takes longer to ask which of them occur

// ---- A few classes of one vector of voxels at a time, from rows, or from memory where they lie side by side

template <typename T>
TK_INLINE Vector<Compute<T>> to_compute(typename Stored<T>::Vector v) {
  if constexpr (sizeof(T) == 2) {
    return widen(v, T{});
  } else {
    return v;
  }
}

template <typename T>
TK_INLINE typename Stored<T>::Vector to_stored(Vector<Compute<T>> v) {
  if constexpr (sizeof(T) == 2) {
    return narrow(v, T{});
  } else {
    return v;
  }
}

// The rows of one vector of voxels in the type of the computation, class c at first[c * kStep], and their maxima.
template <typename T, int kStep>
struct ComputedRows {
  using V = Vector<Compute<T>>;
  V* first;
  V top;
  TK_INLINE typename Stored<T>::Vector get(int c) const { return to_stored<T>(first[c * kStep]); }
  TK_INLINE void put(int c, typename Stored<T>::Vector stored) {
    const V z = to_compute<T>(stored);
    first[c * kStep] = z;
    top = maximum(top, z);
  }
};

#if defined(TK_HAS_SHUFFLES)
constexpr bool kReadsInner = true;  // classes that lie side by side

template <int C, bool kScatter, typename T>
TK_INLINE void copy_inner(T* at, Vector<Compute<T>>* z, bool streamed = false) {
  ComputedRows<T, 1> rows{z, {}};
  copy_few_classes<kScatter, C>(at, rows, streamed, std::make_integer_sequence<int, C>{});
}
#else
constexpr bool kReadsInner = false;
#endif

template <int C, bool kInner, typename T>
TK_INLINE void load_classes(const Tile<T>& tile, int i, Vector<Compute<T>>* z) {
#if defined(TK_HAS_SHUFFLES)
  if constexpr (kInner) return copy_inner<C, false>(const_cast<T*>(tile.rows) + i * C, z);
#endif
  for (int c = 0; c < C; ++c) z[c] = load_logits(tile.rows + c * tile.row_stride + i);
}

// The same; returns their maximum.
template <int C, bool kInner, typename T>
TK_INLINE Vector<Compute<T>> load_classes_and_top(const Tile<T>& tile, int i, Vector<Compute<T>>* z) {
  load_classes<C, kInner>(tile, i, z);
  Vector<Compute<T>> top = z[0];
  for (int c = 1; c < C; ++c) top = maximum(top, z[c]);
  return top;
}

template <int C, bool kInner, typename T>
TK_INLINE void store_classes(T* rows, int64_t row_stride, int i, Vector<Compute<T>>* dz, bool streamed) {
#if defined(TK_HAS_SHUFFLES)
  if constexpr (kInner) return copy_inner<C, true>(rows + i * C, dz, streamed);
#endif
  for (int c = 0; c < C; ++c) store_logits(rows + c * row_stride + i, dz[c], streamed);
}

// Whether memory with these strides is read and written in this form.
TK_INLINE bool is_inner(const Volume& v, int64_t class_stride, int64_t voxel_stride) {
  return kReadsInner && v.activation == Activation::kSoftmax && !takes_general_kernels(v) && !has_ce_option(v) &&
         v.overlap != OverlapForm::kSquared && v.classes >= 2 && class_stride == 1 && voxel_stride == v.classes;
}

// Which classes occur among the labels of a block. Where there are many classes most do not, and need no masks.
class PresentClasses {
 public:
  static int64_t bytes(int64_t classes) { return (classes + 2 + 63) / 64 * 64; }  // kUncounted, and label 1 where C = 1
  PresentClasses(void* memory, int64_t classes) : flags_(static_cast<uint8_t*>(memory) - kUncounted) {
    memset(memory, 0, bytes(classes));
  }
  // count: how many labels; whole vectors.
  template <typename Int>
  TK_INLINE void set(const Int* labels, int count, bool present) {
    using I = typename Integers<Int>::Vector;
    const I first = labels[0] - I{};
    I others{};
    for (int i = 0; i < count; i += Integers<Int>::count) others |= load<I>(labels + i) != first;
    if (any(others)) {
      for (int i = 0; i < count; ++i) flags_[labels[i]] = present;
    } else {
      flags_[labels[0]] = present;  // as inside of an organ
    }
  }
  TK_INLINE bool has(int c) const { return flags_[c] != 0; }

 private:
  uint8_t* flags_;  // flags_[kUncounted] is the first byte
};

// Reads the softmax's logits of one block of kBlockVectors vectors after another, class by class, into memory where the
// classes of a block lie side by side, with their maxima. Rows that are a power of two apart share a few lines of every
// cache, so a block's logits are soon gone from it. So each logit is read once, while the kernel works on the block
// before, and prefetched a few rows earlier.
template <typename T>
struct BlockReader {
  using V = Vector<Compute<T>>;
  static constexpr int kManyClasses = 24, kLongRun = 4;
  const T* rows;
  int64_t row_stride;
  int classes, ahead;

  TK_INLINE BlockReader(const Tile<T>& tile, int classes_)
      : rows(tile.rows), row_stride(tile.row_stride), classes(classes_), ahead(classes_ < 16 ? classes_ : 16) {}

  TK_INLINE void read_class(int at, int c, V* logits, V* top) const {
    constexpr int kLanes = Lanes<Compute<T>>::count, kLine = 64 / sizeof(T);
    const T* row = rows + c * row_stride + at;
    const T* later =
        row + (c + ahead < classes ? ahead * row_stride : (ahead - classes) * row_stride + kBlock<Compute<T>>);
    for (int i = 0; i < kBlock<Compute<T>>; i += kLine) prefetch_to_second_level(later + i);
    const int block = at / kBlock<Compute<T>>;
    if (classes >= kManyClasses && c % kLongRun == block % kLongRun) {
      const T* far = rows + c * row_stride + (block / kLongRun + 1) * kLongRun * kBlock<Compute<T>>;
      for (int i = 0; i < kLongRun * kBlock<Compute<T>>; i += kLine) prefetch_to_second_level(far + i);
    }
#pragma GCC unroll 4
    for (int k = 0; k < kBlockVectors; ++k) {
      const V z = load_logits(row + k * kLanes);
      top[k] = maximum(top[k], z);
      logits[c * kBlockVectors + k] = z;
    }
  }
};

#if defined(TK_HAS_SHUFFLES)
// A block of voxels whose classes lie side by side, from `at` on, into memory as BlockReader writes it.
template <typename T>
__attribute__((noinline)) void read_inner_block(const T* at, int classes, Vector<Compute<T>>* logits,
                                                Vector<Compute<T>>* top) {
  using A = Compute<T>;
  for (int k = 0; k < kBlockVectors; ++k) {
    ComputedRows<T, kBlockVectors> rows{logits + k, broadcast<A>(-__builtin_inff())};
    copy_vector_of_voxels<false>(const_cast<T*>(at) + k * Lanes<A>::count * classes, classes, rows);
    top[k] = rows.top;
  }
}
// The rows of a block to memory where the classes of a voxel lie side by side. streamed: past the caches, in whole
// lines. Lines that rows do not fill are put together in `lines`, which has the block's size.
template <typename T>
__attribute__((noinline)) void write_inner_block(T* at, int classes, T* rows, bool streamed, T* lines) {
  using V = typename Stored<T>::Vector;
  constexpr int kLanes = sizeof(V) / sizeof(T), kVoxels = kBlock<Compute<T>>;
  const bool in_lines = classes <= kMostPicked || (sizeof(V) == 64 && classes % kLanes == 0);
  T* const to = streamed && !in_lines ? lines : at;
  for (int i = 0; i < kVoxels; i += kLanes) {
    BufferRows<T> of_vector{rows + i, kVoxels};
    copy_vector_of_voxels<true>(to + i * classes, classes, of_vector, streamed && in_lines);
  }
  if (to == at) return;
  for (int i = 0; i < kVoxels * classes; i += kLanes) stream(at + i, load<V>(lines + i));
}
#else
template <typename T>
void read_inner_block(const T*, int, Vector<Compute<T>>*, Vector<Compute<T>>*) {}
template <typename T>
void write_inner_block(T*, int, T*, bool, T*) {}
#endif

// Calls work(at, logits, top, read_next) for every block of the tile. work calls read_next(c) for every class.
template <bool kInner, typename T, typename F>
TK_INLINE void for_each_block(const Tile<T>& tile, int padded, int classes, Vector<Compute<T>>* scratch, F&& work) {
  using V = Vector<Compute<T>>;
  constexpr int kStep = kBlock<Compute<T>>;
  V* logits = scratch;
  if constexpr (kInner) {
    V top[kBlockVectors];
    for (int at = 0; at < padded; at += kStep) {
      const T* block = tile.rows + static_cast<int64_t>(at) * classes;
      const T* next = block + (at + kStep < padded ? kStep * classes : 0);
      read_inner_block(block, classes, logits, top);
      work(at, logits, top, [=](int c) __attribute__((always_inline)) {
        for (int i = 0; i < kStep; i += 64 / static_cast<int>(sizeof(T))) prefetch(next + c * kStep + i);
      });
    }
  } else {
    const BlockReader<T> reader(tile, classes);
    V* next = scratch + classes * kBlockVectors;
    const V lowest = broadcast<Compute<T>>(-__builtin_inff());
    V top[kBlockVectors] = {lowest, lowest, lowest, lowest};
    for (int c = 0; c < classes; ++c) reader.read_class(0, c, logits, top);
    for (int at = 0; at < padded; at += kStep) {
      const int next_at = at + kStep < padded ? at + kStep : at;  // there is no block after the last one
      V next_top[kBlockVectors] = {lowest, lowest, lowest, lowest};
      work(at, logits, top,
           [&](int c) __attribute__((always_inline)) { reader.read_class(next_at, c, next, next_top); });
      for (int k = 0; k < kBlockVectors; ++k) top[k] = next_top[k];
      V* const done = logits;
      logits = next;
      next = done;
    }
  }
}

// Calls read_next(c) and add_class(c, whether it is some voxel's label, as a constant) for every class. kAll: every
// class is taken for a label that occurs.
template <bool kAll, typename Next, typename Add>
TK_INLINE void for_each_class(int classes, const PresentClasses& present, const Next& read_next, const Add& add_class) {
#pragma GCC unroll 8
  for (int c = 0; c < classes; ++c) {
    read_next(c);
    if (kAll || present.has(c)) {
      add_class(c, std::true_type{});
    } else {
      add_class(c, std::false_type{});
    }
  }
}

// The working memory of a pass. The same arithmetic sizes it and lays it out.
template <typename T>
struct TileBuffers {
  using A = Compute<T>;
  using Int = typename Lanes<A>::Int;
  int tile_voxels, row_voxels;
  T* rows;       // [C][row_voxels]
  A* targets;    // [C][tile_voxels] of a dense target
  A* converted;  // [C] vectors: of a dense target, for load_inner_targets
  Int* labels;
  A* weights;
  char* rest;

  static int64_t bytes_per_voxel(const Volume& v) {
    return v.classes * static_cast<int64_t>(sizeof(T) + (v.dense ? sizeof(A) : 0));
  }
  // Whether whole blocks of logits are read in place.
  static bool is_direct(const Volume& v) {
    return !v.dense && (v.logits.voxel_stride == 1 || is_inner(v, v.logits.class_stride, v.logits.voxel_stride));
  }
  static int voxels_per_tile(const Volume& v) {
    if (is_direct(v)) return kTileVoxels;
    // Half of it, so that partial sums end at the same voxels in every layout. Kernels that know the number of classes
    // have sums for each tile.
    int voxels = v.logits.voxel_stride == 1 || v.classes <= kFewClasses ? kTileVoxels : kCopiedVoxels;
    while (voxels > kBlock<A> && voxels * bytes_per_voxel(v) > kRowBytes) voxels /= 2;
    return voxels;
  }
  // The rows that are copied. Where whole blocks are read in place, only the last, incomplete block is copied.
  static int voxels_per_row(const Volume& v) { return is_direct(v) ? kBlock<A> : voxels_per_tile(v); }
  static int64_t bytes(const Volume& v) {
    const int64_t target_bytes = v.dense ? v.classes * static_cast<int64_t>(sizeof(A)) : 0;
    return voxels_per_tile(v) * (target_bytes + static_cast<int64_t>(sizeof(Int) + sizeof(A))) +
           voxels_per_row(v) * v.classes * static_cast<int64_t>(sizeof(T)) + Lanes<A>::count * target_bytes;
  }
  TileBuffers(const Volume& v, void* scratch) : tile_voxels(voxels_per_tile(v)), row_voxels(voxels_per_row(v)) {
    labels = static_cast<Int*>(scratch);
    weights = reinterpret_cast<A*>(labels + tile_voxels);
    targets = weights + tile_voxels;
    converted = targets + (v.dense ? v.classes * tile_voxels : 0);
    rows = reinterpret_cast<T*>(converted + (v.dense ? v.classes * Lanes<A>::count : 0));
    rest = reinterpret_cast<char*>(rows + v.classes * row_voxels);
  }

  // How many of the `left` voxels the next tile takes: whole blocks. The incomplete last block is a tile of its own.
  int take(int64_t left) const {
    return static_cast<int>(left < kBlock<A> ? left : smaller(left / kBlock<A> * kBlock<A>, tile_voxels));
  }
};

// inner_allowed: the caller can read and write classes that lie side by side in place.
template <typename T>
Tile<T> load_tile(const Volume& v, int64_t sample, int64_t begin, int count, const TileBuffers<T>& buffers,
                  bool inner_allowed, BadInput& bad) {
  Tile<T> tile;
  tile.voxels = count;
  tile.labels = buffers.labels;
  tile.weights = nullptr;
  tile.targets = v.dense ? buffers.targets : nullptr;
  tile.first_label = static_cast<typename TileBuffers<T>::Int>(v.first_label);
  tile.target_stride = buffers.tile_voxels;
  tile.focal_gamma = static_cast<typename Tile<T>::A>(v.focal_gamma);
  tile.masked = false;
  tile.is_inner = false;
  const int padded = tile.padded_voxels();
  tile.bytes = count == padded ? labels_in_place(v, sample, begin, count) : nullptr;
  if (tile.bytes != nullptr) {
    // Nothing needs a conversion.
  } else if (v.dense) {
    load_targets(v, sample, begin, count, buffers.converted, buffers.targets, tile.target_stride, buffers.labels,
                 tile.masked);
  } else {
    load_labels(v, sample, begin, count, buffers.labels, tile.masked, bad);
  }
  if (v.weight.data != nullptr) {
    load_weights(v, sample, begin, count, buffers.weights, buffers.labels, tile.masked, bad);
    tile.weights = buffers.weights;
  }
  for (int i = count; i < padded; ++i) {
    buffers.labels[i] = kUncounted;
    buffers.weights[i] = 0;
    tile.masked = true;
  }
  if (tile.targets != nullptr) {
    for (int64_t c = 0; c < v.classes; ++c) {
      for (int i = count; i < padded; ++i) buffers.targets[c * tile.target_stride + i] = 0;
    }
  }

  // Rows that are only copied.
  T* at = const_cast<T*>(static_cast<const T*>(v.logits.data)) + sample * v.logits.sample_stride +
          begin * v.logits.voxel_stride;
  if (v.logits.voxel_stride == 1 && count == padded) {
    tile.rows = at;
    tile.row_stride = v.logits.class_stride;
    return tile;
  }
  if (inner_allowed && count == padded && is_inner(v, v.logits.class_stride, v.logits.voxel_stride)) {
    tile.rows = at;
    tile.row_stride = 0;
    tile.is_inner = true;
    return tile;
  }
  copy_rows<false>(at, v.logits.class_stride, v.logits.voxel_stride, buffers.rows, buffers.row_voxels, v.classes,
                   count);
  for (int64_t c = 0; c < v.classes; ++c) {
    for (int i = count; i < padded; ++i) buffers.rows[c * buffers.row_voxels + i] = T{};
  }
  tile.rows = buffers.rows;
  tile.row_stride = buffers.row_voxels;
  return tile;
}

}  // namespace
