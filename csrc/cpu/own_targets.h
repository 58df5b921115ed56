// The family "own targets": every class of a voxel has a target g of its own (takes_general_kernels), dense or as
// one-hot rows, with all options of the cross-entropy. Voxels that do not count have logits, targets and weight 0 here,
// so the arithmetic needs no masks.
#pragma once

#include "passes.h"

namespace {

constexpr int kGeneralVectors = 2;  // vectors of voxels that these kernels work on at once

// All ones where the voxels from `at` on count.
template <typename T>
TK_INLINE IntVector<Compute<T>> general_counted(const Tile<T>& tile, int at) {
  return load<IntVector<Compute<T>>>(tile.labels + at) >= 0;
}

template <typename T>
TK_INLINE Vector<Compute<T>> general_logit(const Tile<T>& tile, int c, int at) {
  using V = Vector<Compute<T>>;
  const V z = load_logits(tile.rows + c * tile.row_stride + at);
  return tile.masked ? (general_counted(tile, at) ? z : V{}) : z;
}

template <typename T>
TK_INLINE Vector<Compute<T>> general_target(const Tile<T>& tile, int c, int at) {
  using A = Compute<T>;
  using V = Vector<A>;
  if (tile.targets == nullptr) return load<IntVector<A>>(tile.labels + at) == tile.first_label + c ? V{} + 1 : V{};
  const V g = load<V>(tile.targets + c * tile.target_stride + at);
  return tile.masked ? (general_counted(tile, at) ? g : V{}) : g;
}

template <typename T>
TK_INLINE Vector<Compute<T>> general_weight(const Tile<T>& tile, int at) {
  using A = Compute<T>;
  using V = Vector<A>;
  const V weight = tile.weights != nullptr ? load<V>(tile.weights + at) : broadcast<A>(1);
  return tile.masked ? (general_counted(tile, at) ? weight : V{}) : weight;
}

// Whether all targets are 0 or 1. Each binary cross-entropy then has one term. is_one: g == 1.
template <typename A>
TK_INLINE bool is_hard(Vector<A> g, IntVector<A> is_one) {
  return !any(~is_one & (g != 0));
}

template <typename T>
TK_INLINE bool is_weighted(const Tile<T>& tile) {
  return tile.masked || tile.weights != nullptr;
}

// The softmax of kGeneralVectors vectors of voxels. Fills below_top[c] = z_top - z_c and exponentials[c].
template <typename T>
struct GeneralSoftmax {
  using A = Compute<T>;
  using V = Vector<A>;
  V beyond_one[kGeneralVectors], inverse[kGeneralVectors], weight[kGeneralVectors];
  bool weighted;

  TK_INLINE GeneralSoftmax(const Tile<T>& tile, int at, int classes, V* below_top, V* exponentials) {
    constexpr int kLanes = Lanes<A>::count;
    weighted = is_weighted(tile);
    V top[kGeneralVectors];
    for (int c = 0; c < classes; ++c) {
#pragma GCC unroll 2
      for (int k = 0; k < kGeneralVectors; ++k) {
        const V z = general_logit(tile, c, at + k * kLanes);
        prefetch(tile.rows + c * tile.row_stride + at + (kGeneralVectors + k) * kLanes);
        top[k] = c == 0 ? z : maximum(top[k], z);
        below_top[c * kGeneralVectors + k] = z;
      }
    }
    TopSums<V> sums[kGeneralVectors];
    for (int c = 0; c < classes; ++c) {
#pragma GCC unroll 2
      for (int k = 0; k < kGeneralVectors; ++k) {
        const V below = top[k] - below_top[c * kGeneralVectors + k];
        const V e = exp_nonpositive<A>(-below);
        sums[k].add(below == 0, e);
        below_top[c * kGeneralVectors + k] = below;
        exponentials[c * kGeneralVectors + k] = e;
      }
    }
    for (int k = 0; k < kGeneralVectors; ++k) {
      beyond_one[k] = sums[k].beyond_one();
      inverse[k] = reciprocal<A>(1 + beyond_one[k]);
      weight[k] = general_weight(tile, at + k * kLanes);
    }
  }

