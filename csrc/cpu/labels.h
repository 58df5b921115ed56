// The family "labels": a softmax, and a label as the target. Two classes are a sigmoid of their difference. Up to four
// classes stay in registers. More go in blocks of 64 voxels, which are copied so that the classes of a block lie side
// by side (tile.h).
#pragma once

#include "passes.h"

namespace {

// The softmax over two classes is a sigmoid of their difference: one exponential, and the false positives of each class
// are the other's false negatives.
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
  // Without weights the sum of logarithms is the logarithm of a product. 1 + product is the product of all 1 + e, each
  // at most 2. The product less 1 is kept: it keeps its relative accuracy where all e are small.
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
    // -log p of class 0 and of class 1, without the common log(1 + e)
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

// From the logits of kVectors vectors of voxels and their maxima. The exponentials overwrite the logits. kClasses: the
// number of classes where the compiler knows it, else 0. Calls read_next(c) for every class on the way.
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

template <typename T, Labels kLabels, CeForm kCeForm, bool kSquared, bool kInner, typename U>
TK_INLINE void two_classes_gradient(const Tile<T>& tile, int padded, const U* u, const GradientRows<T>& out) {
  constexpr bool kMasked = kLabels == Labels::kSome, kCrossEntropy = kCeForm != CeForm::kNone;
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  const U* u1 = u + kCoefficients<kCrossEntropy>;
  const U difference0 = u1[kBackground] - u[kForeground];  // u_1 - u_0 where the label is 0
  const U difference1 = u1[kForeground] - u[kBackground];  // where it is 1
  // The same for squares, at the label: u_label - u_other = u_foreground - 2 p_other (both u_background).
  const U backgrounds = u[kBackground] + u1[kBackground];
  for (int i = 0; i < padded; i += Lanes<A>::count) {
    const I label = tile.template label<kLabels>(i);
    V z[2];
    load_classes<2, kInner>(tile, i, z);
    const V d = two_class_logit(z[0], z[1], z[0] > z[1] ? z[0] : z[1]);
    const V e = exp_nonpositive<A>(negative_magnitude<A>(d));
    const V inverse = reciprocal<A>(1 + e);
    const I is1 = label == 1;
    const V margin = is1 ? d : -d;
    const V p_other = margin < V{} ? inverse : e * inverse;
    V difference = is1 ? spread<A>(difference1) : spread<A>(difference0);
    if constexpr (kSquared) {
      const V foreground = is1 ? spread<A>(u1[kForeground]) : spread<A>(u[kForeground]);
      const V of_label = squared_slope_of_target(p_other, spread<A>(backgrounds), foreground);
      difference = is1 ? of_label : -of_label;
    }
    V dz1 = logistic_gradient(e, inverse, difference);
    if constexpr (kCeForm == CeForm::kSmoothed) {  // p_1 b_0 - p_0 b_1
      const V p_label = margin < V{} ? e * inverse : inverse;
      const V of_label = is1 ? spread<A>(-u1[kCeCoefficient] - u1[kSmoothingCoefficient])
                             : spread<A>(u[kCeCoefficient] + u[kSmoothingCoefficient]);
      const V of_other = is1 ? spread<A>(-u[kSmoothingCoefficient]) : spread<A>(u1[kSmoothingCoefficient]);
      dz1 += of_label * p_other - of_other * p_label;
    } else if constexpr (kCrossEntropy) {  // k_0 p_1 where the label is 0, -k_1 p_0 where it is 1
      V k = is1 ? spread<A>(-u1[kCeCoefficient]) : spread<A>(u[kCeCoefficient]);
      if constexpr (kCeForm == CeForm::kFocal) {
        const V minus_log_p = log1p_of_fraction<A>(e) + maximum(V{}, -margin);
        const Probability<V> p{margin < V{} ? e * inverse : inverse, p_other};
        k *= focal_slope(p, minus_log_p, tile.focal_gamma, FocalPower{});
      }
      dz1 += k * p_other;
    }
    if (tile.weights != nullptr) dz1 *= load<V>(tile.weights + i);
    if (kMasked) dz1 = label >= 0 ? dz1 : V{};
    V dz[2] = {-dz1, dz1};
    store_classes<2, kInner>(out.rows, out.row_stride, i, dz, out.streamed);
  }
}

// As count_softmax_block. s_all: the sum of all classes' dL/dsmoothing. store_dz(c, k, dz) gets the gradient of class c
// in the k-th vector.
template <typename T, int kClasses, int kVectors, Labels kLabels, CeForm kCeForm, bool kSquared, typename U,
          typename Next, typename Store>
TK_INLINE void softmax_gradient_block(const Tile<T>& tile, int at, int runtime_classes, const U* u, U s_all,
                                      PresentClasses& present, Vector<Compute<T>>* logits,
                                      const Vector<Compute<T>>* top, const Next& read_next, const Store& store_dz) {
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

  SoftmaxSums<V> sums[kVectors];
  V weighted_others[kVectors] = {}, u_target[kVectors] = {}, k_target[kVectors] = {};
  V u_background[kVectors] = {}, s_target[kVectors] = {};  // the target's
  // kPresent: class c is the label of some voxel here.
  const auto add_class = [&](int c, auto is_present) __attribute__((always_inline)) {
    constexpr bool kPresent = decltype(is_present)::value;
    const U* of_class = u + c * kCoefficients<kCrossEntropy>;
    const V background = spread<A>(of_class[kBackground]);
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const V e = exp_nonpositive<A>(logits[c * kVectors + k] - top[k]);
      V other;
      if constexpr (kPresent) {
        const I is_target = label[k] == static_cast<Int>(c);
        const I is_other = kMasked ? (label[k] != static_cast<Int>(c)) & (label[k] >= 0) : ~is_target;
        other = sums[k].add(is_target, is_other, e);
        u_target[k] = is_target ? spread<A>(of_class[kForeground]) : u_target[k];
        if (kSquared) u_background[k] = is_target ? background : u_background[k];
        if (kCrossEntropy) k_target[k] = is_target ? spread<A>(of_class[kCeCoefficient]) : k_target[k];
        if (kSmoothed) s_target[k] = is_target ? spread<A>(of_class[kSmoothingCoefficient]) : s_target[k];
      } else {
        other = sums[k].add_other(kMasked ? (label[k] >= 0 ? e : V{}) : e);
      }
      weighted_others[k] += other * slope_of_other<kSquared>(other, background);
      exponentials[c * kVectors + k] = other;
    }
  };
  for_each_class<kFew>(classes, present, read_next, add_class);

