// The family "few": all classes of 4 or 8 voxels in the registers of one thread. Softmax of 2 to 4 classes (float64: 3)
// and labels, from either layout; squared errors of two classes.
#include "coefficients.cuh"
#include "counting.cuh"
#include "dispatch.h"
#include "families.h"
#include "own_targets.cuh"

namespace tversky_kernels {
namespace cuda {
namespace {

// The most classes that fit in a thread's registers. One more of float64 would spill.
template <typename T>
constexpr int kMostInRegisters = sizeof(T) == 8 ? 3 : 4;

// The least number of blocks of a multiprocessor. It bounds the registers of the kernels that hold all classes in them.
template <int kClasses, CrossEntropy kCeForm>
constexpr int kFewBlocks = kClasses == 2 && kCeForm == CrossEntropy::kNone ? 4 : 2;

// Calls f with the number of classes, 2 to kMostInRegisters<T>, as a constant.
template <typename T, int kClasses = 2, typename F>
void with_few_classes(int64_t classes, F&& f) {
  if (classes == kClasses) {
    f(std::integral_constant<int, kClasses>{});
  } else if constexpr (kClasses < kMostInRegisters<T>) {
    with_few_classes<T, kClasses + 1>(classes, f);
  }
}

// Whether the count pass brings the next voxels to shared memory while a thread works on these. The gradient pass waits
// for memory anyway. Two classes have so many threads at once that they gain nothing. A copy has at least 4 bytes, also
// of labels.
template <typename T>
constexpr bool few_come_ahead(int classes) {
  return sizeof(T) < 8 && classes > 2;
}

// The values of a block whose threads have all classes in registers: first the memory of LabelSums, then the sums of
// each warp, in whole words of 16 bytes, because such words lie behind them.
template <CrossEntropy kCeForm, bool kSquared>
constexpr int few_sum_values(int classes) {
  const int of_warps = Plan::kThreads / kWarp * count_values<kCeForm, kSquared>(classes);
  const int of_labels = classes > 2 ? label_sum_values<kCeForm != CrossEntropy::kNone>(classes) : 0;
  return ((of_warps > of_labels ? of_warps : of_labels) + 3) & ~3;
}

// Voxels that a thread takes at once: one 16-byte load of each class, or 8 bytes where 16 take too many registers.
template <typename T, int kClasses, bool kCrossEntropy>
constexpr int kVoxelsOf = 16 / sizeof(T) * kClasses <= (kCrossEntropy ? 16 : 32) ? 16 / sizeof(T) : 8 / sizeof(T);

// The counts of a block whose threads have the counts of all classes. With a cross-entropy there are 4 or (smoothed) 5
// columns, and the sum of the weights, which is the same for every class.
template <typename A, int kClasses, CrossEntropy kCeForm, bool kSquared, int kValues>
__device__ void store_block_sums(A (&values)[kValues], bool bad, A* out) {
  block_sums(values, bad, [&](int i, A total) {
    if (i < kWeights<kCeForm> * kClasses) {
      out[i] = total;
    } else if (kSquared) {
      out[i + kClasses] = total;
    } else {
      for (int c = 0; c < kClasses; ++c) out[kVoxels * kClasses + c] = total;
    }
  });
  if (kCeForm == CrossEntropy::kPlain) {
    for (int c = threadIdx.x; c < kClasses; c += blockDim.x) out[kSmoothing * kClasses + c] = A(0);
  }
}

// 1 / (1 + e) and the rest, from e between 0 and e^kMostExponent.
constexpr int kMostExponent = 80;
template <typename A>
__device__ __forceinline__ Probability<A> ratio_to_one(A e) {
  const A p = reciprocal(A(1) + e);
  return {p, e * p};
}

// All classes of kVoxels voxels in the registers of one thread, in whole loads.
template <typename T, int kClasses, CrossEntropy kCeForm, bool kSquared, bool kInterleaved>
__global__ void __launch_bounds__(Plan::kThreads, kFewBlocks<kClasses, kCeForm>)
    count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, unsigned* finished, const Blocks blocks) {
  using A = Compute<T>;
  constexpr bool kCrossEntropy = kCeForm != CrossEntropy::kNone, kSmoothed = kCeForm == CrossEntropy::kSmoothed;
  constexpr int kVoxels = kVoxelsOf<T, kClasses, kCrossEntropy>;
  begin_count(finished);
  const Share share = share_of_block<Order::kBackward>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + kept(share.sample * v.logits.sample_stride);
  constexpr int kColumns = kCrossEntropy ? kAllCounts : kOverlapCounts;
  A counts[count_values<kCeForm, kSquared>(kClasses)] = {};
  // From here on the sum of the weights, or of each label's.
  constexpr int of_weights = kWeights<kCeForm> * kClasses;
  TK_SHARED(memory);
  // Two classes have their sums in registers.
  const LabelSums<A, kCrossEntropy> of_label(reinterpret_cast<A*>(memory), kClasses > 2 ? kClasses : -1);
  A log_sums = A(0);  // for smoothing, the same for every class
  bool bad = false;
  const LabelRow<Reads::kSameSize, kVoxels> target_row(v, kept(share.sample * v.target.sample_stride));
  using Ahead = ClassesAhead<kInterleaved, T, kClasses, kVoxels>;
  const Ahead ahead{memory + few_sum_values<kCeForm, kSquared>(kClasses) * sizeof(A)};
  unsigned char* const label_slots = ahead.slots + Ahead::kBytes;
  const auto expect = [&](int64_t at) {
    if constexpr (few_come_ahead<T>(kClasses)) {
      ahead.expect(rows, v.logits.class_stride, at);
      if (target_row.whole()) target_row.expect(at, label_slots);
    }
  };
  const int offset = static_cast<int>(threadIdx.x) * kVoxels;
  for_each_piece_ahead<Order::kBackward>(share, offset, 0, expect, [&](int64_t at, int64_t next) {
    Logits<T, kVoxels> z[kClasses];
    int labels[kVoxels];
    A weights[kVoxels];
    bool all_known;
    if constexpr (few_come_ahead<T>(kClasses)) {
      wait_for_copies();
      ahead.take(z);
      all_known = target_row.whole() ? target_row.take(label_slots, labels, bad) : target_row.load(at, labels, bad);
      if (next >= 0) expect(next);
    } else {
      load_classes<kInterleaved>(rows, v.logits.class_stride, at, z);
      all_known = target_row.load(at, labels, bad);
    }
    if (!weigh<Reads::kSameSize>(v, share.sample, at, labels, weights, all_known, bad)) clear_uncounted(z, labels);
    A tops[kVoxels];
    if (kClasses > 2) largest_of_thread(z, tops);
    if (kClasses > 2 && !kCrossEntropy && any_huge<T>(tops)) take_off(z, tops);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      const A weight = weights[k];
      const int label = labels[k];
      if (kCrossEntropy && !kSquared) counts[of_weights] += weight;
      if constexpr (kClasses == 2) {
        const A z0 = z[0].at(k), z1 = z[1].at(k);
        const A d = two_class_logit(z0, z1, larger(z0, z1)), to_other = label == 1 ? -d : d;
        Probability<A> p;  // of the label
        A ce = A(0);
        if constexpr (kCrossEntropy) {
          const A e = exponential(-magnitude(d));
          p = logistic(to_other > A(0), e, reciprocal(A(1) + e));
          const A common = log_one_plus_small(e), term = common + larger(to_other, A(0));
          ce = (kSmoothed ? term : with_focal_factor(v, p.complement, term)) * weight;
          if constexpr (kSmoothed) {
            counts[kSmoothing * kClasses] += (common + larger(d, A(0))) * weight;
            counts[kSmoothing * kClasses + 1] += (common + larger(-d, A(0))) * weight;
          }
        } else {  // nothing to select, and both are as accurate
          p = ratio_to_one(exponential(smaller(to_other, A(kMostExponent))));
        }
        const A right = p.p * weight, missed = error_of<kSquared>(p.complement) * weight;
        if (label == 1) {
          counts[1] += right;
          counts[2] += missed;
          if constexpr (kCrossEntropy) counts[7] += ce;
          if constexpr (kCrossEntropy && kSquared) counts[of_weights + 1] += weight;
        } else {
          counts[0] += right;
          counts[3] += missed;
          if constexpr (kCrossEntropy) counts[6] += ce;
          if constexpr (kCrossEntropy && kSquared) counts[of_weights] += weight;
        }
      } else {
        const A top = tops[k];
        SoftmaxSums<A> sums;
        A others[kClasses], below_top = A(0);
        const A scaled_top = scale_top(top);
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          const A x = z[c].at(k);
          if (kCrossEntropy) below_top = label == c ? top - x : below_top;
          if constexpr (kSmoothed) counts[kSmoothing * kClasses + c] += (top - x) * weight;
          const A e = kCrossEntropy ? exponential(x - top) : exponential_below(x, scaled_top);
          others[c] = sums.add(label == c, label != c, e);
        }
        const A inverse = reciprocal(sums.target + sums.others), weighted = weight * inverse;
        A ce = A(0);
        if (kCrossEntropy) {
          const A log_sum = log_one_plus(exponentials_beyond_one(sums)), term = below_top + log_sum;
          ce = (kSmoothed ? term : with_focal_factor(v, sums.others * inverse, term)) * weight;
          if (kSmoothed) log_sums += log_sum * weight;
        }
        of_label.template add<false>(label, sums.target * weighted, sums.others * weighted, ce, weight);
#pragma unroll
        for (int c = 0; c < kClasses; ++c) counts[kClasses + c] += others[c] * weighted;
      }
    }
  });
  if constexpr (kClasses == 2) {  // the other class's false positives
    counts[4] = counts[3];
    counts[5] = counts[2];
  } else {
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      counts[c] = of_label.tp(c);
      counts[2 * kClasses + c] = of_label.fn(c);
      if constexpr (kCrossEntropy) counts[3 * kClasses + c] = of_label.ce(c);
      if constexpr (kSmoothed) counts[kSmoothing * kClasses + c] += log_sums;
    }
    __syncthreads();  // the memory has been read
  }
  A* out = partial + (share.sample * blocks.programs + share.program) * kColumns * kClasses;
  store_block_sums<A, kClasses, kCeForm, kSquared>(counts, bad, out);
}

