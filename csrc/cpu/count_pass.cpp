// The count pass on the CPU: logits and target in, the counts of every class out. Compiled once per instruction set.
#include "general.h"

namespace {

template <typename T>
using LogitsVector = Vector<Compute<T>>;
template <typename T>
using CountVectors = LogitsVector<T>[kAllCounts];  // kVoxels: of class 0 only, but for Volume::sums_label_weights

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
template <typename T, Labels kLabels, CeForm kCeForm, bool kSquared, bool kInner>
TK_INLINE void count_two_classes(const Tile<T>& tile, int padded, CountVectors<T>* counts) {
  constexpr bool kMasked = kLabels == Labels::kSome, kCrossEntropy = kCeForm != CeForm::kNone;
  constexpr bool kFocal = kCeForm == CeForm::kFocal, kSmoothed = kCeForm == CeForm::kSmoothed;
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  V right0{}, right1{}, missed0{}, missed1{}, cross_entropy0{}, cross_entropy1{}, voxels0{}, voxels1{};
  V smoothing0{}, smoothing1{};
  const bool weighted = tile.weights != nullptr;
  // Without weights the logarithms are summed as one of a product: 1 + product is that of all 1 + e, each at most 2.
  // Kept as the product less 1, it keeps its relative accuracy where all e are small.
  V product0{}, product1{};
  const auto take_logarithms = [&]() __attribute__((always_inline)) {
    const V of_label0 = log1p<A>(product0), of_label1 = log1p<A>(product1);
    cross_entropy0 += of_label0;
    cross_entropy1 += of_label1;
    if constexpr (kSmoothed) {
      smoothing0 += of_label0 + of_label1;
      smoothing1 += of_label0 + of_label1;
    }
    product0 = product1 = V{};
  };
  constexpr int kFactors = 64;
  int factors = 0;
  for (int i = 0; i < padded; i += Lanes<A>::count) {
    const I label = tile.template label<kLabels>(i);
    V z[2];
    load_classes<2, kInner>(tile, i, z);
    const V difference = two_class_logit(z[0], z[1], z[0] > z[1] ? z[0] : z[1]);
    const V e = exp_nonpositive<A>(negative_magnitude<A>(difference));
    const Probability<V> p = logistic(difference < V{}, e, reciprocal<A>(1 + e));  // of class 1
    V right_if1 = p.p, right_if0 = p.complement;
    V missed_if1 = error_of<kSquared>(p.complement), missed_if0 = error_of<kSquared>(p.p);
    const I is1 = label == 1;
    const I is0 = kMasked ? label == 0 : ~is1;
    V cross_entropy = maximum(V{}, is1 ? -difference : difference);  // and log(1 + e)
    if constexpr (kFocal) {
      const V factor = focal_factor(is1 ? p.complement : p.p, tile.focal_gamma, FocalPower{});
      cross_entropy = (cross_entropy + log1p_of_fraction<A>(e)) * factor;
    }
    // -log p of class 0 and of class 1, but for log(1 + e)
    V minus_log0 = maximum(V{}, difference), minus_log1 = maximum(V{}, -difference);
    if (weighted) {
      const V weight = load<V>(tile.weights + i);
      right_if1 *= weight;
      right_if0 *= weight;
      missed_if1 *= weight;
      missed_if0 *= weight;
      if constexpr (kCrossEntropy) {
        const V logarithm = kFocal ? V{} : log1p_of_fraction<A>(e);
        cross_entropy = (cross_entropy + logarithm) * weight;
        minus_log0 = (minus_log0 + logarithm) * weight;
        minus_log1 = (minus_log1 + logarithm) * weight;
        add_where(is1, voxels1, weight);
        add_where(is0, voxels0, weight);
      }
    } else if constexpr (kCrossEntropy) {
      if (kMasked || kSquared) {
        add_where(is1, voxels1, broadcast<A>(1));
        add_where(is0, voxels0, broadcast<A>(1));
      }
      if constexpr (!kFocal) {
        product1 = is1 ? product1 + e * (1 + product1) : product1;
        product0 = is0 ? product0 + e * (1 + product0) : product0;
        if (++factors % kFactors == 0) take_logarithms();
      }
    }
    add_where(is1, right1, right_if1);
    add_where(is1, missed1, missed_if1);
    add_where(is0, right0, right_if0);
    add_where(is0, missed0, missed_if0);
    if constexpr (kCrossEntropy) {
      add_where(is1, cross_entropy1, cross_entropy);
      add_where(is0, cross_entropy0, cross_entropy);
    }
    if constexpr (kSmoothed) {
      smoothing0 += !kMasked || label >= 0 ? minus_log0 : V{};
      smoothing1 += !kMasked || label >= 0 ? minus_log1 : V{};
    }
  }
  if (kCrossEntropy && !kFocal) take_logarithms();
  if (!kMasked && !kSquared && !weighted) voxels0 = broadcast<A>(static_cast<A>(padded / Lanes<A>::count));
  counts[0][kTp] += right0;
  counts[0][kFp] += missed1;
  counts[0][kFn] += missed0;
  counts[1][kTp] += right1;
  counts[1][kFp] += missed0;
  counts[1][kFn] += missed1;
  if constexpr (kCrossEntropy) {
    counts[0][kCe] += cross_entropy0;
    counts[1][kCe] += cross_entropy1;
    if constexpr (kSmoothed) {
      counts[0][kSmoothing] += smoothing0;
      counts[1][kSmoothing] += smoothing1;
    }
    counts[0][kVoxels] += kSquared ? voxels0 : voxels0 + voxels1;
    if (kSquared) counts[1][kVoxels] += voxels1;
  }
}

// From the logits of kVectors vectors of voxels and their maxima; exponentials take the logits' place. kClasses: the
// number of classes where it is known when this is compiled, else 0. read_next(c) is called for every class on the way.
template <typename T, int kClasses, int kVectors, Labels kLabels, CeForm kCeForm, bool kSquared, typename Next>
TK_INLINE void count_softmax_block(const Tile<T>& tile, int at, int runtime_classes, PresentClasses& present,
                                   LogitsVector<T>* logits, const LogitsVector<T>* top, const Next& read_next,
                                   CountVectors<T>* counts) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  using Int = typename Lanes<A>::Int;
  constexpr int kLanes = Lanes<A>::count;
  constexpr bool kFew = kClasses > 0, kMasked = kLabels == Labels::kSome, kCrossEntropy = kCeForm != CeForm::kNone;
  constexpr bool kFocal = kCeForm == CeForm::kFocal, kSmoothed = kCeForm == CeForm::kSmoothed;
  const int classes = kFew ? kClasses : runtime_classes;
  V* const exponentials = logits;

