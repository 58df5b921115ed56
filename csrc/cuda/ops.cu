// The operators on CUDA tensors: on the current stream of the tensors' device, without waiting for it.
#if !defined(TK_CUDA_ON_HOST)
#include <torch/csrc/stable/accelerator.h>
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../operators.h"
#include "kernels.h"

#if defined(TK_CUDA_ON_HOST)
#define TK_NAMESPACE tversky_kernels_cuda_on_host
#define TK_DISPATCH_KEY CPU
#else
#define TK_NAMESPACE tversky_kernels
#define TK_DISPATCH_KEY CUDA
// Only in a CUDA torch. Weak, so that a CPU-only torch can load this library.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace tversky_kernels {
namespace cuda {

namespace {

#if defined(TK_CUDA_ON_HOST)
struct Device {
  cudaStream_t stream = nullptr;
  int multiprocessors = 2, capability = 9;
  explicit Device(const Tensor&) {}
  void check_launch() const {}
};
#else
class Device {
 public:
  cudaStream_t stream = nullptr;
  int multiprocessors = 0, capability = 0;

  explicit Device(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), reinterpret_cast<void**>(&stream)));
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
    check(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, x.get_device_index()));
  }
  void check_launch() const { check(cudaGetLastError()); }

 private:
  static void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

bool is_double(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double;
}

// So few that the count pass's blocks end too close together for a rehearsal of the table.
constexpr int64_t kFewClasses = 4;

// The count pass, and the table: one launch each. a.counts: null where they are wanted for the table alone.
void run_forward(const Tensor& logits, const Volume& v, TableArguments a) {
  const Device device(logits);
  const bool any = v.samples * v.voxels > 0;
  const Plan plan = any ? make_plan(v, nullptr, device.multiprocessors) : Plan{};
  a.programs = any ? plan.blocks.programs : 1;  // where there is nothing to count, one block of zeros a sample
  a.partial_is_double = is_double(logits);
  // One allocation: counts (an even number, so that 16 bytes at once can be read of what follows), partial sums and
  // TableArguments::finished, in doubles.
  const int64_t all_counts = v.samples * v.count_columns() * v.classes, values = a.programs * all_counts;
  const int64_t counts = a.counts == nullptr ? (all_counts + 1) / 2 * 2 : 0,
                partial = a.partial_is_double ? values : (values + 1) / 2;
  const std::vector<int64_t> shape{counts + partial + 1};
  const Tensor memory = any ? torch::stable::new_empty(logits, shape, ScalarType::Double)
                            : torch::stable::new_zeros(logits, shape, ScalarType::Double);
  double* const start = memory.mutable_data_ptr<double>();
  if (a.counts == nullptr) a.counts = start;
  a.finished = reinterpret_cast<unsigned*>(start + counts + partial);
  if (any) {
    launch_count_pass(v, plan, start + counts, a.finished, device.stream);
    device.check_launch();
    a.begins_early = device.capability >= 9;
    a.rehearses = a.begins_early && v.classes > kFewClasses;
  }
  a.partial = v.samples > 0 ? start + counts : nullptr;
  launch_table(a, device.stream);
  device.check_launch();
}

void set_results(TableArguments& a, const Tensor& loss, const Tensor& coefficients) {
  a.loss = loss.mutable_data_ptr();
  a.loss_is_double = is_double(loss);
  a.coefficients = coefficients.mutable_data_ptr<double>();
}

struct Cuda {
  static void count(const Tensor& logits, const Volume& v, Check, const Tensor& counts) {
    TableArguments a{};
    a.table.samples = v.samples;
    a.table.classes = v.classes;
    a.table.has_cross_entropy = v.cross_entropy != CrossEntropy::kNone;
    a.counts = counts.mutable_data_ptr<double>();
    run_forward(logits, v, a);
  }

