// The family "tiled": a tile of voxels of all classes in shared memory (tile.cuh). It takes what the others leave: any
// size, layout and type, and as many classes as fit.
#include "coefficients.cuh"
#include "counting.cuh"
#include "dispatch.h"
#include "families.h"
#include "tile.cuh"

#include <torch/headeronly/util/Exception.h>

namespace tversky_kernels {
namespace cuda {
namespace {

// Of the tiled kernels only those for a target of its own for every class have squares.
inline bool takes_general_tiles(const Volume& v) {
  return v.is_general() || v.overlap == OverlapForm::kSquared;
}

// The sums of [halves][values], NaN where something is bad.
template <typename A>
__device__ void store_tile_sums(const A* sums, int halves, int values, bool bad, A* out) {
  for (int i = threadIdx.x; i < values; i += Plan::kThreads) {
    A total = 0;
    for (int half = 0; half < halves; ++half) total += sums[half * values + i];
    out[i] = bad ? static_cast<A>(NAN) : total;
  }
}

// Any number of classes: a tile of voxels of all classes in shared memory, read once.
template <typename T, Activation kActivation, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    tiled_count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, unsigned* finished, const Blocks blocks,
                            int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes);
  const TileLayout layout(classes, tile_voxels, Plan::kThreads);
  TK_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory);  // [C][tile_stride]
  constexpr int kColumns = kCrossEntropy ? kAllCounts : kOverlapCounts;
  A* sums = tile + classes * layout.tile_stride;             // [halves][kColumns][C]
  A* reduction = sums + kColumns * classes * layout.halves;  // [2][groups][tile_voxels]
  A* scale = reduction + 2 * layout.groups * tile_voxels;    // [tile_voxels], and so on
  A* right = scale + tile_voxels;
  A* missed = right + tile_voxels;
  A* weights = missed + tile_voxels;
  A* cross_entropy = weights + tile_voxels;
  int* labels = reinterpret_cast<int*>(cross_entropy + tile_voxels);  // [tile_voxels]
  int* any_bad = labels + tile_voxels;

  const int thread = threadIdx.x;
  const TileThread t(layout, tile_voxels);
  begin_count(finished);
  const Share share = share_of_block<Order::kBackward>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  for (int i = thread; i < kColumns * classes * layout.halves; i += Plan::kThreads) sums[i] = A(0);
  if (thread == 0) *any_bad = 0;
  __syncthreads();

  for_each_tile<Order::kBackward>(share, tile_voxels, [&](int64_t begin, int count) {
    load_tile<T>(v, rows, begin, count, tile, layout.tile_stride, tile_voxels);
    if (load_tile_labels(v, share.sample, begin, count, tile_voxels, labels, scale)) *any_bad = 1;
    __syncthreads();
    if (kActivation == Activation::kSoftmax) {
      // The label's logit, before the tile becomes exponentials; group 0 has one thread a voxel.
      A at_label = A(0), top = -INFINITY;
      if (kCrossEntropy && t.group == 0 && labels[t.voxel] != kUncounted) {
        at_label = tile[labels[t.voxel] * layout.tile_stride + t.voxel];
      }
      const SoftmaxSums<A> total = softmax_of_tile(tile, layout, labels, reduction, classes, tile_voxels, t, top);
      if (t.group == 0) {
        const bool counts = labels[t.voxel] != kUncounted;
        const A unweighted = reciprocal(total.target + total.others);
        const A inverse = counts ? scale[t.voxel] * unweighted : A(0);
        if (kCrossEntropy) {
          weights[t.voxel] = counts ? scale[t.voxel] : A(0);
          const A term = (top - at_label) + log_one_plus(exponentials_beyond_one(total));
          const A of_label = with_focal_factor(v, total.others * unweighted, term);
          cross_entropy[t.voxel] = counts ? of_label * scale[t.voxel] : A(0);
        }
        scale[t.voxel] = inverse;
        right[t.voxel] = total.target * inverse;
        missed[t.voxel] = total.others * inverse;
      }
      __syncthreads();
    }
    // A thread for each class. Where there are enough threads, several share the voxels of a class.
    for (int i = thread; i < classes * layout.halves; i += Plan::kThreads) {
      const int c = i % classes, half = i / classes;
      A tp = 0, fp = 0, fn = 0, ce = 0, voxels = 0;
      for (int k = half; k < count; k += layout.halves) {
        const int label = labels[k];
        if (kCrossEntropy) ce += label == c ? cross_entropy[k] : A(0);
        if (kCrossEntropy) voxels += weights[k];
        const A x = tile[c * layout.tile_stride + k];
        if (kActivation == Activation::kSoftmax) {
          fp += x * scale[k];
          tp += label == c ? right[k] : A(0);
          fn += label == c ? missed[k] : A(0);
        } else if (label != kUncounted) {
          Probability<A> p{x, A(1) - x};
          if (kActivation == Activation::kSigmoid) {
            const A e = exponential(x < A(0) ? x : -x);
            p = logistic(x < A(0), e, reciprocal(A(1) + e));
          }
          const bool is_target = label == c + v.first_label;
          tp += is_target ? p.p * scale[k] : A(0);
          fp += is_target ? A(0) : p.p * scale[k];
          fn += is_target ? p.complement * scale[k] : A(0);
        }
      }
      A* mine = sums + half * kColumns * classes + c;
      mine[kTp * classes] += tp;
      mine[kFp * classes] += fp;
      mine[kFn * classes] += fn;
      if (kCrossEntropy) mine[kCe * classes] += ce;
      if (kCrossEntropy) mine[kVoxels * classes] += voxels;
    }
  });
  A* out = partial + (share.sample * blocks.programs + share.program) * kColumns * classes;
  store_tile_sums(sums, layout.halves, kColumns * classes, *any_bad, out);
}

