// The family "regions": voxels are counted in the rows of their regions, with any target and activation. A block holds
// a tile of voxels of all classes in shared memory (tile.cuh). In the count pass a warp takes one class. It keeps the
// sums of one region in registers and adds them to the region's row when it meets another region. The rows are a table
// that belongs to a few warps of one block, so that no two warps add to one number, and the sums are always the same.
// In the gradient pass each voxel takes the coefficients of its region.
#include "dispatch.h"
#include "launch.h"
#include "own_targets.cuh"
#include "tile.cuh"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

namespace tversky_kernels {
namespace cuda {
namespace {

constexpr int kWarps = Plan::kThreads / kWarp;

// A block's shared memory, by offsets: pointers would take twice the registers. Reals: logits [C][tile_stride], targets
// [C][tile_stride], reduction [3][groups][voxels] and some rows [voxels]. Integers: labels [voxels], regions [1 or C]
// [voxels] (-1: none) and any_bad.
template <typename A>
class RegionTile {
 public:
  TileLayout layout;
  int voxels, classes, id_rows;

  __host__ __device__ RegionTile(unsigned char* memory, int classes_, int id_rows_, int voxels_)
      : layout(classes_, voxels_, Plan::kThreads),
        voxels(voxels_),
        classes(classes_),
        id_rows(id_rows_),
        memory_(reinterpret_cast<A*>(memory)),
        rows_at_(2 * classes_ * layout.tile_stride + kReductionRows * layout.groups * voxels_) {}
  __host__ int64_t bytes() const {
    return (rows_at_ + kRows * voxels) * static_cast<int64_t>(sizeof(A)) +
           ((1 + id_rows) * voxels + 1) * static_cast<int64_t>(sizeof(int));
  }

  __device__ __forceinline__ A* logits() const { return memory_; }
  __device__ __forceinline__ A* targets() const { return memory_ + classes * layout.tile_stride; }
  __device__ __forceinline__ A* reduction() const { return memory_ + 2 * classes * layout.tile_stride; }
  __device__ __forceinline__ A* weights() const { return row(0); }
  __device__ __forceinline__ A& logit(int c, int k) const { return logits()[c * layout.tile_stride + k]; }
  __device__ __forceinline__ A target(int c, int k) const { return targets()[c * layout.tile_stride + k]; }
  __device__ __forceinline__ A weight(int k) const { return row(0)[k]; }
  __device__ __forceinline__ A& beyond_one(int k) const { return row(1)[k]; }
  __device__ __forceinline__ A& log_sum(int k) const { return row(2)[k]; }
  // The logit of class 0 with all classes that belong to it.
  __device__ __forceinline__ A& background(int k) const { return row(3)[k]; }
  // Of the gradient pass: see DenseSoftmaxGradient and cross_entropy_slope.
  __device__ __forceinline__ A& shift(int k) const { return row(4)[k]; }
  __device__ __forceinline__ A& excess(int k) const { return row(5)[k]; }
  __device__ __forceinline__ A& b_all(int k) const { return row(6)[k]; }
  __device__ __forceinline__ int* labels() const { return reinterpret_cast<int*>(row(kRows)); }
  __device__ __forceinline__ int& label(int k) const { return labels()[k]; }
  __device__ __forceinline__ int& id(int i) const { return labels()[voxels + i]; }
  __device__ __forceinline__ int region(int c, int k) const { return id((id_rows == 1 ? 0 : c * voxels) + k); }
  __device__ __forceinline__ int& any_bad() const { return id(id_rows * voxels); }

 private:
  static constexpr int kRows = 7, kReductionRows = 3;

  __device__ __forceinline__ A* row(int i) const { return memory_ + rows_at_ + i * voxels; }