  static void evaluate(const Table& t, const Tensor& counts, const Tensor& loss, const Tensor& coefficients) {
    const Device device(counts);
    TableArguments a{};
    a.table = t;
    a.counts = const_cast<double*>(counts.const_data_ptr<double>());  // only read without partial sums
    set_results(a, loss, coefficients);
    launch_table(a, device.stream);
    device.check_launch();
  }

  static void forward(const Tensor& logits, const Volume& v, Check, const Table& t, const Tensor& loss,
                      const Tensor& coefficients) {
    TableArguments a{};
    a.table = t;
    set_results(a, loss, coefficients);
    run_forward(logits, v, a);
  }

  static Tensor new_gradient(const Tensor& logits) { return walkable(torch::stable::empty_like(logits), 2); }

  static void gradient(const Volume& v, const Tensor& grad_loss, const Tensor& coefficients, const Tensor& out) {
    const Device device(out);
    GradientArguments a{};
    a.grad_loss = grad_loss.const_data_ptr();
    a.grad_is_double = is_double(grad_loss);
    a.grad_classes = grad_loss.dim() == 0 ? 0 : grad_loss.size(grad_loss.dim() - 1);
    a.coefficients = coefficients.const_data_ptr<double>();
    a.row_stride = coefficients.size(0) == 1 ? 0 : 1;
    a.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), *single_stride(out, 2)};
    launch_gradient_pass(v, make_plan(v, &a.out, device.multiprocessors), a, device.stream);
    device.check_launch();
  }
};

bool aligned(const LogitsView& x, int64_t element_size, int64_t bytes) {
  return x.voxel_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0 &&
         x.sample_stride * element_size % bytes == 0 && x.class_stride * element_size % bytes == 0;
}

int bytes_of(ElementType type) {
  switch (type) {
    case ElementType::kBool:
    case ElementType::kUint8:
    case ElementType::kInt8: return 1;
    case ElementType::kHalf:
    case ElementType::kBFloat16:
    case ElementType::kInt16: return 2;
    case ElementType::kFloat:
    case ElementType::kInt32: return 4;
    default: return 8;
  }
}

bool is_resampled(const Volume& v) {
  return v.target.resampling.active || v.weight.resampling.active;
}

// Whether a dense target's part is made of products alone: see Plan::dense.
bool is_dense_by_products(const Volume& v) {
  return v.dense && v.overlap == OverlapForm::kProduct && v.cross_entropy != CrossEntropy::kSmoothed &&
         (v.cross_entropy == CrossEntropy::kNone || v.focal_gamma == 0) && !is_resampled(v);
}

// The same where the classes of a voxel lie side by side.
bool aligned_interleaved(const LogitsView& x, int64_t classes, int64_t element_size) {
  return x.class_stride == 1 && x.voxel_stride == classes && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         x.sample_stride * element_size % 16 == 0;
}

// The kernels whose blocks do not share voxels through memory: whole loads of plan.voxels, and not too many of them
// where a target or weight is resampled. A fresh gradient has the logits' strides or contiguous ones, which are as
// good.
bool can_be_read(const Volume& v, int64_t element_size, int voxels) {
  return v.voxels % voxels == 0 && aligned(v.logits, element_size, std::min<int64_t>(16, voxels * element_size)) &&
         !(is_resampled(v) && v.voxels >= int64_t{1} << 31);
}

// Lanes that share a voxel where a label is the target and one thread does not hold all classes; 0: there is no such
// kernel.
template <typename T>
int label_lanes(int64_t classes, bool squared) {
  return sizeof(T) < 8 ? split_lanes(classes, kMostLanes, squared ? kMostOfLaneSquared : kMostOfLane) : 0;
}

// Voxels that a thread of the kernels for one label a voxel takes at once.
template <typename T>
int voxels_at_once(int64_t classes, bool cross_entropy, bool few) {
  int voxels = kSplitVoxels;
  if (few) {
    with_few_classes<T>(classes, [&](auto c) {
      constexpr int kClasses = decltype(c)::value;
      voxels = cross_entropy ? kVoxelsOf<T, kClasses, true> : kVoxelsOf<T, kClasses, false>;
    });
  }
  return voxels;
}