  I label[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) label[k] = tile.template label<kLabels>(at + k * kLanes);
  if (!kFew) present.set(tile.labels + at, kVectors * kLanes, true);

  const auto weight_of = [&](int k) __attribute__((always_inline)) {
    return tile.weights != nullptr ? load<V>(tile.weights + at + k * kLanes) : broadcast<A>(1);
  };
  SoftmaxSums<V> sums[kVectors];
  V below_top[kVectors] = {};  // z_top - z_t
  // kPresent: class c is the label of some voxel here.
  const auto add_class = [&](int c, auto is_present) __attribute__((always_inline)) {
    constexpr bool kPresent = decltype(is_present)::value;
    V smoothing = kSmoothed ? counts[c][kSmoothing] : V{};  // log(sum of exponentials) comes later
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const V difference = logits[c * kVectors + k] - top[k];
      const V e = exp_nonpositive<A>(difference);
      if (kSmoothed) smoothing -= !kMasked || label[k] >= 0 ? difference * weight_of(k) : V{};
      if constexpr (kPresent) {
        const I is_target = label[k] == static_cast<Int>(c);
        if (kCrossEntropy) below_top[k] = is_target ? -difference : below_top[k];
        const I is_other = kMasked ? (label[k] != static_cast<Int>(c)) & (label[k] >= 0) : ~is_target;
        exponentials[c * kVectors + k] = sums[k].add(is_target, is_other, e);
      } else {
        exponentials[c * kVectors + k] = sums[k].add_other(kMasked ? (label[k] >= 0 ? e : V{}) : e);
      }
    }
    if (kSmoothed) counts[c][kSmoothing] = smoothing;
  };
  for_each_class<kFew>(classes, present, read_next, add_class);

  V inverse[kVectors], weighted[kVectors], right[kVectors], missed[kVectors], cross_entropy[kVectors], weight[kVectors];
  V log_sums{};  // of all vectors, weighted
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) {
    inverse[k] = reciprocal<A>(sums[k].target + sums[k].others);
    if (kMasked) inverse[k] = label[k] >= 0 ? inverse[k] : V{};
    weight[k] = weight_of(k);
    weighted[k] = tile.weights != nullptr ? inverse[k] * weight[k] : inverse[k];
    right[k] = sums[k].target * weighted[k];
    missed[k] = sums[k].others * weighted[k];
    if (kSquared) missed[k] *= sums[k].others * inverse[k];
    if constexpr (kCrossEntropy) {
      const V beyond_one = exponentials_beyond_one(sums[k]);
      const V log_sum = kFew ? log1p_to_three<A>(beyond_one) : log1p<A>(beyond_one);
      cross_entropy[k] = below_top[k] + log_sum;
      if (kFocal) cross_entropy[k] *= focal_factor(sums[k].others * inverse[k], tile.focal_gamma, FocalPower{});
      if (kSmoothed) log_sums += !kMasked || label[k] >= 0 ? log_sum * weight[k] : V{};
      if (tile.weights != nullptr) cross_entropy[k] *= weight[k];
      if (!kSquared) counts[0][kVoxels] += kMasked ? (label[k] >= 0 ? weight[k] : V{}) : weight[k];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < classes; ++c) {
    V fp = counts[c][kFp];
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const V e = exponentials[c * kVectors + k];
      fp += kSquared ? (e * inverse[k]) * (e * weighted[k]) : e * weighted[k];
    }
    counts[c][kFp] = fp;
    if (kSmoothed) counts[c][kSmoothing] += log_sums;
    if (kFew || present.has(c)) {
      V tp = counts[c][kTp], fn = counts[c][kFn], ce = counts[c][kCe], voxels = counts[c][kVoxels];
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const I is_target = label[k] == static_cast<Int>(c);
        add_where(is_target, tp, right[k]);
        add_where(is_target, fn, missed[k]);
        if (kCrossEntropy) add_where(is_target, ce, cross_entropy[k]);
        if (kCrossEntropy && kSquared) add_where(is_target, voxels, weight[k]);
      }
      counts[c][kTp] = tp;
      counts[c][kFn] = fn;
      if (kCrossEntropy) counts[c][kCe] = ce;
      if (kCrossEntropy && kSquared) counts[c][kVoxels] = voxels;
    }
  }
  if (!kFew) present.set(tile.labels + at, kVectors * kLanes, false);
}

