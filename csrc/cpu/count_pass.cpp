// The count pass on the CPU: logits and target in, tp, fp, fn of every class out. Compiled once per instruction set.
#include "tile.h"

namespace {

enum Count { kTp, kFp, kFn, kCounts };

template <typename T>
using LogitsVector = Vector<Compute<T>>;
template <typename T>
using CountVectors = LogitsVector<T>[kCounts];

// Accumulated in A inside a tile, in double across tiles.
template <typename A>
TK_INLINE void add_to_double(DoubleVector& total, Vector<A> v) {
  if constexpr (sizeof(A) == 8) {
    total += v;
  } else {
    typedef float HalfWidth __attribute__((vector_size(TK_VECTOR_BYTES / 2)));
    HalfWidth parts[2];
    memcpy(parts, &v, sizeof(v));
    total += __builtin_convertvector(parts[0], DoubleVector) + __builtin_convertvector(parts[1], DoubleVector);
  }
}

// Softmax over two classes is a sigmoid of the difference: one exponential, and each class's false positives are the
// other's false negatives.
template <typename T, bool kMasked>
TK_INLINE void count_two_classes(const Tile<T>& tile, int padded, CountVectors<T>* counts) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  V right0{}, right1{}, missed0{}, missed1{};
  for (int i = 0; i < padded; i += Lanes<A>::count) {
    const I label = load<I>(tile.labels + i);
    const V difference = two_class_logit(load_logits(tile.rows + i), load_logits(tile.rows + tile.row_stride + i));
    const I negative = difference < V{};
    const V e = exp_nonpositive<A>(negative ? difference : -difference);
    Probability<V> p = logistic(negative, e, 1 / (1 + e));
    if (tile.weights != nullptr) {
      const V weight = load<V>(tile.weights + i);
      p.p *= weight;
      p.complement *= weight;
    }
    const I is1 = label == 1;
    const I is0 = kMasked ? label == 0 : ~is1;
    right1 += is1 ? p.p : V{};
    missed1 += is1 ? p.complement : V{};
    right0 += is0 ? p.complement : V{};
    missed0 += is0 ? p.p : V{};
  }
  counts[0][kTp] += right0;
  counts[0][kFp] += missed1;
  counts[0][kFn] += missed0;
  counts[1][kTp] += right1;
  counts[1][kFp] += missed0;
  counts[1][kFn] += missed1;
}

// kClasses: the number of classes where it is known when this is compiled, else 0.
template <typename T, int kClasses, int kVectors, bool kMasked>
TK_INLINE void count_softmax_block(const Tile<T>& tile, int at, int runtime_classes, PresentClasses& present,
                                   LogitsVector<T>* exponentials, CountVectors<T>* counts) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  using Int = typename Lanes<A>::Int;
  constexpr int kLanes = Lanes<A>::count;
  constexpr bool kFew = kClasses > 0;
  const int classes = kFew ? kClasses : runtime_classes;
  const T* rows = tile.rows + at;

  V top[kVectors];
  I label[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) {
    top[k] = load_logits(rows + k * kLanes);
    label[k] = load<I>(tile.labels + at + k * kLanes);
  }
#pragma GCC unroll 8
  for (int c = 1; c < classes; ++c) {
    const T* row = rows + c * tile.row_stride;
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      top[k] = maximum(top[k], load_logits(row + k * kLanes));
      if (!kFew) prefetch(row + (kVectors + k) * kLanes);
    }
  }
  if (!kFew) present.set(tile.labels + at, kVectors * kLanes, true);

  SoftmaxSums<V> sums[kVectors];