// Every class of a voxel with a target of its own, and all options of the cross-entropy.
template <typename T, Activation kActivation>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    general_count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, unsigned* finished, const Blocks blocks,
                              int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes), columns = v.count_columns();
  const bool cross_entropy = v.cross_entropy != CrossEntropy::kNone;
  const TileLayout layout(classes, tile_voxels, Plan::kThreads);
  TK_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory);                    // [C][tile_stride]
  A* targets = tile + classes * layout.tile_stride;          // [C][tile_stride]
  A* sums = targets + classes * layout.tile_stride;          // [halves][columns][C]
  A* reduction = sums + columns * classes * layout.halves;   // [2][groups][tile_voxels]
  A* weights = reduction + 2 * layout.groups * tile_voxels;  // [tile_voxels], and so on
  A* beyond_one = weights + tile_voxels;
  A* log_sum = beyond_one + tile_voxels;
  int* labels = reinterpret_cast<int*>(log_sum + tile_voxels);  // [tile_voxels]
  int* any_bad = labels + tile_voxels;

  const int thread = threadIdx.x;
  const TileThread t(layout, tile_voxels);
  begin_count(finished);
  const Share share = share_of_block<Order::kBackward>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  for (int i = thread; i < columns * classes * layout.halves; i += Plan::kThreads) sums[i] = A(0);
  if (thread == 0) *any_bad = 0;
  __syncthreads();

  for_each_tile<Order::kBackward>(share, tile_voxels, [&](int64_t begin, int count) {
    if (load_general_tile<T>(v, rows, share.sample, begin, count, tile, targets, layout.tile_stride, tile_voxels,
                             labels, weights)) {
      *any_bad = 1;
    }
    if (kActivation == Activation::kSoftmax) {
      const TopSums<A> total = top_of_tile(tile, layout, reduction, classes, tile_voxels, t);
      if (t.group == 0) {
        beyond_one[t.voxel] = total.beyond_one();
        if (cross_entropy) log_sum[t.voxel] = log_one_plus(total.beyond_one());
      }
      __syncthreads();
    }
    bool bad = false;
    for (int i = thread; i < classes * layout.halves; i += Plan::kThreads) {
      const int c = i % classes, half = i / classes;
      GeneralSums<A> of_class;
      for (int k = half; k < count; k += layout.halves) {
        if (labels[k] == kUncounted) continue;
        const A x = tile[c * layout.tile_stride + k], g = targets[c * layout.tile_stride + k];
        bad |= is_bad_target(v, g);
        if constexpr (kActivation == Activation::kSoftmax) {
          of_class.add_below_top(v, x, beyond_one[k], log_sum[k], g, weights[k], cross_entropy);
        } else {
          of_class.template add_channel<kActivation>(v, x, g, weights[k]);
        }
      }
      A* mine = sums + half * columns * classes + c;
      mine[kTp * classes] += of_class.tp;
      mine[kFp * classes] += of_class.fp;
      mine[kFn * classes] += of_class.fn;
      if (cross_entropy) mine[kCe * classes] += of_class.ce;
      if (cross_entropy) mine[kSmoothing * classes] += of_class.smoothing;
      if (cross_entropy) mine[kVoxels * classes] += of_class.voxels;
    }
    if (bad) *any_bad = 1;
  });
  A* out = partial + (share.sample * blocks.programs + share.program) * columns * classes;
  store_tile_sums(sums, layout.halves, columns * classes, *any_bad, out);
}