template <typename T, int kClasses, Labels kLabels, CeForm kCeForm, bool kSquared, bool kInner>
TK_INLINE void count_softmax(const Tile<T>& tile, int padded, int classes, PresentClasses& present,
                             LogitsVector<T>* scratch, CountVectors<T>* counts) {
  if constexpr (kClasses == 2) {
    count_two_classes<T, kLabels, kCeForm, kSquared, kInner>(tile, padded, counts);
  } else if constexpr (kClasses > 0) {
    LogitsVector<T> logits[kClasses];
    CountVectors<T> sums[kClasses] = {};
    for (int at = 0; at < padded; at += Lanes<Compute<T>>::count) {
      const LogitsVector<T> top = load_classes_and_top<kClasses, kInner>(tile, at, logits);
      count_softmax_block<T, kClasses, 1, kLabels, kCeForm, kSquared>(
          tile, at, kClasses, present, logits, &top, [](int) __attribute__((always_inline)) {}, sums);
    }
    for (int c = 0; c < kClasses; ++c) {
      for (int q = 0; q < (kCeForm != CeForm::kNone ? kAllCounts : kOverlapCounts); ++q) {
        counts[c][q] += sums[c][q];
      }
    }
  } else {
    for_each_block<kInner>(tile, padded, classes, scratch,
                           [&](int at, LogitsVector<T>* logits, const LogitsVector<T>* top, const auto& read_next)
                               __attribute__((always_inline)) {
                                 count_softmax_block<T, 0, kBlockVectors, kLabels, kCeForm, kSquared>(
                                     tile, at, classes, present, logits, top, read_next, counts);
                               });
  }
}