#pragma GCC unroll 8
  for (int c = 0; c < classes; ++c) {
    const T* row = rows + c * tile.row_stride;
    const bool is_present = kFew || present.has(c);
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const V e = exp_nonpositive<A>(load_logits(row + k * kLanes) - top[k]);
      if (is_present) {
        const I is_target = label[k] == static_cast<Int>(c);
        const I is_other = kMasked ? (label[k] != static_cast<Int>(c)) & (label[k] >= 0) : ~is_target;
        exponentials[c * kVectors + k] = sums[k].add(is_target, is_other, e);
      } else {
        exponentials[c * kVectors + k] = sums[k].add_other(kMasked ? (label[k] >= 0 ? e : V{}) : e);
      }
    }
  }

  V inverse[kVectors], right[kVectors], missed[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) {
    inverse[k] = 1 / (sums[k].target + sums[k].others);
    if (kMasked) inverse[k] = label[k] >= 0 ? inverse[k] : V{};
    if (tile.weights != nullptr) inverse[k] *= load<V>(tile.weights + at + k * kLanes);
    right[k] = sums[k].target * inverse[k];
    missed[k] = sums[k].others * inverse[k];
  }
#pragma GCC unroll 8
  for (int c = 0; c < classes; ++c) {
    V fp = counts[c][kFp];
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) fp += exponentials[c * kVectors + k] * inverse[k];
    counts[c][kFp] = fp;
    if (kFew || present.has(c)) {
      V tp = counts[c][kTp], fn = counts[c][kFn];
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const I is_target = label[k] == static_cast<Int>(c);
        tp += is_target ? right[k] : V{};
        fn += is_target ? missed[k] : V{};
      }
      counts[c][kTp] = tp;
      counts[c][kFn] = fn;
    }
  }
  if (!kFew) present.set(tile.labels + at, kVectors * kLanes, false);
}

template <typename T, int kClasses, bool kMasked>
TK_INLINE void count_softmax(const Tile<T>& tile, int padded, int classes, PresentClasses& present,
                             LogitsVector<T>* exponentials, CountVectors<T>* counts) {
  if constexpr (kClasses == 2) {
    count_two_classes<T, kMasked>(tile, padded, counts);
  } else if constexpr (kClasses > 0) {
    constexpr int kVectors = 1;
    LogitsVector<T> registers[kClasses * kVectors];
    CountVectors<T> sums[kClasses] = {};
    for (int at = 0; at < padded; at += kVectors * Lanes<Compute<T>>::count) {
      count_softmax_block<T, kClasses, kVectors, kMasked>(tile, at, kClasses, present, registers, sums);
    }
    for (int c = 0; c < kClasses; ++c) {
      for (int q = 0; q < kCounts; ++q) counts[c][q] += sums[c][q];
    }
  } else {
    for (int at = 0; at < padded; at += kBlock<Compute<T>>) {
      count_softmax_block<T, 0, kBlockVectors, kMasked>(tile, at, classes, present, exponentials, counts);
    }
  }
}

template <typename T, Activation kActivation>
TK_INLINE void count_channels(const Tile<T>& tile, int padded, int classes, int first_label, CountVectors<T>* counts) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  for (int c = 0; c < classes; ++c) {
    const T* row = tile.rows + c * tile.row_stride;
    V tp{}, fp{}, fn{};
    for (int i = 0; i < padded; i += Lanes<A>::count) {
      const I label = load<I>(tile.labels + i);
      const V z = load_logits(row + i);
      Probability<V> p;
      if constexpr (kActivation == Activation::kSigmoid) {
        const I negative = z < V{};
        const V e = exp_nonpositive<A>(negative ? z : -z);
        p = logistic(negative, e, 1 / (1 + e));
      } else {
        p = {z, 1 - z};
      }
      const I is_target = label == static_cast<typename Lanes<A>::Int>(c + first_label);
      const I is_other = (label >= 0) & ~is_target;
      if (tile.weights != nullptr) {
        const V weight = load<V>(tile.weights + i);
        p.p *= weight;
        p.complement *= weight;
      }
      tp += is_target ? p.p : V{};
      fn += is_target ? p.complement : V{};
      fp += is_other ? p.p : V{};
    }
    counts[c][kTp] += tp;
    counts[c][kFp] += fp;
    counts[c][kFn] += fn;
  }
}