template <typename T, Activation kActivation, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    tiled_gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks, int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes);
  const TileLayout layout(classes, tile_voxels, Plan::kThreads);
  TK_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory);                  // [C][tile_stride]
  A* reduction = tile + classes * layout.tile_stride;      // [2][groups][tile_voxels]
  A* scale = reduction + 2 * layout.groups * tile_voxels;  // [tile_voxels], and so on
  A* offset = scale + tile_voxels;
  A* at_target = offset + tile_voxels;
  Coefficients<A>* coefficients = reinterpret_cast<Coefficients<A>*>(at_target + tile_voxels);  // [C + 1]
  int* labels = reinterpret_cast<int*>(coefficients + classes + 1);                             // [tile_voxels]

  const int thread = threadIdx.x;
  const TileThread t(layout, tile_voxels);
  const Share share = share_of_block<Order::kForward>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  T* out = static_cast<T*>(a.out.data) + share.sample * a.out.sample_stride;
  const Coefficients<A>* of_class = fill_coefficients<kCrossEntropy>(v, a, share.sample, coefficients);

  for_each_tile<Order::kForward>(share, tile_voxels, [&](int64_t begin, int count) {
    load_tile<T>(v, rows, begin, count, tile, layout.tile_stride, tile_voxels);
    load_tile_labels(v, share.sample, begin, count, tile_voxels, labels, scale);
    __syncthreads();
    if (kActivation == Activation::kSoftmax) {
      A top;
      const SoftmaxSums<A> total = softmax_of_tile(tile, layout, labels, reduction, classes, tile_voxels, t, top);
      A weighted_others[1] = {A(0)};
      if (t.works) {
        for (int c = t.group; c < classes; c += layout.groups) {
          weighted_others[0] += tile[c * layout.tile_stride + t.voxel] * of_class[c].background;
        }
      }
      sum_over_groups(weighted_others, layout, reduction, tile_voxels, t);
      if (t.group == 0) {
        const int label = labels[t.voxel];
        const A u_target = of_class[label].foreground;
        const A inverse = label == kUncounted ? A(0) : reciprocal(total.target + total.others);
        SoftmaxGradient<A> gradient = softmax_gradient(total, weighted_others[0], u_target, inverse, scale[t.voxel]);
        if (kCrossEntropy) {
          gradient.add_cross_entropy(total, with_focal_slope(v, total, inverse, of_class[label].ce));
        }
        scale[t.voxel] = gradient.scale;
        offset[t.voxel] = gradient.offset;
        at_target[t.voxel] = gradient.at_target;
      }
      __syncthreads();
    }
    const auto gradient_at = [&](int c, int k) {
      const int label = labels[k];
      const A x = tile[c * layout.tile_stride + k];
      if (kActivation == Activation::kSoftmax) {
        const SoftmaxGradient<A> gradient{scale[k], offset[k], at_target[k]};
        return label == c ? gradient.at_target : gradient.other(x, of_class[c].background);
      }
      A dz = label == c + v.first_label ? of_class[c].foreground : of_class[c].background;
      if (kActivation == Activation::kSigmoid) {
        const A e = exponential(x < A(0) ? x : -x);
        dz = logistic_gradient(e, reciprocal(A(1) + e), dz);
      }
      return label == kUncounted ? A(0) : dz * scale[k];
    };
    if (in_packs(out + begin, a.out.class_stride, a.out.voxel_stride, count, tile_voxels)) {
      const int log_packs = log2_of(tile_voxels / kPack<T>);
      for (int i = thread; i < classes << log_packs; i += Plan::kThreads) {
        const int c = i >> log_packs, k = (i - (c << log_packs)) * kPack<T>;
        Packed<T, kPack<T>> dz;
#pragma unroll
        for (int q = 0; q < kPack<T>; ++q) dz.values[q] = static_cast<T>(gradient_at(c, k + q));
        store_packed(out + c * a.out.class_stride + begin + k, dz);
      }
      return;
    }
    T* first = out + begin * a.out.voxel_stride;
    for_each_element<1>(classes, tile_voxels, a.out.voxel_stride != 1, [&](int c, int k) {
      if (k < count) first[c * a.out.class_stride + k * a.out.voxel_stride] = static_cast<T>(gradient_at(c, k));
    });
  });
}