  TK_INLINE Probability<V> probability(int k, V below_top, V exponential) const {
    const V p = exponential * inverse[k];
    return {p, below_top == 0 ? beyond_one[k] * inverse[k] : 1 - p};
  }
};

// Calls f with the activation, the form of the overlap and whether there is a cross-entropy, as constants.
template <typename F>
TK_INLINE void with_general_options(const Volume& v, F&& f) {
  const auto with_form = [&](auto activation, auto cross_entropy) __attribute__((always_inline)) {
    switch (v.overlap) {
      case OverlapForm::kProduct:
        return f(activation, std::integral_constant<OverlapForm, OverlapForm::kProduct>{}, cross_entropy);
      case OverlapForm::kAbsolute:
        return f(activation, std::integral_constant<OverlapForm, OverlapForm::kAbsolute>{}, cross_entropy);
      case OverlapForm::kSquared:
        return f(activation, std::integral_constant<OverlapForm, OverlapForm::kSquared>{}, cross_entropy);
    }
  };
  const auto with_activation = [&](auto activation) __attribute__((always_inline)) {
    constexpr bool kHasCrossEntropy = decltype(activation)::value != Activation::kNone;
    if constexpr (kHasCrossEntropy) {
      if (v.cross_entropy != CrossEntropy::kNone) return with_form(activation, std::true_type{});
    }
    return with_form(activation, std::false_type{});
  };
  switch (v.activation) {
    case Activation::kSoftmax: return with_activation(std::integral_constant<Activation, Activation::kSoftmax>{});
    case Activation::kSigmoid: return with_activation(std::integral_constant<Activation, Activation::kSigmoid>{});
    case Activation::kNone: return with_activation(std::integral_constant<Activation, Activation::kNone>{});
  }
}

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

// The sums of one class. They continue from the sums so far, so the size of a tile changes no bits.
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

// Whether the values of a dense target are in [0, 1]: as unsigned integers their bits are then not above the bits of 1.
// (Those of -0 are; find_bad_target knows it.)
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

template <typename T, OverlapForm kForm, bool kCrossEntropy, typename U>
void general_softmax_gradient(const Volume& v, const Tile<T>& tile, const U* u, Vector<Compute<T>>* scratch,
                              const GradientRows<T>& out) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  constexpr int kLanes = Lanes<A>::count;
  const int classes = static_cast<int>(v.classes);
  const bool focal = kCrossEntropy && v.focal_gamma != 0;
  V* const exponentials = scratch + classes * kGeneralVectors;
  V* const slopes = exponentials + classes * kGeneralVectors;  // u_c
  V* const ce_slopes = slopes + classes * kGeneralVectors;     // b_c
  for (int at = 0; at < tile.padded_voxels(); at += kGeneralVectors * kLanes) {
    const GeneralSoftmax<T> softmax(tile, at, classes, scratch, exponentials);
    V log_sum[kGeneralVectors] = {}, rest_u[kGeneralVectors] = {}, top_u[kGeneralVectors] = {};
    V b_all[kGeneralVectors] = {};
    for (int k = 0; focal && k < kGeneralVectors; ++k) log_sum[k] = log1p<A>(softmax.beyond_one[k]);
    for (int c = 0; c < classes; ++c) {
      const U* of_class = u + c * kCoefficients<kCrossEntropy>;
      const V background = spread<A>(of_class[kBackground]), foreground = spread<A>(of_class[kForeground]);
#pragma GCC unroll 2
      for (int k = 0; k < kGeneralVectors; ++k) {
        const int slot = c * kGeneralVectors + k;
        const V below_top = scratch[slot];
        const V g = general_target(tile, c, at + k * kLanes);
        Probability<V> p{exponentials[slot] * softmax.inverse[k], V{}};
        if (kForm != OverlapForm::kProduct || focal) p = softmax.probability(k, below_top, exponentials[slot]);
        const V slope = overlap_slope(p, g, background, foreground, kForm);
        const I is_top = below_top == 0;
        rest_u[k] += is_top ? V{} : p.p * slope;
        top_u[k] += is_top ? slope : V{};
        slopes[slot] = slope;
        if constexpr (kCrossEntropy) {
          V b = g * of_class[kCeCoefficient] + of_class[kSmoothingCoefficient];
          if (focal) {
            b *= focal_slope(p, below_top + log_sum[k], static_cast<A>(v.focal_gamma), FocalPower{});
          }
          b_all[k] += b;
          ce_slopes[slot] = b;
        }
      }
    }
    DenseSoftmaxGradient<V> gradient[kGeneralVectors];
    for (int k = 0; k < kGeneralVectors; ++k) {
      gradient[k] = dense_softmax_gradient(rest_u[k], top_u[k], softmax.beyond_one[k], softmax.inverse[k]);
    }
    for (int c = 0; c < classes; ++c) {
#pragma GCC unroll 2
      for (int k = 0; k < kGeneralVectors; ++k) {
        const int slot = c * kGeneralVectors + k;
        V dz;
        if constexpr (kCrossEntropy) {
          const Probability<V> p = softmax.probability(k, scratch[slot], exponentials[slot]);
          dz = gradient[k].overlap(p.p, slopes[slot]) + softmax_cross_entropy_gradient(p, ce_slopes[slot], b_all[k]);
        } else {
          dz = gradient[k].overlap(exponentials[slot] * softmax.inverse[k], slopes[slot]);
        }
        if (softmax.weighted) dz *= softmax.weight[k];
        store_logits(out.rows + c * out.row_stride + at + k * kLanes, dz, out.streamed);
      }
    }
  }
}