template <typename T, int kClasses, CrossEntropy kCeForm, bool kSquared, bool kInterleaved>
__global__ void __launch_bounds__(Plan::kThreads, kFewBlocks<kClasses, kCeForm>)
    gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks) {
  using A = Compute<T>;
  constexpr bool kCrossEntropy = kCeForm != CrossEntropy::kNone, kSmoothed = kCeForm == CrossEntropy::kSmoothed;
  constexpr int kVoxels = kVoxelsOf<T, kClasses, kCrossEntropy>;
  const Share share = share_of_block<Order::kForward>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + kept(share.sample * v.logits.sample_stride);
  T* out = static_cast<T*>(a.out.data) + kept(share.sample * a.out.sample_stride);
  TK_SHARED(memory);
  const Coefficients<A>* of_class =
      fill_coefficients<kCrossEntropy>(v, a, share.sample, reinterpret_cast<Coefficients<A>*>(memory));
  __syncthreads();
  Coefficients<A> u[kClasses];
#pragma unroll
  for (int c = 0; c < kClasses; ++c) u[c] = of_class[c];
  const A smoothing_of_all = kSmoothed ? sum_of_smoothing(of_class, kClasses) : A(0);
  bool bad = false;  // the count pass has reported it, and the coefficients are NaN then
  const LabelRow<Reads::kSameSize, kVoxels> target_row(v, kept(share.sample * v.target.sample_stride));
  for_each_own<Order::kForward, kVoxels>(share, [&](int64_t at) {
    Logits<T, kVoxels> z[kClasses];
    Packed<T, kVoxels> dz[kClasses];
    load_classes<kInterleaved>(rows, v.logits.class_stride, at, z);
    int labels[kVoxels];
    A weights[kVoxels];
    if (!load_voxels(v, target_row, share.sample, at, labels, weights, bad)) clear_uncounted(z, labels);
    A tops[kVoxels];
    if (kClasses > 2) {
      largest_of_thread(z, tops);
      if (any_huge<T>(tops)) take_off(z, tops);
    }
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      const A weight = weights[k];  // 0 where the voxel does not count; the gradient is 0 then
      const int label = labels[k];
      if constexpr (kClasses == 2) {
        const A z0 = z[0].at(k), z1 = z[1].at(k);
        const A d = two_class_logit(z0, z1, larger(z0, z1));
        const A e = exponential(-magnitude(d));
        A difference = label == 1 ? u[1].foreground - u[0].background : u[1].background - u[0].foreground;
        const A inverse = reciprocal(A(1) + e);
        const Probability<A> p = logistic(d < A(0), e, inverse);
        if constexpr (kSquared) {  // u_label - u_other = u_foreground - 2 p_other (both u_background)
          const A p_other = label == 1 ? p.complement : p.p;
          const A foreground = label == 1 ? u[1].foreground : u[0].foreground;
          const A of_label = squared_slope_of_target(p_other, u[0].background + u[1].background, foreground);
          difference = label == 1 ? of_label : -of_label;
        }
        A dz_1 = logistic_gradient(e, inverse, difference);
        if constexpr (kCrossEntropy) {
          A slope = label == 1 ? -u[1].ce * p.complement : u[0].ce * p.p;
          if constexpr (kSmoothed) {
            slope += u[0].smoothing * p.p - u[1].smoothing * p.complement;
          } else if (v.focal_gamma != 0) {
            const A minus_log_p = log_one_plus_small(e) + larger(label == 1 ? -d : d, A(0));
            const Probability<A> right = of_outcome(label == 1, p);
            slope *= focal_slope(right, minus_log_p, static_cast<A>(v.focal_gamma), FocalPower{});
          }
          dz_1 += slope;
        }
        dz_1 *= weight;
        dz[0].values[k] = static_cast<T>(-dz_1);
        dz[1].values[k] = static_cast<T>(dz_1);
      } else {
        SoftmaxSums<A> sums;
        A others[kClasses], weighted_others = 0;
        const A scaled_top = scale_top(tops[k]);
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          others[c] = sums.add(label == c, label != c, exponential_below(z[c].at(k), scaled_top));
          weighted_others += others[c] * u[c].background;
        }
        const A inverse = reciprocal(sums.target + sums.others);
        SoftmaxGradient<A> gradient =
            softmax_gradient(sums, weighted_others, of_class[label].foreground, inverse, weight);
        if (kSmoothed) {
          gradient.add_smoothed_cross_entropy(sums, of_class[label].ce, of_class[label].smoothing, smoothing_of_all);
        } else if (kCrossEntropy) {
          gradient.add_cross_entropy(sums, with_focal_slope(v, sums, inverse, of_class[label].ce));
        }
        const int target = recomputed(label);
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          A other = gradient.other(others[c], u[c].background);
          if (kSmoothed) other -= u[c].smoothing * weight;
          dz[c].values[k] = static_cast<T>(target == c ? gradient.at_target : other);
        }
      }
    }
    store_classes<kInterleaved>(out, a.out.class_stride, at, dz);
  });
}

