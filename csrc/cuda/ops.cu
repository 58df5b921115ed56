// The operators on CUDA tensors: on the current stream of the tensors' device, without waiting for it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if !defined(TK_CUDA_ON_HOST)
#include <torch/csrc/stable/accelerator.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../volume.h"
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

// The count pass and the first half of the table: counts[N][C][3]. Reduction and the rest only where `table` says so.
void run_forward(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& voxel_weight,
                 int64_t activation, const std::optional<int64_t>& ignore_index, TableArguments table,
                 bool counts_only) {
  const VolumeTensors volume(logits, target, voxel_weight, activation, ignore_index);
  const Volume& v = volume.view;
  const Device device(logits);
  Tensor partial;
  if (v.samples * v.voxels > 0) {
    const Plan plan = make_plan(v, false, device.multiprocessors);
    const std::vector<int64_t> shape{v.samples, plan.programs, 3, v.classes};
    partial = torch::stable::new_empty(logits, shape, is_double(logits) ? ScalarType::Double : ScalarType::Float);
    launch_count_pass(v, plan, partial.mutable_data_ptr(), device.stream);
    device.check_launch();
    table.partial = partial.const_data_ptr();
    table.programs = plan.programs;
  } else {
    // Nothing to count: one block of zeros a sample.
    const std::vector<int64_t> shape{v.samples, 1, 3, v.classes};
    partial = torch::stable::new_zeros(logits, shape, is_double(logits) ? ScalarType::Double : ScalarType::Float);
    table.partial = partial.const_data_ptr();
    table.programs = 1;
  }
  table.partial_is_double = is_double(logits);
  launch_table(table, counts_only, device.stream);
  device.check_launch();
}

Tensor new_counts(const Tensor& logits) {
  const std::vector<int64_t> shape{logits.size(0), logits.size(1), 3};
  return torch::stable::new_empty(logits, shape, ScalarType::Double);
}

Tensor count_pass(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& voxel_weight,
                  int64_t activation, std::optional<int64_t> ignore_index, bool) {
  check_inputs(logits, target, voxel_weight, activation);
  Tensor counts = new_counts(logits);
  TableArguments table{};
  table.samples = logits.size(0);
  table.classes = logits.size(1);
  table.counts = counts.mutable_data_ptr<double>();
  run_forward(logits, target, voxel_weight, activation, ignore_index, table, true);
  return counts;
}

struct TableTensors {
  Tensor loss, coefficients;
  TableArguments arguments{};
};

TableTensors make_table(const Tensor& like, int64_t samples, int64_t classes, ScalarType type,
                        const std::optional<Tensor>& class_parameters, double alpha, double beta, double gamma,
                        double smooth_nr, double smooth_dr, bool include_background, bool batch, int64_t absent,
                        int64_t reduction) {
  if (class_parameters.has_value()) {
    STD_TORCH_CHECK(class_parameters->scalar_type() == ScalarType::Double && class_parameters->is_contiguous() &&
                        class_parameters->is_cpu() == like.is_cpu() && class_parameters->dim() == 2 &&
                        class_parameters->size(0) == 3 && class_parameters->size(1) == classes,
                    "class_parameters: expected a contiguous (3, C) tensor of float64 on the logits' device");
  }
  TableTensors t;
  TableArguments& a = t.arguments;
  a.samples = samples;
  a.classes = classes;
  a.first_class = include_background || classes == 1 ? 0 : 1;
  a.rows = batch ? 1 : samples;
  a.reduction = static_cast<Reduction>(reduction);
  a.absent = static_cast<Absent>(absent);
  a.parameters = {alpha, beta, gamma, smooth_nr, smooth_dr, 1.0};
  a.class_parameters = class_parameters.has_value() ? class_parameters->const_data_ptr<double>() : nullptr;
  std::vector<int64_t> shape;
  if (a.reduction == Reduction::kNone) {
    if (!batch) shape.push_back(a.rows);
    shape.push_back(classes - a.first_class);
  }
  t.loss = torch::stable::new_empty(like, shape, type);
  const std::vector<int64_t> coefficient_shape{a.rows, classes, 2};
  t.coefficients = torch::stable::new_empty(like, coefficient_shape, ScalarType::Double);
  a.loss = t.loss.mutable_data_ptr();
  a.loss_is_double = type == ScalarType::Double;
  a.coefficients = t.coefficients.mutable_data_ptr<double>();
  return t;
}