  A* memory_;
  int rows_at_;
};

// Which classes of a sample belong to its class 0; null: none does.
__device__ __forceinline__ const uint8_t* merged_classes(const RegionVolume& r, int64_t sample) {
  if (r.merged == nullptr) return nullptr;
  const uint8_t* of_sample = r.merged + sample * r.volume.classes;
  bool any = false;
  for (int64_t c = 1; c < r.volume.classes; ++c) any |= of_sample[c] != 0;
  return any ? of_sample : nullptr;
}
__device__ __forceinline__ bool is_merged(const uint8_t* merged, int c) {
  return merged != nullptr && c > 0 && merged[c] != 0;
}

// The regions of a tile. A voxel that is in none does not count. True: this thread has found one out of range.
template <typename A>
__device__ bool load_regions(const RegionVolume& r, int64_t sample, int64_t begin, int count, const RegionTile<A>& t) {
  bool bad = false;
  const int log_voxels = log2_of(t.voxels);
#pragma unroll 1
  for (int i = threadIdx.x; i < t.id_rows << log_voxels; i += Plan::kThreads) {
    const int c = i >> log_voxels, k = i - (c << log_voxels);
    int64_t id = k < count ? 0 : -1;
    if (k < count && r.regions.data != nullptr) {
      const int64_t at = sample * r.regions.sample_stride + c * r.regions.class_stride + r.regions.offset(begin + k);
      with_label_type(r.regions.type, [&](auto element) {
        id = static_cast<int64_t>(static_cast<const decltype(element)*>(r.regions.data)[at]);
      });
    }
    bad |= id >= r.count;
    const int region = id < 0 || id >= r.count ? -1 : static_cast<int>(id);
    t.id(i) = region;
    if (t.id_rows == 1 && region < 0) t.label(k) = kUncounted;
  }
  __syncthreads();
  if (t.id_rows == 1) return bad;
  for (int k = threadIdx.x; k < t.voxels; k += Plan::kThreads) {
    bool in_any = false;
#pragma unroll 1
    for (int c = 0; c < t.id_rows; ++c) in_any |= t.id(c * t.voxels + k) >= 0;
    if (!in_any) t.label(k) = kUncounted;
  }
  __syncthreads();
  return bad;
}

// The softmax has the probabilities of merged classes in that of class 0: its logit becomes the logarithm of the sum of
// their exponentials, and theirs -inf.
template <typename A>
__device__ void merge_classes(const uint8_t* merged, const RegionTile<A>& t) {
  for (int k = threadIdx.x; k < t.voxels; k += Plan::kThreads) {
    A top = t.logit(0, k);
#pragma unroll 1
    for (int c = 1; c < t.classes; ++c) {
      if (is_merged(merged, c)) top = larger(top, t.logit(c, k));
    }
    A sum = A(0);
#pragma unroll 1
    for (int c = 0; c < t.classes; ++c) {
      if (c > 0 && !is_merged(merged, c)) continue;
      A& z = t.logit(c, k);
      sum += z == top ? A(1) : exponential(z - top);  // -inf less itself is 0 here
      if (c > 0) z = static_cast<A>(-INFINITY);
    }
    t.logit(0, k) = t.background(k) = top + logarithm(sum);
  }
  __syncthreads();
}

// Fills the tile; of a softmax the logits become z_top - z. True: this thread has found a value out of range. All
// threads must call.
template <typename T, Activation kActivation>
__device__ bool load_region_tile(const RegionVolume& r, const uint8_t* merged, const T* rows, int64_t sample,
                                 int64_t begin, int count, const RegionTile<Compute<T>>& t) {
  using A = Compute<T>;
  bool bad = load_general_tile<T>(r.volume, rows, sample, begin, count, t.logits(), t.targets(), t.layout.tile_stride,
                                  t.voxels, t.labels(), t.weights());
  bad |= load_regions(r, sample, begin, count, t);
  if (kActivation != Activation::kSoftmax) return bad;
  if (merged != nullptr) merge_classes(merged, t);
  const TileThread thread(t.layout, t.voxels);
  const TopSums<A> total = top_of_tile(t.logits(), t.layout, t.reduction(), t.classes, t.voxels, thread);
  if (thread.group == 0) {
    t.beyond_one(thread.voxel) = total.beyond_one();
    t.log_sum(thread.voxel) = r.volume.cross_entropy != CrossEntropy::kNone ? log_one_plus(total.beyond_one()) : A(0);
  }
  __syncthreads();
  return bad;
}

// A lane's sums of a class in one region, the same region in all lanes of the warp.
template <typename A>
class RunningSums {
 public:
  // rows: [R][C][columns] of the warp, at its class.
  __device__ __forceinline__ RunningSums(const Volume& v, double* rows) : v_(v), rows_(rows) {}