// Every class of a voxel with a target of its own, and all options of the cross-entropy.
template <typename T, Activation kActivation, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    general_gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks, int tile_voxels) {
  using A = Compute<T>;
  const int classes = static_cast<int>(v.classes);
  const bool focal = kCrossEntropy && v.focal_gamma != 0;
  const TileLayout layout(classes, tile_voxels, Plan::kThreads);
  TK_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory);                    // [C][tile_stride]
  A* targets = tile + classes * layout.tile_stride;          // [C][tile_stride]
  A* reduction = targets + classes * layout.tile_stride;     // [3][groups][tile_voxels]
  A* weights = reduction + 3 * layout.groups * tile_voxels;  // [tile_voxels], and so on
  A* beyond_one = weights + tile_voxels;
  A* log_sum = beyond_one + tile_voxels;
  A* shift = log_sum + tile_voxels;
  A* excess = shift + tile_voxels;
  A* b_all = excess + tile_voxels;
  Coefficients<A>* coefficients = reinterpret_cast<Coefficients<A>*>(b_all + tile_voxels);  // [C + 1]
  int* labels = reinterpret_cast<int*>(coefficients + classes + 1);                         // [tile_voxels]

  const TileThread t(layout, tile_voxels);
  const Share share = share_of_block<Order::kForward>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  T* out = static_cast<T*>(a.out.data) + share.sample * a.out.sample_stride;
  const Coefficients<A>* u = fill_coefficients<kCrossEntropy>(v, a, share.sample, coefficients);

  for_each_tile<Order::kForward>(share, tile_voxels, [&](int64_t begin, int count) {
    // Bad labels and weights: the count pass has reported them, and the coefficients are NaN then.
    load_general_tile<T>(v, rows, share.sample, begin, count, tile, targets, layout.tile_stride, tile_voxels, labels,
                         weights);
    if (kActivation == Activation::kSoftmax) {
      const TopSums<A> total = top_of_tile(tile, layout, reduction, classes, tile_voxels, t);
      if (t.group == 0) {
        beyond_one[t.voxel] = total.beyond_one();
        log_sum[t.voxel] = focal ? log_one_plus(total.beyond_one()) : A(0);
      }
      __syncthreads();
      A sums[3] = {A(0), A(0), A(0)};  // rest_u, top_u and the sum of b
      if (t.works) {
        const A inverse = reciprocal(A(1) + beyond_one[t.voxel]);
        for (int c = t.group; c < classes; c += layout.groups) {
          const A below_top = tile[c * layout.tile_stride + t.voxel], g = targets[c * layout.tile_stride + t.voxel];
          const Probability<A> p = dense_probability(below_top, beyond_one[t.voxel], inverse);
          add_slopes(v, u[c], p, below_top, log_sum[t.voxel], g, kCrossEntropy, sums);
        }
      }
      sum_over_groups(sums, layout, reduction, tile_voxels, t);
      if (t.group == 0) {
        const DenseSoftmaxGradient<A> gradient =
            dense_softmax_gradient(sums[0], sums[1], beyond_one[t.voxel], reciprocal(A(1) + beyond_one[t.voxel]));
        shift[t.voxel] = gradient.shift;
        excess[t.voxel] = gradient.excess;
        b_all[t.voxel] = sums[2];
      }
      __syncthreads();
    }
    T* first = out + begin * a.out.voxel_stride;
    for_each_element<1>(classes, tile_voxels, a.out.voxel_stride != 1, [&](int c, int k) {
      if (k >= count) return;
      const A x = tile[c * layout.tile_stride + k], g = targets[c * layout.tile_stride + k];
      A dz;
      if constexpr (kActivation == Activation::kSoftmax) {
        const Probability<A> p = dense_probability(x, beyond_one[k], reciprocal(A(1) + beyond_one[k]));
        dz = class_gradient(v, u[c], p, x, log_sum[k], g, DenseSoftmaxGradient<A>{shift[k], excess[k]}, b_all[k],
                            kCrossEntropy);
      } else {
        dz = channel_gradient<kActivation, kCrossEntropy>(v, u[c], x, g);
      }
      dz = labels[k] == kUncounted ? A(0) : dz * weights[k];
      first[c * a.out.class_stride + k * a.out.voxel_stride] = static_cast<T>(dz);
    });
  });
}

