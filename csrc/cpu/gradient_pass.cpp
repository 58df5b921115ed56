// The gradient pass on the CPU: logits, target and coefficients in, dL/dlogits out. Compiled once per instruction set.
#include "general.h"

namespace {

// Where a tile's gradient goes: rows of the gradient itself, or a buffer that is copied there afterwards.
template <typename T>
struct GradientRows {
  T* rows;
  int64_t row_stride;
  bool streamed;  // past the caches
};

// Whether a gradient is stored past the caches: a large fresh one, whose memory would be read first, and drive out the
// logits that are still to be read. inner: its classes lie side by side.
template <typename T>
bool is_streamed(const Volume& v, const GradientView& view, bool inner) {
  constexpr int64_t kLeastBytes = int64_t{8} << 20, kLine = 64;  // of less, whoever reads it next finds it in a cache
  const auto is_aligned = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)) % kLine == 0; };
  return view.data != v.logits.data &&
         v.samples * v.classes * v.voxels * static_cast<int64_t>(sizeof(T)) >= kLeastBytes &&
         reinterpret_cast<uintptr_t>(view.data) % kLine == 0 && is_aligned(view.sample_stride) &&
         (inner || is_aligned(view.class_stride));
}

template <bool kCrossEntropy>
constexpr int kCoefficients = kCrossEntropy ? kAllCoefficients : kOverlapCoefficients;

// All classes' dL/dsmoothing.
template <typename A>
TK_INLINE A sum_of_smoothing(const A* u, int classes) {
  double sum = 0;
  for (int c = 0; c < classes; ++c) sum += u[c * kAllCoefficients + kSmoothingCoefficient];
  return static_cast<A>(sum);
}