// Every channel by itself. kPresent: the channel's label occurs in the tile.
template <typename T, Activation kActivation, bool kPresent>
TK_INLINE void count_channel(const Tile<T>& tile, int padded, int c, int classes, int first_label,
                             LogitsVector<T>* counts) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  const T* row = tile.rows + c * tile.row_stride;
  const T* next = next_channel(tile, c, classes);
  V tp = counts[kTp], fp = counts[kFp], fn = counts[kFn];
  for (int i = 0; i < padded; i += Lanes<A>::count) {
    prefetch(next + i);
    const I label = load<I>(tile.labels + i);
    const V z = load_logits(row + i);
    Probability<V> p{z, 1 - z};
    if constexpr (kActivation == Activation::kSigmoid) {
      const I negative = z < V{};
      const V e = exp_nonpositive<A>(negative_magnitude<A>(z));
      p = logistic(negative, e, reciprocal<A>(1 + e));
    }
    if (tile.weights != nullptr) {
      const V weight = load<V>(tile.weights + i);
      p.p *= weight;
      p.complement *= weight;
    }
    const I is_target = label == static_cast<typename Lanes<A>::Int>(c + first_label);
    const I is_other = kPresent ? (label >= 0) & ~is_target : label >= 0;
    fp += is_other ? p.p : V{};
    if constexpr (kPresent) {
      tp += is_target ? p.p : V{};
      fn += is_target ? p.complement : V{};
    }
  }
  counts[kTp] = tp;
  counts[kFp] = fp;
  counts[kFn] = fn;
}

template <typename T, Activation kActivation>
void count_channels(const Tile<T>& tile, int padded, int classes, int first_label, PresentClasses& present,
                    CountVectors<T>* counts) {
  const bool few = classes < kFewChannels;
  if (!few) present.set(tile.labels, padded, true);
  for (int c = 0; c < classes; ++c) {
    if (few || present.has(c + first_label)) {
      count_channel<T, kActivation, true>(tile, padded, c, classes, first_label, counts[c]);
    } else {
      count_channel<T, kActivation, false>(tile, padded, c, classes, first_label, counts[c]);
    }
  }
  if (!few) present.set(tile.labels, padded, false);
}

template <typename T, int kClasses, Labels kLabels, CeForm kCeForm, bool kSquared>
void count_softmax_of(const Tile<T>& tile, int classes, PresentClasses& present, LogitsVector<T>* scratch,
                      CountVectors<T>* counts) {
  const int padded = tile.padded_voxels();
  if constexpr (!kSquared && (kCeForm == CeForm::kNone || kCeForm == CeForm::kPlain)) {
    if (tile.is_inner) {
      return count_softmax<T, kClasses, kLabels, kCeForm, kSquared, true>(tile, padded, classes, present, scratch,
                                                                          counts);
    }
  }
  count_softmax<T, kClasses, kLabels, kCeForm, kSquared, false>(tile, padded, classes, present, scratch, counts);
}

template <typename T, Labels kLabels, CeForm kCeForm, bool kSquared>
void count_softmax_tile(const Tile<T>& tile, int classes, PresentClasses& present, LogitsVector<T>* scratch,
                        CountVectors<T>* counts) {
  static_assert(kFewClasses == 4, "as here");
  switch (classes) {
    case 2: return count_softmax_of<T, 2, kLabels, kCeForm, kSquared>(tile, 2, present, scratch, counts);
    case 3: return count_softmax_of<T, 3, kLabels, kCeForm, kSquared>(tile, 3, present, scratch, counts);
    case 4: return count_softmax_of<T, 4, kLabels, kCeForm, kSquared>(tile, 4, present, scratch, counts);
    default:
      if constexpr (kLabels != Labels::kBytes) {
        count_softmax_of<T, 0, kLabels, kCeForm, kSquared>(tile, classes, present, scratch, counts);
      }
  }
}

