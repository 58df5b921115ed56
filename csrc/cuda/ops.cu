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
  int multiprocessors = 2;
  explicit Device(const Tensor&) {}
  void check_launch() const {}
};
#else
class Device {
 public:
  cudaStream_t stream = nullptr;
  int multiprocessors = 0;

  explicit Device(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), reinterpret_cast<void**>(&stream)));
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
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

// The count pass, and the table: one launch each.
void run_forward(const Tensor& logits, const Volume& v, TableArguments a) {
  const Device device(logits);
  const ScalarType type = is_double(logits) ? ScalarType::Double : ScalarType::Float;
  Tensor partial;
  a.programs = 1;
  if (v.samples * v.voxels > 0) {
    const Plan plan = make_plan(v, false, device.multiprocessors);
    a.programs = plan.programs;
    const std::vector<int64_t> shape{v.samples, plan.programs, v.count_columns(), v.classes};
    partial = torch::stable::new_empty(logits, shape, type);
    launch_count_pass(v, plan, partial.mutable_data_ptr(), device.stream);
    device.check_launch();
  } else {
    // Nothing to count: one block of zeros a sample.
    const std::vector<int64_t> shape{v.samples, 1, v.count_columns(), v.classes};
    partial = torch::stable::new_zeros(logits, shape, type);
  }
  a.partial = partial.const_data_ptr();
  a.partial_is_double = type == ScalarType::Double;
  launch_table(a, device.stream);
  device.check_launch();
}

void set_results(TableArguments& a, const Tensor& loss, const Tensor& coefficients) {
  a.loss = loss.mutable_data_ptr();
  a.loss_is_double = is_double(loss);
  a.coefficients = coefficients.mutable_data_ptr<double>();
}

struct Cuda {
  static void count(const Tensor& logits, const Volume& v, bool, const Tensor& counts) {
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

  static void forward(const Tensor& logits, const Volume& v, bool, const Table& t, const Tensor& loss,
                      const Tensor& coefficients) {
    const std::vector<int64_t> shape{v.samples, v.classes, v.count_columns()};
    const Tensor counts = torch::stable::new_empty(logits, shape, ScalarType::Double);
    TableArguments a{};
    a.table = t;
    a.counts = counts.mutable_data_ptr<double>();
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
    launch_gradient_pass(v, make_plan(v, true, device.multiprocessors), a, device.stream);
    device.check_launch();
  }
};

bool aligned(const LogitsView& x, int64_t element_size, int64_t bytes) {
  return x.voxel_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0 &&
         x.sample_stride * element_size % bytes == 0 && x.class_stride * element_size % bytes == 0;
}

}  // namespace

Plan make_plan(const Volume& v, bool backward, int multiprocessors) {
  constexpr int kSharedBytes = 46 * 1024;  // what a block gets without asking for more
  Plan plan{};
  const int64_t element = v.logits.type == ElementType::kDouble ? 8 : v.logits.type == ElementType::kFloat ? 4 : 2;
  const int64_t real = element == 8 ? 8 : 4, classes = v.classes;
  int64_t pieces = 0;
  with_logits_type(v.logits.type, [&](auto e) {
    using T = decltype(e);
    if (v.activation != Activation::kSoftmax || v.is_general()) return;
    if (v.target.resampling.active || v.weight.resampling.active) return;
    const bool few = classes <= kMostInRegisters<T>, split = !few && element < 8 && classes <= kMostLanes * kMostOfLane;
    if (classes < 2 || !(few || split)) return;
    const int lanes = few ? 1 : split_lanes(classes);
    if (few) with_few_classes<T>(classes, [&](auto c) { plan.voxels = kVoxelsOf<T, decltype(c)::value>; });
    if (split) plan.voxels = kSplitVoxels;
    // A fresh gradient has the logits' strides or, where those leave gaps, contiguous ones: whole loads of `voxels`.
    if (!aligned(v.logits, element, plan.voxels * element) || v.voxels % plan.voxels != 0) return;
    plan.lanes = lanes;
    const bool cross_entropy = v.cross_entropy != CrossEntropy::kNone;
    if (backward) {
      plan.shared_bytes = static_cast<int>(3 * classes * real);  // of_class
    } else if (few) {
      const int64_t values = cross_entropy ? kSmoothing * classes + 1 : kOverlapCounts * classes;
      plan.shared_bytes = static_cast<int>(Plan::kThreads / kWarp * values * real);
    } else {
      with_split_classes(classes, lanes, [&](auto of_lane) {
        plan.shared_bytes =
            static_cast<int>((cross_entropy ? 3 : 2) * decltype(of_lane)::value * Plan::kThreads * real);
      });
    }
    const int64_t each = static_cast<int64_t>(plan.voxels) * Plan::kThreads / lanes;
    pieces = (v.voxels + each - 1) / each;
  });
  if (plan.lanes == 0) {
    const auto bytes = [&](int voxels) {
      const TileLayout layout(static_cast<int>(classes), voxels, Plan::kThreads);
      // The most that any of the tiled kernels keeps, see there.
      const int64_t tiles = v.is_general() ? 2 : 1;
      const int64_t table = backward ? kAllCoefficients * classes : v.count_columns() * classes * layout.halves;
      const int64_t reals = tiles * classes * layout.tile_stride + table + 3 * layout.groups * voxels + 6 * voxels;
      return reals * real + (voxels + 2) * static_cast<int64_t>(sizeof(int));
    };
    plan.voxels = 128;
    while (plan.voxels > 1 && bytes(plan.voxels) > kSharedBytes) plan.voxels /= 2;
    STD_TORCH_CHECK(bytes(plan.voxels) <= kSharedBytes,
                    "logits: the CUDA kernels take at most about 1,000 classes here, got ", classes);
    plan.shared_bytes = static_cast<int>(bytes(plan.voxels));
    pieces = (v.voxels + plan.voxels - 1) / plan.voxels;
  }
  // A multiple of the blocks that a multiprocessor holds at once, which are 2 to 5 of the kernels of few classes, 2 of
  // the others. The count pass leaves a sum for each.
  const int64_t together = static_cast<int64_t>(multiprocessors) * (backward ? 16 : plan.lanes == 1 ? 12 : 4);
  plan.programs = static_cast<int>(std::max<int64_t>(1, std::min(pieces, together / std::max<int64_t>(1, v.samples))));
  return plan;
}

}  // namespace cuda
}  // namespace tversky_kernels

STABLE_TORCH_LIBRARY_IMPL(TK_NAMESPACE, TK_DISPATCH_KEY, m) {
  tversky_kernels::Operators<tversky_kernels::cuda::Cuda>::implement(m);
}