// Calls f(type, activation, has_cross_entropy).
template <typename F>
void with_tiled(const Volume& v, F&& f) {
  with_type_and_activation(v, [&](auto element, auto activation) {
    with_bool(v.cross_entropy != CrossEntropy::kNone, [&](auto ce) { f(element, activation, ce); });
  });
}

template <typename T>
void plan_of(const Volume& v, const GradientView* out, Plan& plan) {
  const int64_t classes = v.classes;
  const auto bytes = [&](int voxels) {
    const TileLayout layout(static_cast<int>(classes), voxels, Plan::kThreads);
    // The most memory that any of the tiled kernels has, see there.
    const int64_t tiles = takes_general_tiles(v) ? 2 : 1;
    const int64_t table =
        out != nullptr ? kAllCoefficients * (classes + 1) : v.count_columns() * classes * layout.halves;
    const int64_t reals = tiles * classes * layout.tile_stride + table + 3 * layout.groups * voxels + 6 * voxels;
    return reals * static_cast<int64_t>(sizeof(Compute<T>)) + (voxels + 2) * static_cast<int64_t>(sizeof(int));
  };
  plan.voxels = fitting_tile(128, bytes);
  STD_TORCH_CHECK(plan.voxels > 0, "logits: the CUDA kernels have no room for ", classes, " classes");
  plan.shared_bytes = static_cast<int>(bytes(plan.voxels));
}

bool plan_tiled(const Volume& v, const GradientView* out, Plan& plan) {
  with_logits_type(v.logits.type, [&](auto element) { plan_of<decltype(element)>(v, out, plan); });
  return true;
}

int blocks_tiled(const Volume& v, const Plan&, bool gradient, int64_t) {
  return gradient ? gradient_blocks(v) : 4;
}

void count_tiled(const CountLaunch& launch) {
  with_tiled(launch.v, [&](auto element, auto activation, auto ce) {
    using T = decltype(element);
    constexpr Activation kActivation = decltype(activation)::value;
    // The kernels for labels have a cross-entropy only with a softmax.
    constexpr bool kCrossEntropy = decltype(ce)::value && kActivation == Activation::kSoftmax;
    if (takes_general_tiles(launch.v)) {
      launch.template run<T>(general_count_pass_kernel<T, kActivation>, launch.plan.voxels);
    } else {
      launch.template run<T>(tiled_count_pass_kernel<T, kActivation, kCrossEntropy>, launch.plan.voxels);
    }
  });
}

void gradient_tiled(const GradientLaunch& launch) {
  with_tiled(launch.v, [&](auto element, auto activation, auto ce) {
    using T = decltype(element);
    constexpr Activation kActivation = decltype(activation)::value;
    // Without an activation there is no cross-entropy, and the kernels for labels have one only with a softmax.
    constexpr bool kGeneral = decltype(ce)::value && kActivation != Activation::kNone;
    constexpr bool kCrossEntropy = decltype(ce)::value && kActivation == Activation::kSoftmax;
    if (takes_general_tiles(launch.v)) {
      launch.run(general_gradient_pass_kernel<T, kActivation, kGeneral>, launch.plan.voxels);
    } else {
      launch.run(tiled_gradient_pass_kernel<T, kActivation, kCrossEntropy>, launch.plan.voxels);
    }
  });
}

}  // namespace

const Family kTiled{"tiled", false, plan_tiled, blocks_tiled, count_tiled, gradient_tiled};

}  // namespace cuda
}  // namespace tversky_kernels