// ---- A target of its own for every class: dense, or class indices as one-hot rows

template <typename A, OverlapForm kForm>
TK_INLINE void add_overlap(Probability<Vector<A>> p, Vector<A> g, bool weighted, Vector<A> weight, Vector<A>& tp,
                           Vector<A>& fp, Vector<A>& fn) {
  if (kForm != OverlapForm::kProduct) {
    const Overlap<Vector<A>> overlap = overlap_of(p, g, kForm);
    tp += overlap.tp * weight;
    fp += overlap.fp * weight;
    fn += overlap.fn * weight;
    return;
  }
  if (weighted) {
    p.p *= weight;
    p.complement *= weight;
  }
  if (!any(g != 0)) {  // most classes are nowhere in a block
    fp += p.p;
    return;
  }
  const Overlap<Vector<A>> overlap = overlap_of(p, g, kForm);
  tp += overlap.tp;
  fp += overlap.fp;
  fn += overlap.fn;
}

// The sums of one class. They go on from what there is, so that a sum does not depend on how many voxels a tile has.
template <typename A, bool kCrossEntropy>
struct GeneralSums {
  Vector<A> tp, fp, fn, ce{}, smoothing{};
  TK_INLINE explicit GeneralSums(const Vector<A>* counts) : tp(counts[kTp]), fp(counts[kFp]), fn(counts[kFn]) {
    if (!kCrossEntropy) return;
    ce = counts[kCe];
    smoothing = counts[kSmoothing];
  }
  TK_INLINE void store(Vector<A>* counts) const {
    counts[kTp] = tp;
    counts[kFp] = fp;
    counts[kFn] = fn;
    if (!kCrossEntropy) return;
    counts[kCe] = ce;
    counts[kSmoothing] = smoothing;
  }
};

// Whether the values of a dense target are in [0, 1]: their bits, as unsigned integers, are then not above those of 1.
// (Those of -0 are, which find_bad_target knows.)
template <typename A>
struct TargetCheck {
  typedef std::make_unsigned_t<typename Lanes<A>::Int> Bits __attribute__((vector_size(TK_VECTOR_BYTES)));
  Bits largest{};
  TK_INLINE void see(Vector<A> g) {
    const Bits bits = (Bits)g;
    largest = bits > largest ? bits : largest;
  }
  TK_INLINE bool failed(const Volume& v) const {
    return v.checks_targets && any((IntVector<A>)(largest > (Bits)broadcast<A>(1)));
  }
};

// Returns whether a target is outside [0, 1].
template <typename T, OverlapForm kForm, bool kCrossEntropy>
bool count_general_softmax(const Volume& v, const Tile<T>& tile, LogitsVector<T>* scratch, CountVectors<T>* counts) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  constexpr int kLanes = Lanes<A>::count;
  const int classes = static_cast<int>(v.classes);
  const bool smoothed = v.cross_entropy == CrossEntropy::kSmoothed;
  const bool label_weights = kForm == OverlapForm::kSquared && kCrossEntropy && v.sums_label_weights();
  V* const exponentials = scratch + classes * kGeneralVectors;
  TargetCheck<A> check;
  for (int at = 0; at < tile.padded_voxels(); at += kGeneralVectors * kLanes) {
    const GeneralSoftmax<T> softmax(tile, at, classes, scratch, exponentials);
    V log_sum[kGeneralVectors];
    for (int k = 0; k < kGeneralVectors; ++k) {
      if (kCrossEntropy) log_sum[k] = log1p<A>(softmax.beyond_one[k]);
      if (kCrossEntropy && !label_weights) counts[0][kVoxels] += softmax.weight[k];
    }
    for (int c = 0; c < classes; ++c) {
      GeneralSums<A, kCrossEntropy> sums(counts[c]);
#pragma GCC unroll 2
      for (int k = 0; k < kGeneralVectors; ++k) {
        const V below_top = scratch[c * kGeneralVectors + k];
        const Probability<V> p = softmax.probability(k, below_top, exponentials[c * kGeneralVectors + k]);
        const V g = general_target(tile, c, at + k * kLanes);
        check.see(g);
        const V weight = softmax.weight[k];
        add_overlap<A, kForm>(p, g, softmax.weighted, weight, sums.tp, sums.fp, sums.fn);
        if (label_weights) counts[c][kVoxels] += g * weight;
        if constexpr (kCrossEntropy) {
          V term = below_top + log_sum[k];
          if (v.focal_gamma != 0) term *= focal_factor(p.complement, static_cast<A>(v.focal_gamma), FocalPower{});
          term *= weight;
          const I wanted = g != 0;  // without it the term may be infinite
          sums.ce += wanted ? g * term : V{};
          if (smoothed) sums.smoothing += term;
        }
      }
      sums.store(counts[c]);
    }
  }
  return check.failed(v);
}