// Calls f(type, classes, ce, squared, interleaved), a value of the logits' type and constants.
template <typename F>
void with_few(const Volume& v, F&& f) {
  with_logits_type(v.logits.type, [&](auto element) {
    using T = decltype(element);
    with_few_classes<T>(v.classes, [&](auto classes) {
      with_label_sums(v, [&](auto ce, auto squared) {
        with_bool(v.logits.voxel_stride != 1, [&](auto interleaved) {
          constexpr int kClasses = decltype(classes)::value;
          constexpr bool kSmoothed = decltype(ce)::value == CrossEntropy::kSmoothed;
          constexpr bool kSquared = decltype(squared)::value, kInterleaved = decltype(interleaved)::value;
          // There is no plan for other cases.
          if constexpr ((!kSquared || kClasses == 2) && !(kSmoothed && (kInterleaved || sizeof(T) == 8))) {
            f(element, classes, ce, squared, interleaved);
          }
        });
      });
    });
  });
}

template <typename T>
bool plan_of(const Volume& v, const GradientView* out, Plan& plan) {
  const int64_t classes = v.classes;
  const bool cross_entropy = v.cross_entropy != CrossEntropy::kNone, squared = v.overlap == OverlapForm::kSquared;
  if (!takes_labels<T>(v) || !(classes == 2 || (classes <= kMostInRegisters<T> && !squared))) return false;
  with_few_classes<T>(classes, [&](auto c) {
    constexpr int kClasses = decltype(c)::value;
    plan.voxels = cross_entropy ? kVoxelsOf<T, kClasses, true> : kVoxelsOf<T, kClasses, false>;
  });
  const bool smoothed = v.cross_entropy == CrossEntropy::kSmoothed;
  const bool interleaved = !smoothed && lies_side_by_side(v, out, sizeof(T)) && v.voxels % plan.voxels == 0;
  if (!interleaved && !can_be_read(v, sizeof(T), plan.voxels)) return false;
  plan.lanes = plan.warps = 1;
  const int n = static_cast<int>(classes);
  int64_t values = kAllCoefficients * (classes + 1);  // of Compute<T>, in shared memory
  int packs = 0;                                      // bytes for data that is copied ahead
  if (out == nullptr) {
    with_label_sums(v, [&](auto ce, auto is_squared) {
      values = few_sum_values<decltype(ce)::value, decltype(is_squared)::value>(n);
    });
    if (few_come_ahead<T>(n)) {
      packs = (n * static_cast<int>(sizeof(T)) + bytes_of(v.target.type)) * plan.voxels * Plan::kThreads;
    }
  }
  plan.shared_bytes = static_cast<int>(values * sizeof(Compute<T>)) + packs;
  return true;
}