  // All lanes call, with the region of their voxel: -1 for none.
  __device__ __forceinline__ void add(int region, const GeneralSums<A>& of_voxel) {
    const unsigned lane = threadIdx.x % kWarp;
    unsigned pending = __ballot_sync(kFullWarp, region >= 0);
    if (pending == 0) return;
    int found = __shfl_sync(kFullWarp, region, __ffs(static_cast<int>(pending)) - 1);
    if (__ballot_sync(kFullWarp, region == found) != pending) {
      // Of several regions: a lane that is alone in its region adds to the region's row itself.
      const bool alone = __match_any_sync(kFullWarp, region) == 1u << lane && region >= 0;
      if (alone) add_alone(region, of_voxel);
      __syncwarp();
      pending &= ~__ballot_sync(kFullWarp, alone);
    }
    while (pending != 0) {
      found = __shfl_sync(kFullWarp, region, __ffs(static_cast<int>(pending)) - 1);
      if (found != region_) flush();
      region_ = found;
      const bool here = region == found;
      if (here) add_to_sums(of_voxel);
      pending &= ~__ballot_sync(kFullWarp, here);
    }
  }

  // All lanes call.
  __device__ __forceinline__ void flush() {
    if (region_ < 0) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const A values[] = {sums_.tp, sums_.fp, sums_.fn, sums_.ce, sums_.smoothing, sums_.voxels};
    A mine = A(0);
#pragma unroll
    for (int i = 0; i < kAllCounts; ++i) {
      if (i >= columns()) break;
      const A total = warp_sum(values[i]);
      if (lane == i) mine = total;
    }
    const A members = warp_sum(members_);
    if (lane == columns()) mine = members;
    if (lane <= columns()) row(region_)[lane] += static_cast<double>(mine);
    __syncwarp();
    sums_ = GeneralSums<A>{};
    members_ = A(0);
    region_ = -1;
  }

 private:
  __device__ __forceinline__ void add_to_sums(const GeneralSums<A>& x) {
    sums_.tp += x.tp;
    sums_.fp += x.fp;
    sums_.fn += x.fn;
    sums_.ce += x.ce;
    sums_.smoothing += x.smoothing;
    sums_.voxels += x.voxels;
    members_ += A(1);
  }
  __device__ __forceinline__ void add_alone(int region, const GeneralSums<A>& x) const {
    double* const at = row(region);
    const A values[] = {x.tp, x.fp, x.fn, x.ce, x.smoothing, x.voxels};
#pragma unroll
    for (int i = 0; i < kAllCounts; ++i) {
      if (i < columns()) at[i] += static_cast<double>(values[i]);
    }
    at[columns()] += 1.0;
  }

  // Asked for again each time, as registers are few.
  __device__ __forceinline__ int columns() const { return v_.count_columns(); }
  __device__ __forceinline__ double* row(int region) const { return rows_ + region * (v_.classes * (columns() + 1)); }