template <typename T, Activation kActivation, OverlapForm kForm, bool kCrossEntropy, typename U>
void general_channels_gradient(const Volume& v, const Tile<T>& tile, const U* u, const GradientRows<T>& out) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  const bool weighted = is_weighted(tile);
  for (int c = 0; c < v.classes; ++c) {
    const U* of_class = u + c * kCoefficients<kCrossEntropy>;
    const V background = spread<A>(of_class[kBackground]), foreground = spread<A>(of_class[kForeground]);
    const T* next = next_channel(tile, c, static_cast<int>(v.classes));
    for (int i = 0; i < tile.padded_voxels(); i += Lanes<A>::count) {
      prefetch(next + i);
      const V z = general_logit(tile, c, i), g = general_target(tile, c, i);
      Probability<V> p{z, 1 - z};
      V e{}, inverse{};
      if constexpr (kActivation == Activation::kSigmoid) {
        const I negative = z < 0;
        e = exp_nonpositive<A>(negative_magnitude<A>(z));
        inverse = reciprocal<A>(1 + e);
        p = logistic(negative, e, inverse);
      }
      V dz = overlap_slope(p, g, background, foreground, kForm);
      if (kActivation == Activation::kSigmoid) dz = logistic_gradient(e, inverse, dz);
      const I is_one = g == 1;
      if (kCrossEntropy && v.cross_entropy != CrossEntropy::kSmoothed && is_hard<A>(g, is_one)) {
        const Probability<V> right = of_outcome(is_one, p);
        V slope = right.complement * of_class[kCeCoefficient];
        if (v.focal_gamma != 0) {
          const V minus_log_p = log1p_of_fraction<A>(e) + maximum(V{}, is_one ? -z : z);
          slope *= focal_slope(right, minus_log_p, static_cast<A>(v.focal_gamma), FocalPower{});
        }
        dz += is_one ? -slope : slope;
      } else if constexpr (kCrossEntropy) {
        V of_one = g * of_class[kCeCoefficient] + of_class[kSmoothingCoefficient];
        V of_zero = (1 - g) * of_class[kCeCoefficient] + of_class[kSmoothingCoefficient];
        if (v.focal_gamma != 0) {
          const A gamma = static_cast<A>(v.focal_gamma);
          const V common = log1p_of_fraction<A>(e);
          const Probability<V> not_p{p.complement, p.p};
          of_one *= focal_slope(p, common + (z < 0 ? -z : V{}), gamma, FocalPower{});
          of_zero *= focal_slope(not_p, common + (z > 0 ? z : V{}), gamma, FocalPower{});
        }
        dz += p.p * of_zero - p.complement * of_one;
      }
      if (weighted) dz *= general_weight(tile, i);
      store_logits(out.rows + c * out.row_stride + i, dz, out.streamed);
    }
  }
}

template <typename T, typename U>
void general_gradient(const Volume& v, const Tile<T>& tile, const U* u, Vector<Compute<T>>* scratch,
                      const GradientRows<T>& out) {
  with_general_options(v, [&](auto activation, auto form, auto cross_entropy) {
    constexpr Activation kActivation = decltype(activation)::value;
    constexpr OverlapForm kForm = decltype(form)::value;
    constexpr bool kCrossEntropy = decltype(cross_entropy)::value;
    if constexpr (kActivation == Activation::kSoftmax) {
      general_softmax_gradient<T, kForm, kCrossEntropy>(v, tile, u, scratch, out);
    } else {
      general_channels_gradient<T, kActivation, kForm, kCrossEntropy>(v, tile, u, out);
    }
  });
}

}  // namespace