template <typename T, Activation kActivation, OverlapForm kForm, bool kCrossEntropy>
bool count_general_channels(const Volume& v, const Tile<T>& tile, CountVectors<T>* counts) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  const bool smoothed = v.cross_entropy == CrossEntropy::kSmoothed, weighted = is_weighted(tile);
  TargetCheck<A> check;
  for (int c = 0; c < v.classes; ++c) {
    GeneralSums<A, kCrossEntropy> sums(counts[c]);
    const T* next = next_channel(tile, c, static_cast<int>(v.classes));
    for (int i = 0; i < tile.padded_voxels(); i += Lanes<A>::count) {
      prefetch(next + i);
      const V z = general_logit(tile, c, i), g = general_target(tile, c, i), weight = general_weight(tile, i);
      check.see(g);
      Probability<V> p{z, 1 - z};
      V e{};
      if constexpr (kActivation == Activation::kSigmoid) {
        const I negative = z < 0;
        e = exp_nonpositive<A>(negative_magnitude<A>(z));
        p = logistic(negative, e, reciprocal<A>(1 + e));
      }
      add_overlap<A, kForm>(p, g, weighted, weight, sums.tp, sums.fp, sums.fn);
      if constexpr (kCrossEntropy) {
        if (c == 0) counts[0][kVoxels] += weight;
        const V common = log1p_of_fraction<A>(e);
        const I is_one = g == 1;
        if (!smoothed && is_hard<A>(g, is_one)) {
          V term = common + maximum(V{}, is_one ? -z : z);
          if (v.focal_gamma != 0) {
            term *= focal_factor(of_outcome(is_one, p).complement, static_cast<A>(v.focal_gamma), FocalPower{});
          }
          sums.ce += term * weight;
          continue;
        }
        V of_one = common + (z < 0 ? -z : V{}), of_zero = common + (z > 0 ? z : V{});
        if (v.focal_gamma != 0) {
          of_one *= focal_factor(p.complement, static_cast<A>(v.focal_gamma), FocalPower{});
          of_zero *= focal_factor(p.p, static_cast<A>(v.focal_gamma), FocalPower{});
        }
        of_one *= weight;
        of_zero *= weight;
        const I some = g != 0, not_all = ~is_one;
        sums.ce += (some ? g * of_one : V{}) + (not_all ? (1 - g) * of_zero : V{});
        if (smoothed) sums.smoothing += of_one + of_zero;
      }
    }
    sums.store(counts[c]);
  }
  return check.failed(v);
}

// The first of the tile's targets that is outside [0, 1].
template <typename T>
__attribute__((noinline, cold)) void find_bad_target(const Volume& v, const Tile<T>& tile, BadInput& bad) {
  for (int i = 0; !bad.target && i < tile.voxels; ++i) {
    for (int64_t c = 0; tile.labels[i] >= 0 && c < v.classes; ++c) {
      const double g = static_cast<double>(tile.targets[c * tile.target_stride + i]);
      if (g >= 0 && g <= 1) continue;
      bad.target = true;
      bad.target_value = g;
      break;
    }
  }
}