bool plan_few(const Volume& v, const GradientView* out, Plan& plan) {
  bool takes = false;
  with_logits_type(v.logits.type, [&](auto element) { takes = plan_of<decltype(element)>(v, out, plan); });
  return takes;
}

int blocks_few(const Volume& v, const Plan&, bool gradient, int64_t) {
  const bool plain = v.cross_entropy == CrossEntropy::kNone, four_at_once = plain && v.classes == 2;
  if (gradient) return is_half(v) && four_at_once ? 4 : gradient_blocks(v);
  return four_at_once || (is_half(v) && plain && v.classes == 4) ? 4 : 6;
}

void count_few(const CountLaunch& launch) {
  with_few(launch.v, [&](auto element, auto classes, auto ce, auto squared, auto interleaved) {
    using T = decltype(element);
    launch.template run<T>(count_pass_kernel<T, decltype(classes)::value, decltype(ce)::value, decltype(squared)::value,
                                             decltype(interleaved)::value>);
  });
}

void gradient_few(const GradientLaunch& launch) {
  with_few(launch.v, [&](auto element, auto classes, auto ce, auto squared, auto interleaved) {
    launch.run(gradient_pass_kernel<decltype(element), decltype(classes)::value, decltype(ce)::value,
                                    decltype(squared)::value, decltype(interleaved)::value>);
  });
}

}  // namespace

const Family kFew{"few", false, plan_few, blocks_few, count_few, gradient_few};

}  // namespace cuda
}  // namespace tversky_kernels