  SoftmaxGradient<V> gradient[kVectors];
  V inverse[kVectors], weight[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) {
    inverse[k] = reciprocal<A>(sums[k].target + sums[k].others);
    if (kMasked) inverse[k] = label[k] >= 0 ? inverse[k] : V{};
    weight[k] = tile.weights != nullptr ? load<V>(tile.weights + at + k * kLanes) : broadcast<A>(1);
    if (kMasked && kSmoothed) weight[k] = label[k] >= 0 ? weight[k] : V{};
    if constexpr (kSquared) {
      weighted_others[k] *= inverse[k];  // the slopes were made of exponentials
      u_target[k] = squared_slope_of_target(sums[k].others * inverse[k], u_background[k], u_target[k]);
    }
    gradient[k] = softmax_gradient(sums[k], weighted_others[k], u_target[k], inverse[k], weight[k]);
    if constexpr (kFocal) {
      const Probability<V> p{sums[k].target * inverse[k], sums[k].others * inverse[k]};
      const V safe_target = exponential_for_focal_slope(sums[k].target);
      const V minus_log_p = log1p<A>(sums[k].others * reciprocal<A>(safe_target));  // see focal_slope
      k_target[k] *= focal_slope(p, minus_log_p, tile.focal_gamma, FocalPower{});
    }
    if constexpr (kSmoothed) {
      gradient[k].add_smoothed_cross_entropy(sums[k], k_target[k], s_target[k], spread<A>(s_all));
    } else if constexpr (kCrossEntropy) {
      gradient[k].add_cross_entropy(sums[k], k_target[k]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < classes; ++c) {
    const V background = spread<A>(u[c * kCoefficients<kCrossEntropy> + kBackground]);
    const U smoothing = kSmoothed ? u[c * kCoefficients<kCrossEntropy> + kSmoothingCoefficient] : U{};
    const bool is_present = kFew || present.has(c);
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const V e = exponentials[c * kVectors + k];
      V dz = gradient[k].other(e, slope_of_other<kSquared>(e * inverse[k], background));
      if (kSmoothed) dz -= smoothing * weight[k];
      if (is_present) dz = label[k] == static_cast<Int>(c) ? gradient[k].at_target : dz;
      store_dz(c, k, dz);
    }
  }
  if (!kFew) present.set(tile.labels + at, kVectors * kLanes, false);
}

template <typename T, int kClasses, Labels kLabels, CeForm kCeForm, bool kSquared, bool kInner, typename U>
TK_INLINE void softmax_gradient_rows(const Tile<T>& tile, int padded, int classes, const U* u, PresentClasses& present,
                                     Vector<Compute<T>>* scratch, const GradientRows<T>& out) {
  using V = Vector<Compute<T>>;
  constexpr int kLanes = Lanes<Compute<T>>::count;
  const U s_all = kCeForm == CeForm::kSmoothed ? sum_of_smoothing<Compute<T>>(u, classes) : U{};
  if constexpr (kClasses == 2) {
    two_classes_gradient<T, kLabels, kCeForm, kSquared, kInner>(tile, padded, u, out);
  } else if constexpr (kClasses > 0) {
    V logits[kClasses];
    for (int at = 0; at < padded; at += kLanes) {
      const V top = load_classes_and_top<kClasses, kInner>(tile, at, logits);
      V dz[kClasses];
      softmax_gradient_block<T, kClasses, 1, kLabels, kCeForm, kSquared>(
          tile, at, kClasses, u, s_all, present, logits, &top, [](int) __attribute__((always_inline)) {},
          [&](int c, int, V value) __attribute__((always_inline)) { dz[c] = value; });
      store_classes<kClasses, kInner>(out.rows, out.row_stride, at, dz, out.streamed);
    }
  } else {
    // for_each_block uses only the first half of the scratch here.
    [[maybe_unused]] T* const block_rows = reinterpret_cast<T*>(scratch + classes * kBlockVectors);
    for_each_block<kInner>(tile, padded, classes, scratch,
                           [&](int at, V* logits, const V* top, const auto& read_next) __attribute__((always_inline)) {
                             softmax_gradient_block<T, 0, kBlockVectors, kLabels, kCeForm, kSquared>(
                                 tile, at, classes, u, s_all, present, logits, top, read_next,
                                 [&](int c, int k, V dz) __attribute__((always_inline)) {
                                   if constexpr (kInner) {
                                     store_logits(block_rows + c * kBlock<Compute<T>> + k * kLanes, dz, false);
                                   } else {
                                     store_logits(out.rows + c * out.row_stride + at + k * kLanes, dz, out.streamed);
                                   }
                                 });
                             if constexpr (kInner) {
                               write_inner_block(out.rows + static_cast<int64_t>(at) * classes, classes, block_rows,
                                                 out.streamed, reinterpret_cast<T*>(logits));
                             }
                           });
  }
}

template <typename T, int kClasses, Labels kLabels, CeForm kCeForm, bool kSquared>
void softmax_gradient_of(const Tile<T>& tile, int classes, const Compute<T>* u, PresentClasses& present,
                         Vector<Compute<T>>* scratch, const GradientRows<T>& out) {
  const int padded = tile.padded_voxels();
  if constexpr (!kSquared && (kCeForm == CeForm::kNone || kCeForm == CeForm::kPlain)) {
    if (tile.is_inner) {
      return softmax_gradient_rows<T, kClasses, kLabels, kCeForm, kSquared, true>(tile, padded, classes, u, present,
                                                                                  scratch, out);
    }
  }
  softmax_gradient_rows<T, kClasses, kLabels, kCeForm, kSquared, false>(tile, padded, classes, u, present, scratch,
                                                                        out);
}

template <typename T, Labels kLabels, CeForm kCeForm, bool kSquared>
void softmax_gradient_tile(const Tile<T>& tile, int classes, const Compute<T>* u, PresentClasses& present,
                           Vector<Compute<T>>* scratch, const GradientRows<T>& out) {
  static_assert(kFewClasses == 4, "as here");
  switch (classes) {
    case 2: return softmax_gradient_of<T, 2, kLabels, kCeForm, kSquared>(tile, 2, u, present, scratch, out);
    case 3: return softmax_gradient_of<T, 3, kLabels, kCeForm, kSquared>(tile, 3, u, present, scratch, out);
    case 4: return softmax_gradient_of<T, 4, kLabels, kCeForm, kSquared>(tile, 4, u, present, scratch, out);
    default:
      if constexpr (kLabels != Labels::kBytes) {
        softmax_gradient_of<T, 0, kLabels, kCeForm, kSquared>(tile, classes, u, present, scratch, out);
      }
  }
}

}  // namespace