std::tuple<Tensor, Tensor> table(const Tensor& counts, const std::optional<Tensor>& class_parameters, double alpha,
                                 double beta, double gamma, double smooth_nr, double smooth_dr, bool include_background,
                                 bool batch, int64_t absent, int64_t reduction) {
  check_counts(counts);
  const Tensor contiguous = torch::stable::contiguous(counts);
  TableTensors t = make_table(counts, counts.size(0), counts.size(1), ScalarType::Double, class_parameters, alpha, beta,
                              gamma, smooth_nr, smooth_dr, include_background, batch, absent, reduction);
  t.arguments.counts = const_cast<double*>(contiguous.const_data_ptr<double>());  // only read without partial sums
  const Device device(counts);
  launch_table(t.arguments, false, device.stream);
  device.check_launch();
  return {t.loss, t.coefficients};
}

std::tuple<Tensor, Tensor> tversky_loss(const Tensor& logits, const Tensor& target,
                                        const std::optional<Tensor>& voxel_weight, int64_t activation,
                                        std::optional<int64_t> ignore_index, bool,
                                        const std::optional<Tensor>& class_parameters, double alpha, double beta,
                                        double gamma, double smooth_nr, double smooth_dr, bool include_background,
                                        bool batch, int64_t absent, int64_t reduction) {
  check_inputs(logits, target, voxel_weight, activation);
  TableTensors t = make_table(logits, logits.size(0), logits.size(1),
                              is_double(logits) ? ScalarType::Double : ScalarType::Float, class_parameters, alpha, beta,
                              gamma, smooth_nr, smooth_dr, include_background, batch, absent, reduction);
  const Tensor counts = new_counts(logits);
  t.arguments.counts = counts.mutable_data_ptr<double>();
  run_forward(logits, target, voxel_weight, activation, ignore_index, t.arguments, false);
  return {t.loss, t.coefficients};
}

void write_gradient(const Tensor& out, const VolumeTensors& volume, const Tensor& grad_loss,
                    const Tensor& coefficients) {
  const Volume& v = volume.view;
  if (v.samples * v.voxels == 0) return;
  const Device device(out);
  const Tensor g = torch::stable::contiguous(grad_loss), u = torch::stable::contiguous(coefficients);
  GradientArguments a{};
  a.grad_loss = g.const_data_ptr();
  a.grad_is_double = is_double(g);
  a.grad_classes = g.dim() == 0 ? 0 : g.size(g.dim() - 1);
  a.coefficients = u.const_data_ptr<double>();
  a.row_stride = u.size(0) == 1 ? 0 : 1;
  a.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), *single_stride(out, 2)};
  launch_gradient_pass(v, make_plan(v, true, device.multiprocessors), a, device.stream);
  device.check_launch();
}

Tensor gradient_pass(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                     const std::optional<Tensor>& voxel_weight, const Tensor& coefficients, int64_t activation,
                     std::optional<int64_t> ignore_index) {
  check_inputs(logits, target, voxel_weight, activation);
  check_coefficients(coefficients, logits);
  check_grad_loss(grad_loss, coefficients);
  const VolumeTensors volume(logits, target, voxel_weight, activation, ignore_index);
  Tensor gradient = torch::stable::empty_like(volume.logits);
  if (!single_stride(gradient, 2).has_value()) gradient = torch::stable::contiguous(gradient);
  write_gradient(gradient, volume, grad_loss, coefficients);
  return gradient;
}