// What follows returns false, and may leave the plan half made, where the kernels are not for this volume.
template <typename T>
bool plan_in_registers(const Volume& v, const GradientView* out, Plan& plan) {
  const int64_t classes = v.classes;
  if (v.activation != Activation::kSoftmax || classes < 2) return false;
  const bool cross_entropy = v.cross_entropy != CrossEntropy::kNone, squared = v.overlap == OverlapForm::kSquared;
  const auto label_values = [&](int n) {
    return cross_entropy ? label_sum_values<true>(n) : label_sum_values<false>(n);
  };
  int64_t values = 0;  // of Compute<T>, in shared memory
  int packs = 0;       // bytes there for tiles or for packs that are brought ahead
  const bool few = classes == 2 || (classes <= kMostInRegisters<T> && !squared);
  const bool lie_side_by_side = aligned_interleaved(v.logits, classes, sizeof(T)) &&
                                (out == nullptr || (out->class_stride == 1 && out->voxel_stride == classes));
  const bool smoothed = v.smooths_labels() && sizeof(T) < 8;
  const int lanes = few ? 1 : label_lanes<T>(classes, squared);
  plan.voxels = voxels_at_once<T>(classes, cross_entropy, few);
  // Those for any target take fewer voxels at once, so that whole loads allow more sizes.
  const bool few_interleaved = few && !smoothed && lie_side_by_side && v.voxels % plan.voxels == 0;
  plan.interleaved = lanes > 0 && !few && !squared && !smoothed && lie_side_by_side &&
                     v.voxels % (16 / static_cast<int>(sizeof(T))) == 0;
  plan.general = (v.is_general() && !smoothed) || is_resampled(v) ||
                 !(few_interleaved || plan.interleaved || can_be_read(v, sizeof(T), plan.voxels));
  plan.split = plan.general || !few;
  plan.interleaved = plan.interleaved && !plan.general;
  if (plan.general) {
    plan.voxels = kSplitVoxels;
    plan.dense = is_dense_by_products(v) && sizeof(T) < 8;
    const int most_of_lane = plan.dense ? kMostOfLaneDense : kMostOfLaneGeneral;
    plan.lanes = sizeof(T) < 8 ? split_lanes(classes, kMostLanesGeneral, most_of_lane) : 0;
    values = Plan::kThreads / kWarp * plan.lanes * v.count_columns() * most_of_lane;
    if (plan.dense && plan.lanes > 0) {
      with_dense_split_classes(classes, plan.lanes, [&](auto of_lane) {
        constexpr int kClasses = decltype(of_lane)::value;
        if (!(out == nullptr ? kDenseAhead<T, kClasses, false> : kDenseAhead<T, kClasses, true>)) return;
        const int bytes = bytes_of(v.target.type) <= 4 ? bytes_of(v.target.type) : 0;  // others do not come ahead
        // The sums come where the packs have been.
        const int sums = out == nullptr ? static_cast<int>(values * sizeof(Compute<T>)) : 0;
        packs = std::max(0, kClasses * (static_cast<int>(sizeof(T)) + bytes) * kSplitVoxels * Plan::kThreads - sums);
      });
    }
  } else if (!plan.split) {
    plan.lanes = 1;
    const int n = static_cast<int>(classes);
    with_label_sums(v, [&](auto ce, auto is_squared) {
      values = few_sum_values<decltype(ce)::value, decltype(is_squared)::value>(n);
    });
    if (out == nullptr && few_come_ahead<T>(n)) {
      packs = (n * static_cast<int>(sizeof(T)) + bytes_of(v.target.type)) * plan.voxels * Plan::kThreads;
    }
  } else {
    plan.lanes = lanes;
    with_split_labels(v, plan, [&](auto of_lane, auto, auto, auto turns) {
      constexpr int kClasses = decltype(of_lane)::value;
      values = label_values(kClasses);
      // Tiles, or a pack of each class; and a place of no class.
      const int labels = bytes_of(v.target.type) * kSplitVoxels * Plan::kThreads;
      if (decltype(turns)::value > 0) {
        const RowOfTile row(static_cast<int>(classes), sizeof(T));
        const int tile = Plan::kThreads / lanes / row.packs * row.stride * 16;
        packs = Plan::kThreads * static_cast<int>(sizeof(T)) + (kTileAhead<T> ? 2 * tile + labels : tile);
      } else if (out == nullptr ? kAhead<T, false> : kAhead<T, true>) {
        packs = (kClasses + 1) * static_cast<int>(sizeof(T)) * kSplitVoxels * Plan::kThreads + labels;
      }
    });
  }
  if (out != nullptr) values = kAllCoefficients * (classes + 1);
  plan.warps = std::max(1, plan.lanes / kMostLanesOfWarp);
  if (plan.warps > 1) values += kExchange;
  plan.shared_bytes = static_cast<int>(values * sizeof(Compute<T>)) + packs;
  return plan.lanes > 0 &&
         ((!plan.split && few_interleaved) || plan.interleaved || can_be_read(v, sizeof(T), plan.voxels));
}