  const Volume& v_;
  double* rows_;
  GeneralSums<A> sums_{};
  A members_{};
  int region_ = -1;
};

// A voxel's part of a class's counts.
template <Activation kActivation, typename A>
__device__ __forceinline__ GeneralSums<A> counts_of_voxel(const Volume& v, const RegionTile<A>& t, int c, int k,
                                                          bool is_part, bool& bad) {
  const A x = t.logit(c, k), g = t.target(c, k);
  bad |= is_bad_target(v, g);
  GeneralSums<A> sums;
  if constexpr (kActivation == Activation::kSoftmax) {
    // Of a merged class only TP + FN is asked for, which tells whether it is a label.
    const bool cross_entropy = v.cross_entropy != CrossEntropy::kNone && !is_part;
    sums.add_below_top(v, x, t.beyond_one(k), t.log_sum(k), g, t.weight(k), cross_entropy);
  } else {
    sums.template add_channel<kActivation>(v, x, g, t.weight(k));
  }
  return sums;
}

// tables: [sample][program][copies][R][C][columns + 1], zeros before.
template <typename T, Activation kActivation>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    region_count_pass_kernel(const RegionVolume r, double* tables, const Blocks blocks, int tile_voxels, int copies) {
  using A = Compute<T>;
  const Volume& v = r.volume;
  const int classes = static_cast<int>(v.classes), columns = v.count_columns() + 1;
  TK_SHARED(memory);
  const RegionTile<A> t(memory, classes, r.by_class ? classes : 1, tile_voxels);
  const Share share = share_of_block<Order::kBackward>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  const uint8_t* merged = merged_classes(r, share.sample);
  const int64_t table_size = r.count * classes * columns;
  double* of_block = tables + (share.sample * blocks.programs + share.program) * copies * table_size;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  if (threadIdx.x == 0) t.any_bad() = 0;
  __syncthreads();

  const int pairs = classes * copies;
  bool bad = false;
  for_each_tile<Order::kBackward>(share, tile_voxels, [&](int64_t begin, int count) {
    bad |= load_region_tile<T, kActivation>(r, merged, rows, share.sample, begin, count, t);
    // A class and a copy of the table belong to one warp.
#pragma unroll 1
    for (int pair = warp; pair < pairs; pair += kWarps) {
      const int copy = pair / classes, c = pair - copy * classes;
      const bool is_part = is_merged(merged, c);
      RunningSums<A> sums(v, of_block + copy * table_size + c * columns);
#pragma unroll 1
      for (int first = copy * kWarp; first < count; first += copies * kWarp) {
        const int k = first + lane;
        const int region = k < count && t.label(k) != kUncounted ? t.region(c, k) : -1;
        GeneralSums<A> of_voxel;
        if (region >= 0) of_voxel = counts_of_voxel<kActivation>(v, t, c, k, is_part, bad);
        sums.add(region, of_voxel);
      }
      sums.flush();
    }
  });
  if (bad) t.any_bad() = 1;
  __syncthreads();
  if (t.any_bad() == 0) return;
  for (int64_t i = threadIdx.x; i < table_size; i += Plan::kThreads) of_block[i] = static_cast<double>(NAN);
}

// Columns that a block of sum_tables_kernel adds up, and the threads of each.
constexpr int kTogether = 8, kSlices = Plan::kThreads / kTogether;

// counts[sample][i], the sum over the tables of a sample, always in the same order.
__global__ void __launch_bounds__(Plan::kThreads)
    sum_tables_kernel(const double* __restrict__ tables, int64_t size, int64_t of_sample, double* counts) {
  TK_SHARED(memory);
  double* sums = reinterpret_cast<double*>(memory);  // [kSlices][kTogether]
  const int64_t slices = (size + kTogether - 1) / kTogether, sample = blockIdx.x / slices;
  const int column = static_cast<int>(threadIdx.x) % kTogether, slice = static_cast<int>(threadIdx.x) / kTogether;
  const int64_t i = (blockIdx.x - sample * slices) * kTogether + column;
  const double* from = tables + sample * of_sample * size + i;
  double sum = 0;
  if (i < size) {
#pragma unroll 8
    for (int64_t p = slice; p < of_sample; p += kSlices) sum += from[p * size];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || i >= size) return;
  for (int s = 1; s < kSlices; ++s) sum += sums[s * kTogether + column];
  counts[sample * size + i] = sum;
}

// The coefficients as the gradient pass reads them, one load for each voxel and class.
template <typename A>
__global__ void __launch_bounds__(Plan::kThreads)
    region_coefficients_kernel(const double* __restrict__ from, int64_t rows, OverlapForm form, bool cross_entropy,
                               Packed<A, kAllCoefficients>* to) {
  const int width = cross_entropy ? kAllCoefficients : kOverlapCoefficients;
  for (int64_t i = blockIdx.x * int64_t{Plan::kThreads} + threadIdx.x; i < rows;
       i += gridDim.x * int64_t{Plan::kThreads}) {
    const double* u = from + i * width;
    Packed<A, kAllCoefficients> of_row{};
    of_row.values[kBackground] = static_cast<A>(u[kBackground]);
    of_row.values[kForeground] = static_cast<A>(foreground_coefficient(u, form));
    if (cross_entropy) {
      of_row.values[kCeCoefficient] = static_cast<A>(u[kCeCoefficient]);
      of_row.values[kSmoothingCoefficient] = static_cast<A>(u[kSmoothingCoefficient]);
    }
    to[i] = of_row;
  }
}

// coefficients: [sample][R][C].
template <typename T, Activation kActivation>
__global__ void __launch_bounds__(Plan::kThreads, 2)
    region_gradient_pass_kernel(const RegionVolume r,
                                const Packed<Compute<T>, kAllCoefficients>* __restrict__ coefficients,
                                const GradientView view, const Blocks blocks, int tile_voxels) {
  using A = Compute<T>;
  const Volume& v = r.volume;
  const int classes = static_cast<int>(v.classes);
  const bool cross_entropy = v.cross_entropy != CrossEntropy::kNone;
  TK_SHARED(memory);
  const RegionTile<A> t(memory, classes, r.by_class ? classes : 1, tile_voxels);
  const TileThread thread(t.layout, tile_voxels);
  const Share share = share_of_block<Order::kForward>(v, blocks);
  const T* rows = static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride;
  T* out = static_cast<T*>(view.data) + share.sample * view.sample_stride;
  const uint8_t* merged = merged_classes(r, share.sample);
  const auto* of_sample = coefficients + share.sample * r.count * classes;
  const auto coefficients_of = [&](int c, int k) {
    Coefficients<A> u{A(0), A(0), A(0), A(0)};
    const int region = t.region(c, k);
    if (region < 0) return u;
    const auto of_row = load_packed<A, kAllCoefficients>(of_sample[region * classes + c].values);
    u.background = of_row.values[kBackground];
    u.foreground = of_row.values[kForeground];
    u.ce = of_row.values[kCeCoefficient];
    u.smoothing = of_row.values[kSmoothingCoefficient];
    return u;
  };
  const auto probability = [&](A below_top, int k) {
    return dense_probability(below_top, t.beyond_one(k), reciprocal(A(1) + t.beyond_one(k)));
  };

  for_each_tile<Order::kForward>(share, tile_voxels, [&](int64_t begin, int count) {
    // Values out of range: the count pass has reported them, and the coefficients are NaN then.
    load_region_tile<T, kActivation>(r, merged, rows, share.sample, begin, count, t);
    if constexpr (kActivation == Activation::kSoftmax) {
      A sums[3] = {A(0), A(0), A(0)};  // rest_u, top_u and the sum of b
      if (thread.works && t.label(thread.voxel) != kUncounted) {
        const int k = thread.voxel;
        for (int c = thread.group; c < classes; c += t.layout.groups) {
          if (is_merged(merged, c)) continue;
          const A below_top = t.logit(c, k);
          add_slopes(v, coefficients_of(c, k), probability(below_top, k), below_top, t.log_sum(k), t.target(c, k),
                     cross_entropy, sums);
        }
      }
      sum_over_groups(sums, t.layout, t.reduction(), tile_voxels, thread);
      if (thread.group == 0) {
        const A beyond_one = t.beyond_one(thread.voxel);
        const DenseSoftmaxGradient<A> gradient =
            dense_softmax_gradient(sums[0], sums[1], beyond_one, reciprocal(A(1) + beyond_one));
        t.shift(thread.voxel) = gradient.shift;
        t.excess(thread.voxel) = gradient.excess;
        t.b_all(thread.voxel) = sums[2];
      }
      __syncthreads();
    }
    const auto gradient_of = [&](int c, int k) {
      const A x = t.logit(c, k), g = t.target(c, k);
      const Coefficients<A> u = coefficients_of(c, k);
      if constexpr (kActivation == Activation::kSoftmax) {
        const DenseSoftmaxGradient<A> gradient{t.shift(k), t.excess(k)};
        return class_gradient(v, u, probability(x, k), x, t.log_sum(k), g, gradient, t.b_all(k), cross_entropy);
      } else if (cross_entropy) {
        return channel_gradient<kActivation, kActivation == Activation::kSigmoid>(v, u, x, g);
      } else {
        return channel_gradient<kActivation, false>(v, u, x, g);
      }
    };
    const T* first_logit = rows + begin * v.logits.voxel_stride;
    T* first = out + begin * view.voxel_stride;
    for_each_element<1>(classes, tile_voxels, view.voxel_stride != 1, [&](int c, int k) {
      if (k >= count) return;
      A dz = A(0);
      if (t.label(k) != kUncounted) {
        const bool is_part = merged != nullptr && (c == 0 || is_merged(merged, c));
        dz = gradient_of(is_part ? 0 : c, k) * t.weight(k);
        if (is_part && dz != A(0)) {  // in place, only this thread writes over the logit
          const A z = static_cast<A>(first_logit[c * v.logits.class_stride + k * v.logits.voxel_stride]);
          dz *= exponential(z - t.background(k));
        }
      }
      first[c * view.class_stride + k * view.voxel_stride] = static_cast<T>(dz);
    });
  });
}

// Copies of a block's table: the fewest for which three quarters of the warps have work.
int copies_of(int64_t classes) {
  int copies = 1;
  for (; copies < kWarps; copies *= 2) {
    const int64_t pairs = classes * copies, rounds = (pairs + kWarps - 1) / kWarps;
    if (4 * pairs >= 3 * rounds * kWarps) break;
  }
  return copies;
}

template <typename A>
void plan_tile(const RegionVolume& r, RegionPlan& plan) {
  const int64_t classes = r.volume.classes;
  STD_TORCH_CHECK(r.count * classes <= INT32_MAX, "num_regions: expected at most ", INT32_MAX / classes, ", got ",
                  r.count);
  const auto bytes = [&](int voxels) {
    return RegionTile<A>(nullptr, static_cast<int>(classes), r.by_class ? static_cast<int>(classes) : 1, voxels)
        .bytes();
  };
  // More classes than bytes of shared memory would overflow its sizes.
  plan.tile_voxels = classes < INT16_MAX ? fitting_tile(Plan::kThreads, bytes) : 0;
  STD_TORCH_CHECK(plan.tile_voxels > 0, "logits: the CUDA kernels have no room for ", classes, " classes");
  plan.shared_bytes = static_cast<int>(bytes(plan.tile_voxels));
}

dim3 blocks_for(int64_t rows) {
  return dim3(static_cast<unsigned>(std::min<int64_t>((rows + Plan::kThreads - 1) / Plan::kThreads, 1024)));
}

}  // namespace

RegionPlan make_region_plan(const RegionVolume& r, bool gradient, int multiprocessors) {
  constexpr int64_t kTableBytes = 64 << 20;  // of all tables together
  const Volume& v = r.volume;
  RegionPlan plan{};
  with_logits_type(v.logits.type, [&](auto element) { plan_tile<Compute<decltype(element)>>(r, plan); });
  plan.copies = copies_of(v.classes);
  plan.table_size = r.count * v.classes * (v.count_columns() + 1);
  const int64_t pieces = (v.voxels + plan.tile_voxels - 1) / plan.tile_voxels;
  int64_t blocks = int64_t{multiprocessors} * (gradient ? 24 : 4);
  if (!gradient) {
    const int64_t of_block = plan.table_size * plan.copies * static_cast<int64_t>(sizeof(double));
    blocks = std::min(blocks, kTableBytes / of_block);
  }
  // None where there is nothing to count.
  const int64_t programs = std::min(pieces, std::max<int64_t>(1, blocks / std::max<int64_t>(1, v.samples)));
  plan.blocks = {static_cast<int>(programs), static_cast<int>(programs), plan.tile_voxels, static_cast<int>(pieces), 0};
  return plan;
}

void launch_region_count_pass(const RegionVolume& r, const RegionPlan& plan, double* tables, double* counts,
                              cudaStream_t stream) {
  const Volume& v = r.volume;
  const unsigned blocks = static_cast<unsigned>(v.samples * plan.blocks.programs);
  if (v.voxels > 0) {
    with_type_and_activation(v, [&](auto element, auto activation) {
      const auto kernel = region_count_pass_kernel<decltype(element), decltype(activation)::value>;
      allow_shared_bytes(kernel, plan.shared_bytes);
      TK_LAUNCH((kernel), dim3(blocks), dim3(Plan::kThreads), plan.shared_bytes, stream, r, tables, plan.blocks,
                plan.tile_voxels, plan.copies);
    });
  }
  const int64_t slices = (plan.table_size + kTogether - 1) / kTogether;
  TK_LAUNCH((sum_tables_kernel), dim3(static_cast<unsigned>(v.samples * slices)), dim3(Plan::kThreads),
            Plan::kThreads * sizeof(double), stream, tables, plan.table_size, plan.tables(), counts);
}

void launch_region_gradient_pass(const RegionVolume& r, const RegionPlan& plan, const double* coefficients,
                                 void* memory, const GradientView& out, cudaStream_t stream) {
  const Volume& v = r.volume;
  const unsigned blocks = static_cast<unsigned>(v.samples * plan.blocks.programs);
  const int64_t rows = v.samples * r.count * v.classes;
  with_type_and_activation(v, [&](auto element, auto activation) {
    using T = decltype(element);
    auto* table = static_cast<Packed<Compute<T>, kAllCoefficients>*>(memory);
    TK_LAUNCH((region_coefficients_kernel<Compute<T>>), blocks_for(rows), dim3(Plan::kThreads), 0, stream, coefficients,
              rows, v.overlap, v.cross_entropy != CrossEntropy::kNone, table);
    const auto kernel = region_gradient_pass_kernel<T, decltype(activation)::value>;
    allow_shared_bytes(kernel, plan.shared_bytes);
    TK_LAUNCH((kernel), dim3(blocks), dim3(Plan::kThreads), plan.shared_bytes, stream, r, table, out, plan.blocks,
              plan.tile_voxels);
  });
}

}  // namespace cuda
}  // namespace tversky_kernels