template <typename T, bool kMasked>
TK_INLINE void count_tile(const Volume& v, const Tile<T>& tile, PresentClasses& present, LogitsVector<T>* exponentials,
                          CountVectors<T>* counts) {
  const int padded = tile.padded_voxels();
  const int classes = static_cast<int>(v.classes);
  switch (v.activation) {
    case Activation::kSoftmax:
      switch (classes) {
        case 2: return count_softmax<T, 2, kMasked>(tile, padded, classes, present, exponentials, counts);
        case 3: return count_softmax<T, 3, kMasked>(tile, padded, classes, present, exponentials, counts);
        case 4: return count_softmax<T, 4, kMasked>(tile, padded, classes, present, exponentials, counts);
        default: return count_softmax<T, 0, kMasked>(tile, padded, classes, present, exponentials, counts);
      }
    case Activation::kSigmoid:
      return count_channels<T, Activation::kSigmoid>(tile, padded, classes, static_cast<int>(v.first_label), counts);
    case Activation::kNone:
      return count_channels<T, Activation::kNone>(tile, padded, classes, static_cast<int>(v.first_label), counts);
  }
}

// Scratch: the tile's buffers, exponentials[C][kBlockVectors], tile sums[C][kCounts], totals[C][kCounts], present
// classes.
template <typename T>
int64_t scratch_bytes(const Volume& v) {
  return TileBuffers<T>::bytes(v) + v.classes * (kBlockVectors + kCounts + kCounts) * kVectorBytes +
         PresentClasses::bytes(v.classes);
}

template <typename T>
void count(const Volume& v, int64_t sample, int64_t begin, int64_t end, double* counts, void* scratch, BadInput* bad) {
  using A = Compute<T>;
  const TileBuffers<T> buffers(v, scratch);
  Vector<A>* exponentials = reinterpret_cast<Vector<A>*>(buffers.rest);
  CountVectors<T>* sums = reinterpret_cast<CountVectors<T>*>(exponentials + v.classes * kBlockVectors);
  auto* totals = reinterpret_cast<DoubleVector(*)[kCounts]>(sums + v.classes);
  PresentClasses present(totals + v.classes, v.classes);
  memset(sums, 0, v.classes * sizeof(*sums));
  memset(totals, 0, v.classes * sizeof(*totals));
  int since_flush = 0;
  for (int64_t at = begin; at < end;) {
    const int voxels = static_cast<int>(smaller(buffers.tile_voxels, end - at));
    const Tile<T> tile = load_tile<T>(v, sample, at, voxels, buffers, *bad);
    if (tile.masked) {
      count_tile<T, true>(v, tile, present, exponentials, sums);
    } else {
      count_tile<T, false>(v, tile, present, exponentials, sums);
    }
    at += voxels;
    since_flush += voxels;
    if (since_flush >= kTileVoxels || at >= end) {
      for (int64_t c = 0; c < v.classes; ++c) {
        for (int q = 0; q < kCounts; ++q) {
          add_to_double<A>(totals[c][q], sums[c][q]);
          sums[c][q] = Vector<A>{};
        }
      }
      since_flush = 0;
    }
  }
  for (int64_t c = 0; c < v.classes; ++c) {
    for (int q = 0; q < kCounts; ++q) counts[c * kCounts + q] += horizontal_sum<double>(totals[c][q]);
  }
}

}  // namespace

namespace tversky_kernels {
namespace cpu {

#define TK_JOIN_(a, b) a##_##b
#define TK_JOIN(a, b) TK_JOIN_(a, b)

void TK_JOIN(count_pass, TK_CAPABILITY)(const Volume& v, int64_t sample, int64_t begin, int64_t end, double* counts,
                                        void* scratch, BadInput* bad) {
  switch (v.logits.type) {
    case ElementType::kDouble: return count<double>(v, sample, begin, end, counts, scratch, bad);
    case ElementType::kHalf: return count<Half>(v, sample, begin, end, counts, scratch, bad);
    case ElementType::kBFloat16: return count<BFloat16>(v, sample, begin, end, counts, scratch, bad);
    default: return count<float>(v, sample, begin, end, counts, scratch, bad);
  }
}

int64_t TK_JOIN(count_scratch_bytes, TK_CAPABILITY)(const Volume& v) {
  switch (v.logits.type) {
    case ElementType::kDouble: return scratch_bytes<double>(v);
    case ElementType::kFloat: return scratch_bytes<float>(v);
    default: return scratch_bytes<Half>(v);
  }
}

}  // namespace cpu
}  // namespace tversky_kernels