template <typename T>
bool plan_by_channel(const Volume& v, Plan& plan) {
  plan.by_channel = true;
  plan.voxels = kChannelVoxels<T>;
  plan.shared_bytes = Plan::kThreads / kWarp * kAllCounts * sizeof(Compute<T>);
  const bool every_channel_decides = v.dense && v.has_ignore_index;  // whether a voxel counts
  return v.activation != Activation::kSoftmax && !every_channel_decides && can_be_read(v, sizeof(T), plan.voxels);
}

template <typename T>
void plan_tiled(const Volume& v, const GradientView* out, Plan& plan) {
  constexpr int kSharedBytes = 46 * 1024;      // what a block gets without asking for more
  constexpr int kMostSharedBytes = 96 * 1024;  // and by asking, on every card
  const int64_t classes = v.classes;
  const auto bytes = [&](int voxels) {
    const TileLayout layout(static_cast<int>(classes), voxels, Plan::kThreads);
    // The most that any of the tiled kernels keeps, see there.
    const int64_t tiles = takes_general_tiles(v) ? 2 : 1;
    const int64_t table =
        out != nullptr ? kAllCoefficients * (classes + 1) : v.count_columns() * classes * layout.halves;
    const int64_t reals = tiles * classes * layout.tile_stride + table + 3 * layout.groups * voxels + 6 * voxels;
    return reals * static_cast<int64_t>(sizeof(Compute<T>)) + (voxels + 2) * static_cast<int64_t>(sizeof(int));
  };
  plan.voxels = 128;
  while (plan.voxels > 1 && bytes(plan.voxels) > kSharedBytes) plan.voxels /= 2;
  STD_TORCH_CHECK(bytes(plan.voxels) <= kMostSharedBytes, "logits: the CUDA kernels have no room for ", classes,
                  " classes");
  plan.shared_bytes = static_cast<int>(bytes(plan.voxels));
}