void gradient_pass_(Tensor logits, const Tensor& grad_loss, const Tensor& target,
                    const std::optional<Tensor>& voxel_weight, const Tensor& coefficients, int64_t activation,
                    std::optional<int64_t> ignore_index) {
  check_inputs(logits, target, voxel_weight, activation);
  check_coefficients(coefficients, logits);
  check_grad_loss(grad_loss, coefficients);
  STD_TORCH_CHECK(single_stride(logits, 2).has_value(), "logits: in place, its voxels must lie one stride apart");
  const VolumeTensors volume(logits, target, voxel_weight, activation, ignore_index);
  write_gradient(logits, volume, grad_loss, coefficients);
}

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
    if (v.activation != Activation::kSoftmax || classes < 2 || classes > kMostInRegisters<T>) return;
    with_few_classes<T>(classes, [&](auto c) { plan.voxels = kVoxelsOf<T, decltype(c)::value>; });
    // A fresh gradient has the logits' strides or, where those leave gaps, contiguous ones: whole loads of `voxels`.
    plan.in_registers = aligned(v.logits, element, plan.voxels * element) && v.voxels % plan.voxels == 0;
    plan.shared_bytes = static_cast<int>(Plan::kThreads / kWarp * 3 * classes * real);
    const int64_t each = static_cast<int64_t>(plan.voxels) * Plan::kThreads;
    pieces = (v.voxels + each - 1) / each;
  });
  if (!plan.in_registers) {
    const auto bytes = [&](int voxels) {
      const TileLayout layout(static_cast<int>(classes), voxels, Plan::kThreads);
      const int64_t table = backward ? 2 * classes : 3 * classes * layout.halves;
      const int64_t reals = classes * layout.tile_stride + table + 2 * layout.groups * voxels + 3 * voxels;
      return reals * real + (voxels + 2) * static_cast<int64_t>(sizeof(int));
    };
    plan.voxels = 128;
    while (plan.voxels > 1 && bytes(plan.voxels) > kSharedBytes) plan.voxels /= 2;
    STD_TORCH_CHECK(bytes(plan.voxels) <= kSharedBytes,
                    "logits: the CUDA kernels take at most about 2,000 classes, got ", classes);
    plan.shared_bytes = static_cast<int>(bytes(plan.voxels));
    pieces = (v.voxels + plan.voxels - 1) / plan.voxels;
  }
  const int64_t together = static_cast<int64_t>(multiprocessors) * (backward ? 16 : 4);
  plan.programs = static_cast<int>(std::max<int64_t>(1, std::min(pieces, together / std::max<int64_t>(1, v.samples))));
  return plan;
}

}  // namespace cuda
}  // namespace tversky_kernels

#if defined(TK_CUDA_ON_HOST)
STABLE_TORCH_LIBRARY(tversky_kernels_cuda_on_host, m) {
  m.def(
      "count_pass(Tensor logits, Tensor target, Tensor? voxel_weight, int activation, int? ignore_index, "
      "bool raise_bad_input) -> Tensor");
  m.def(
      "table(Tensor counts, Tensor? class_parameters, float alpha, float beta, float gamma, float smooth_nr, "
      "float smooth_dr, bool include_background, bool batch, int absent, int reduction) -> (Tensor, Tensor)");
  m.def(
      "tversky_loss(Tensor logits, Tensor target, Tensor? voxel_weight, int activation, int? ignore_index, "
      "bool raise_bad_input, Tensor? class_parameters, float alpha, float beta, float gamma, float smooth_nr, "
      "float smooth_dr, bool include_background, bool batch, int absent, int reduction) -> (Tensor, Tensor)");
  m.def(
      "gradient_pass(Tensor grad_loss, Tensor logits, Tensor target, Tensor? voxel_weight, Tensor coefficients, "
      "int activation, int? ignore_index) -> Tensor");
  m.def(
      "gradient_pass_(Tensor(a!) logits, Tensor grad_loss, Tensor target, Tensor? voxel_weight, Tensor coefficients, "
      "int activation, int? ignore_index) -> ()");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(TK_NAMESPACE, TK_DISPATCH_KEY, m) {
  m.impl("count_pass", TORCH_BOX(&tversky_kernels::cuda::count_pass));
  m.impl("table", TORCH_BOX(&tversky_kernels::cuda::table));
  m.impl("tversky_loss", TORCH_BOX(&tversky_kernels::cuda::tversky_loss));
  m.impl("gradient_pass", TORCH_BOX(&tversky_kernels::cuda::gradient_pass));
  m.impl("gradient_pass_", TORCH_BOX(&tversky_kernels::cuda::gradient_pass_));
}