template <typename T>
void count_general(const Volume& v, const Tile<T>& tile, LogitsVector<T>* scratch, CountVectors<T>* counts,
                   BadInput& bad) {
  bool outside = false;
  with_general_options(v, [&](auto activation, auto form, auto cross_entropy) {
    constexpr Activation kActivation = decltype(activation)::value;
    constexpr OverlapForm kForm = decltype(form)::value;
    constexpr bool kCrossEntropy = decltype(cross_entropy)::value;
    if constexpr (kActivation == Activation::kSoftmax) {
      outside = count_general_softmax<T, kForm, kCrossEntropy>(v, tile, scratch, counts);
    } else {
      outside = count_general_channels<T, kActivation, kForm, kCrossEntropy>(v, tile, counts);
    }
  });
  if (outside) find_bad_target(v, tile, bad);
}

template <typename T>
void count_tile(const Volume& v, const Tile<T>& tile, PresentClasses& present, LogitsVector<T>* exponentials,
                CountVectors<T>* counts, BadInput& bad) {
  const int padded = tile.padded_voxels();
  const int classes = static_cast<int>(v.classes), first_label = static_cast<int>(v.first_label);
  if (takes_general_kernels(v)) return count_general(v, tile, exponentials, counts, bad);
  switch (v.activation) {
    case Activation::kSoftmax:
      return with_softmax_options(v, tile, [&](auto labels, auto cross_entropy, auto squared) {
        count_softmax_tile<T, decltype(labels)::value, decltype(cross_entropy)::value, decltype(squared)::value>(
            tile, classes, present, exponentials, counts);
      });
    case Activation::kSigmoid:
      return count_channels<T, Activation::kSigmoid>(tile, padded, classes, first_label, present, counts);
    case Activation::kNone:
      return count_channels<T, Activation::kNone>(tile, padded, classes, first_label, present, counts);
  }
}

constexpr int kScratchVectors = larger(2 * kBlockVectors, 2 * kGeneralVectors);  // of a class: two blocks' logits

// Scratch: the tile's buffers, kScratchVectors a class, tile sums[C][kAllCounts], totals[C][kAllCounts], present
// classes.
template <typename T>
int64_t scratch_bytes(const Volume& v) {
  return TileBuffers<T>::bytes(v) + v.classes * (kScratchVectors + kAllCounts + kAllCounts) * kVectorBytes +
         PresentClasses::bytes(v.classes);
}

template <typename T>
void count(const Volume& v, int64_t sample, int64_t begin, int64_t end, double* counts, void* scratch, BadInput* bad) {
  using A = Compute<T>;
  const TileBuffers<T> buffers(v, scratch);
  const int columns = v.count_columns();
  Vector<A>* block = reinterpret_cast<Vector<A>*>(buffers.rest);
  CountVectors<T>* sums = reinterpret_cast<CountVectors<T>*>(block + v.classes * kScratchVectors);
  auto* totals = reinterpret_cast<DoubleVector(*)[kAllCounts]>(sums + v.classes);
  PresentClasses present(totals + v.classes, v.classes);
  memset(sums, 0, v.classes * sizeof(*sums));
  memset(totals, 0, v.classes * sizeof(*totals));
  int since_flush = 0;
  for (int64_t at = begin; at < end;) {
    const int voxels = buffers.take(end - at);
    count_tile(v, load_tile<T>(v, sample, at, voxels, buffers, true, *bad), present, block, sums, *bad);
    at += voxels;
    since_flush += voxels;
    if (since_flush >= kTileVoxels || at >= end) {
      for (int64_t c = 0; c < v.classes; ++c) {
        for (int q = 0; q < columns; ++q) {
          add_to_double<A>(totals[c][q], sums[c][q]);
          sums[c][q] = Vector<A>{};
        }
      }
      since_flush = 0;
    }
  }
  for (int64_t c = 0; c < v.classes; ++c) {
    for (int q = 0; q < columns; ++q) {
      const bool of_all = q == kVoxels && !v.sums_label_weights();
      counts[c * columns + q] += horizontal_sum<double>(totals[of_all ? 0 : c][q]);
    }
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