template <typename T, Labels kLabels, CeForm kCeForm, bool kSquared, bool kInner>
TK_INLINE void two_classes_gradient(const Tile<T>& tile, int padded, const Compute<T>* u, const GradientRows<T>& out) {
  constexpr bool kMasked = kLabels == Labels::kSome, kCrossEntropy = kCeForm != CeForm::kNone;
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  const A* u1 = u + kCoefficients<kCrossEntropy>;
  const A difference0 = u1[kBackground] - u[kForeground];  // u_1 - u_0 where the label is 0
  const A difference1 = u1[kForeground] - u[kBackground];  // where it is 1
  // The same of squares, at the label: u_label - u_other = u_foreground - 2 p_other (both u_background).
  const A backgrounds = u[kBackground] + u1[kBackground];
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
    V difference = is1 ? broadcast<A>(difference1) : broadcast<A>(difference0);
    if constexpr (kSquared) {
      const V foreground = is1 ? broadcast<A>(u1[kForeground]) : broadcast<A>(u[kForeground]);
      const V of_label = squared_slope_of_target(p_other, broadcast<A>(backgrounds), foreground);
      difference = is1 ? of_label : -of_label;
    }
    V dz1 = logistic_gradient(e, inverse, difference);
    if constexpr (kCeForm == CeForm::kSmoothed) {  // p_1 b_0 - p_0 b_1
      const V p_label = margin < V{} ? e * inverse : inverse;
      const V of_label = is1 ? broadcast<A>(-u1[kCeCoefficient] - u1[kSmoothingCoefficient])
                             : broadcast<A>(u[kCeCoefficient] + u[kSmoothingCoefficient]);
      const V of_other = is1 ? broadcast<A>(-u[kSmoothingCoefficient]) : broadcast<A>(u1[kSmoothingCoefficient]);
      dz1 += of_label * p_other - of_other * p_label;
    } else if constexpr (kCrossEntropy) {  // k_0 p_1 where the label is 0, -k_1 p_0 where it is 1
      V k = is1 ? broadcast<A>(-u1[kCeCoefficient]) : broadcast<A>(u[kCeCoefficient]);
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

// As count_softmax_block. s_all: the sum of all classes' dL/dsmoothing. store_dz(c, k, dz) takes the gradient of class
// c in the k-th vector.
template <typename T, int kClasses, int kVectors, Labels kLabels, CeForm kCeForm, bool kSquared, typename Next,
          typename Store>
TK_INLINE void softmax_gradient_block(const Tile<T>& tile, int at, int runtime_classes, const Compute<T>* u,
                                      Compute<T> s_all, PresentClasses& present, Vector<Compute<T>>* logits,
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
    const A* of_class = u + c * kCoefficients<kCrossEntropy>;
    const V background = broadcast<A>(of_class[kBackground]);
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const V e = exp_nonpositive<A>(logits[c * kVectors + k] - top[k]);
      V other;
      if constexpr (kPresent) {
        const I is_target = label[k] == static_cast<Int>(c);
        const I is_other = kMasked ? (label[k] != static_cast<Int>(c)) & (label[k] >= 0) : ~is_target;
        other = sums[k].add(is_target, is_other, e);
        u_target[k] = is_target ? broadcast<A>(of_class[kForeground]) : u_target[k];
        if (kSquared) u_background[k] = is_target ? background : u_background[k];
        if (kCrossEntropy) k_target[k] = is_target ? broadcast<A>(of_class[kCeCoefficient]) : k_target[k];
        if (kSmoothed) s_target[k] = is_target ? broadcast<A>(of_class[kSmoothingCoefficient]) : s_target[k];
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
      gradient[k].add_smoothed_cross_entropy(sums[k], k_target[k], s_target[k], broadcast<A>(s_all));
    } else if constexpr (kCrossEntropy) {
      gradient[k].add_cross_entropy(sums[k], k_target[k]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < classes; ++c) {
    const V background = broadcast<A>(u[c * kCoefficients<kCrossEntropy> + kBackground]);
    const A smoothing = kSmoothed ? u[c * kCoefficients<kCrossEntropy> + kSmoothingCoefficient] : A(0);
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

template <typename T, int kClasses, Labels kLabels, CeForm kCeForm, bool kSquared, bool kInner>
TK_INLINE void softmax_gradient_rows(const Tile<T>& tile, int padded, int classes, const Compute<T>* u,
                                     PresentClasses& present, Vector<Compute<T>>* scratch, const GradientRows<T>& out) {
  using V = Vector<Compute<T>>;
  constexpr int kLanes = Lanes<Compute<T>>::count;
  const Compute<T> s_all = kCeForm == CeForm::kSmoothed ? sum_of_smoothing(u, classes) : 0;
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
    // Where for_each_block keeps nothing of those.
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

// kPresent: the channel's label occurs in the tile.
template <typename T, Activation kActivation, bool kPresent, bool kMasked>
TK_INLINE void channel_gradient(const Tile<T>& tile, int padded, int c, int classes, int first_label,
                                const Compute<T>* u, const GradientRows<T>& out) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  const V background = broadcast<A>(u[c * kOverlapCoefficients + kBackground]);
  const V foreground = broadcast<A>(u[c * kOverlapCoefficients + kForeground]);
  const T* next = next_channel(tile, c, classes);
  for (int i = 0; i < padded; i += Lanes<A>::count) {
    prefetch(next + i);
    const I label = load<I>(tile.labels + i);
    V dz = background;
    if (kPresent) dz = label == static_cast<typename Lanes<A>::Int>(c + first_label) ? foreground : background;
    if constexpr (kActivation == Activation::kSigmoid) {
      const V z = load_logits(tile.rows + c * tile.row_stride + i);
      const V e = exp_nonpositive<A>(negative_magnitude<A>(z));
      dz = logistic_gradient(e, reciprocal<A>(1 + e), dz);
    }
    if (tile.weights != nullptr) dz *= load<V>(tile.weights + i);
    if (kMasked) dz = label >= 0 ? dz : V{};
    store_logits(out.rows + c * out.row_stride + i, dz, out.streamed);
  }
}

template <typename T, Activation kActivation, bool kMasked>
void channels_gradient_tile(const Tile<T>& tile, int padded, int classes, int first_label, const Compute<T>* u,
                            PresentClasses& present, const GradientRows<T>& out) {
  const bool few = classes < kFewChannels;
  if (!few) present.set(tile.labels, padded, true);
  for (int c = 0; c < classes; ++c) {
    if (few || present.has(c + first_label)) {
      channel_gradient<T, kActivation, true, kMasked>(tile, padded, c, classes, first_label, u, out);
    } else {
      channel_gradient<T, kActivation, false, kMasked>(tile, padded, c, classes, first_label, u, out);
    }
  }
  if (!few) present.set(tile.labels, padded, false);
}

template <typename T, Activation kActivation>
void channels_gradient(const Tile<T>& tile, int padded, int classes, int first_label, const Compute<T>* u,
                       PresentClasses& present, const GradientRows<T>& out) {
  if (tile.masked) {
    channels_gradient_tile<T, kActivation, true>(tile, padded, classes, first_label, u, present, out);
  } else {
    channels_gradient_tile<T, kActivation, false>(tile, padded, classes, first_label, u, present, out);
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

// ---- A target of its own for every class: dense, or class indices as one-hot rows

template <typename T, OverlapForm kForm, bool kCrossEntropy>
void general_softmax_gradient(const Volume& v, const Tile<T>& tile, const Compute<T>* u, Vector<Compute<T>>* scratch,
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
      const A* of_class = u + c * kCoefficients<kCrossEntropy>;
      const V background = broadcast<A>(of_class[kBackground]), foreground = broadcast<A>(of_class[kForeground]);
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

template <typename T, Activation kActivation, OverlapForm kForm, bool kCrossEntropy>
void general_channels_gradient(const Volume& v, const Tile<T>& tile, const Compute<T>* u, const GradientRows<T>& out) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  const bool weighted = is_weighted(tile);
  for (int c = 0; c < v.classes; ++c) {
    const A* of_class = u + c * kCoefficients<kCrossEntropy>;
    const V background = broadcast<A>(of_class[kBackground]), foreground = broadcast<A>(of_class[kForeground]);
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

template <typename T>
void general_gradient(const Volume& v, const Tile<T>& tile, const Compute<T>* u, Vector<Compute<T>>* scratch,
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

template <typename T>
void gradient_tile(const Volume& v, const Tile<T>& tile, const Compute<T>* u, PresentClasses& present,
                   Vector<Compute<T>>* scratch, const GradientRows<T>& out) {
  const int padded = tile.padded_voxels();
  const int classes = static_cast<int>(v.classes), first_label = static_cast<int>(v.first_label);
  if (takes_general_kernels(v)) return general_gradient(v, tile, u, scratch, out);
  switch (v.activation) {
    case Activation::kSoftmax:
      return with_softmax_options(v, tile, [&](auto labels, auto cross_entropy, auto squared) {
        softmax_gradient_tile<T, decltype(labels)::value, decltype(cross_entropy)::value, decltype(squared)::value>(
            tile, classes, u, present, scratch, out);
      });
    case Activation::kSigmoid:
      return channels_gradient<T, Activation::kSigmoid>(tile, padded, classes, first_label, u, present, out);
    case Activation::kNone:
      return channels_gradient<T, Activation::kNone>(tile, padded, classes, first_label, u, present, out);
  }
}

// Vectors of a class that are kept: two blocks' logits, or four things in the general kernels.
constexpr int kScratchVectors = larger(2 * kBlockVectors, 4 * kGeneralVectors);

// Scratch: the tile's buffers, kScratchVectors a class, gradient rows[C][row voxels], present classes.
template <typename T>
int64_t scratch_bytes(const Volume& v) {
  return TileBuffers<T>::bytes(v) + v.classes * kScratchVectors * kVectorBytes +
         v.classes * TileBuffers<T>::voxels_per_row(v) * static_cast<int64_t>(sizeof(T)) +
         PresentClasses::bytes(v.classes);
}

template <typename T>
void gradient(const Volume& v, int64_t sample, int64_t begin, int64_t end, const void* coefficients,
              const GradientView& view, void* scratch) {
  using A = Compute<T>;
  const A* u = static_cast<const A*>(coefficients);
  TileBuffers<T> buffers(v, scratch);
  const bool inner =
      is_inner(v, view.class_stride, view.voxel_stride) && is_inner(v, v.logits.class_stride, v.logits.voxel_stride);
  // What is copied is kept in rows.
  if (!inner && (view.voxel_stride != 1 || v.logits.voxel_stride != 1)) buffers.tile_voxels = buffers.row_voxels;
  Vector<A>* block = reinterpret_cast<Vector<A>*>(buffers.rest);
  T* buffer = reinterpret_cast<T*>(block + v.classes * kScratchVectors);
  PresentClasses present(buffer + v.classes * buffers.row_voxels, v.classes);
  const bool streamed = is_streamed<T>(v, view, inner);
  BadInput bad;  // the count pass has told of it, and its coefficients are NaN then
  for (int64_t at = begin; at < end;) {
    const int voxels = buffers.take(end - at);
    const Tile<T> tile = load_tile<T>(v, sample, at, voxels, buffers, inner, bad);
    T* there = static_cast<T*>(view.data) + sample * view.sample_stride + at * view.voxel_stride;
    const bool direct = tile.is_inner || (view.voxel_stride == 1 && voxels == tile.padded_voxels());
    const GradientRows<T> out = direct ? GradientRows<T>{there, view.class_stride, streamed}
                                       : GradientRows<T>{buffer, buffers.row_voxels, false};
    gradient_tile(v, tile, u, present, block, out);
    if (!direct) {
      copy_rows<true>(there, view.class_stride, view.voxel_stride, buffer, buffers.row_voxels, v.classes, voxels);
    }
    at += voxels;
  }
  if (streamed) finish_streams();
}

}  // namespace

namespace tversky_kernels {
namespace cpu {

#define TK_JOIN_(a, b) a##_##b
#define TK_JOIN(a, b) TK_JOIN_(a, b)

void TK_JOIN(gradient_pass, TK_CAPABILITY)(const Volume& v, int64_t sample, int64_t begin, int64_t end,
                                           const void* coefficients, const GradientView& out, void* scratch) {
#if defined(TK_ONLY_BFLOAT16)  // see setup.py and kernels()
  return gradient<BFloat16>(v, sample, begin, end, coefficients, out, scratch);
#else
  switch (v.logits.type) {
    case ElementType::kDouble: return gradient<double>(v, sample, begin, end, coefficients, out, scratch);
    case ElementType::kHalf: return gradient<Half>(v, sample, begin, end, coefficients, out, scratch);
    case ElementType::kBFloat16: return gradient<BFloat16>(v, sample, begin, end, coefficients, out, scratch);
    default: return gradient<float>(v, sample, begin, end, coefficients, out, scratch);
  }
#endif
}

int64_t TK_JOIN(gradient_scratch_bytes, TK_CAPABILITY)(const Volume& v) {
  switch (v.logits.type) {
    case ElementType::kDouble: return scratch_bytes<double>(v);
    case ElementType::kFloat: return scratch_bytes<float>(v);
    default: return scratch_bytes<Half>(v);
  }
}

}  // namespace cpu
}  // namespace tversky_kernels