// All blocks of a pass, for each multiprocessor: whole rounds of those that it holds at once, which are 4 for two
// classes without a cross-entropy, 2 or 3 for most. Each round of the count pass costs some microseconds and a sum of
// each block; of the gradient pass, more of them end closer together, and where classes are split, the warps of a block
// are the less apart the fewer pieces it has, so that they read and write what lies in one place of memory at about the
// same time (measured on an H100, all of it). pieces: of each multiprocessor.
int blocks_of_multiprocessor(const Volume& v, const Plan& plan, bool gradient, int64_t pieces) {
  const bool cross_entropy = v.cross_entropy != CrossEntropy::kNone;
  const bool two = plan.lanes == 1 && v.classes == 2, four = two && !plan.split && !cross_entropy;
  const bool half = v.logits.type == ElementType::kHalf || v.logits.type == ElementType::kBFloat16;
  const bool split_labels = plan.split && !plan.general;
  if (gradient && split_labels) {  // some ten pieces a block, more where a block has more to begin with
    const int64_t of_block = plan.warps > 1 ? 16 : 10;
    return static_cast<int>(std::clamp<int64_t>(pieces / of_block / 2 * 2, half ? 6 : 24, 48));
  }
  if (gradient) return !half ? 24 : four ? 4 : 6;
  if (half && plan.lanes == 1 && !plan.split && v.classes == 4 && !cross_entropy) return 4;
  if (split_labels && half) return 2;
  return four || (two && plan.dense) || split_labels || (plan.lanes == 0 && !plan.by_channel) ? 4 : 6;
}

}  // namespace

Plan make_plan(const Volume& v, const GradientView* out, int multiprocessors) {
  Plan plan{};
  with_logits_type(v.logits.type, [&](auto element) {
    using T = decltype(element);
    if (plan_in_registers<T>(v, out, plan)) return;
    if (plan_by_channel<T>(v, plan = {})) return;
    plan_tiled<T>(v, out, plan = {});
  });
  const bool tiled = plan.lanes == 0 && !plan.by_channel;
  const int64_t rows = std::max<int64_t>(1, plan.by_channel ? v.samples * v.classes : v.samples);
  const int64_t of_block = tiled ? plan.voxels : int64_t{plan.voxels} * Plan::kThreads / std::max(1, plan.lanes);
  const int64_t pieces = (v.voxels + of_block - 1) / of_block;
  const int of_one = blocks_of_multiprocessor(v, plan, out != nullptr, rows * pieces / multiprocessors);
  const int64_t blocks = static_cast<int64_t>(multiprocessors) * of_one;
  int64_t programs = std::max<int64_t>(1, std::min(pieces, blocks / rows));
  if (out == nullptr) {
    // A thread's sums are float, and where all voxels are alike each addition rounds the same way: whole rounds of
    // blocks more, so that none adds up too many.
    constexpr int64_t kMostTurns = 32;
    const int64_t turns = (pieces + programs - 1) / programs;
    const int64_t rounds = std::max<int64_t>(1, (turns + kMostTurns - 1) / kMostTurns);
    programs = std::max<int64_t>(1, std::min(pieces, programs * rounds));
  }
  // Two blocks a multiprocessor run at once at the least.
  const int64_t groups = std::max<int64_t>(1, programs / (2 * static_cast<int64_t>(multiprocessors)));
  const int64_t group = programs / groups;
  plan.blocks = {static_cast<int>(groups * group), static_cast<int>(group), static_cast<int>(of_block),
                 static_cast<int>(pieces / groups), static_cast<int>(pieces % groups)};
  return plan;
}

}  // namespace cuda
}  // namespace tversky_kernels

STABLE_TORCH_LIBRARY_IMPL(TK_NAMESPACE, TK_DISPATCH_KEY, m) {
  tversky_kernels::Operators<tversky_kernels::cuda::Cuda>::implement(m);
}

#if !defined(TK_CUDA_ON_HOST)
#define TK_STRING_OF(x) #x
#define TK_STRING(x) TK_STRING_OF(x)
// What setup.py had nvcc compile for, like "sm_80.sm_90.compute_90".
extern "C" __attribute__((visibility("default"))) const char* tversky_kernels_cuda_code() {
  return TK_STRING(TK_CUDA_CODE);
}
// Of the CUDA that compiled this library, and the newest that the driver here runs; 0 where it does not say.
extern "C" __attribute__((visibility("default"))) void tversky_kernels_cuda_versions(int* own, int* drivers) {
  *own = CUDART_VERSION;
  if (cudaDriverGetVersion(drivers) != cudaSuccess) *drivers = 0;
}
#endif
