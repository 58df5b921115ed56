// The operators on CUDA tensors: on the current stream of the tensors' device, without waiting for it.
#if !defined(TK_CUDA_ON_HOST)
#include <torch/csrc/stable/accelerator.h>
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../torch/operators.h"
#include "launch.h"

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

// With so few classes the blocks of the count pass end too close together for a rehearsal of the table.
constexpr int64_t kFewClasses = 4;

// The count pass and the table, one launch each. a.counts: null where only the table needs them.
void run_forward(const Tensor& logits, const Volume& v, TableArguments a) {
  const Device device(logits);
  const bool any = v.samples * v.voxels > 0;
  const Plan plan = any ? make_plan(v, nullptr, device.multiprocessors) : Plan{};
  a.programs = any ? plan.blocks.programs : 1;  // where there is nothing to count, one block of zeros a sample
  a.partial_is_double = is_double(logits);
  // One allocation, in doubles: counts (an even number, so that the memory behind them can be read by 16 bytes),
  // partial sums, and TableArguments::finished.
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

struct CudaRegions {
  static void count(const RegionVolume& r, Check, const Tensor& counts) {
    if (counts.numel() == 0) return;
    const Device device(counts);
    const RegionPlan plan = make_region_plan(r, false, device.multiprocessors);
    const std::vector<int64_t> shape{r.volume.samples * plan.tables() * plan.table_size};
    const Tensor tables = torch::stable::new_zeros(counts, shape, ScalarType::Double);
    launch_region_count_pass(r, plan, tables.mutable_data_ptr<double>(), counts.mutable_data_ptr<double>(),
                             device.stream);
    device.check_launch();
  }

  static Tensor new_gradient(const Tensor& logits) { return Cuda::new_gradient(logits); }

  static void gradient(const RegionVolume& r, const Tensor& coefficients, const Tensor& out) {
    const Device device(out);
    const RegionPlan plan = make_region_plan(r, true, device.multiprocessors);
    const std::vector<int64_t> shape{r.volume.samples * r.count * r.volume.classes * kAllCoefficients};
    const Tensor memory =
        torch::stable::new_empty(coefficients, shape, is_double(out) ? ScalarType::Double : ScalarType::Float);
    const GradientView view{out.mutable_data_ptr(), out.stride(0), out.stride(1), *single_stride(out, 2)};
    launch_region_gradient_pass(r, plan, coefficients.const_data_ptr<double>(), memory.mutable_data_ptr(), view,
                                device.stream);
    device.check_launch();
  }
};

}  // namespace
}  // namespace cuda
}  // namespace tversky_kernels

STABLE_TORCH_LIBRARY_IMPL(TK_NAMESPACE, TK_DISPATCH_KEY, m) {
  tversky_kernels::Operators<tversky_kernels::cuda::Cuda>::implement(m);
  tversky_kernels::RegionOperators<tversky_kernels::cuda::CudaRegions>::implement(m);
}

#if !defined(TK_CUDA_ON_HOST)
#define TK_STRING_OF(x) #x
#define TK_STRING(x) TK_STRING_OF(x)
// The architectures that nvcc compiled for, like "sm_80.sm_90.compute_90".
extern "C" __attribute__((visibility("default"))) const char* tversky_kernels_cuda_code() {
  return TK_STRING(TK_CUDA_CODE);
}
// The CUDA that compiled this library, and the newest that the driver here runs; 0 where the driver does not say.
extern "C" __attribute__((visibility("default"))) void tversky_kernels_cuda_versions(int* own, int* drivers) {
  *own = CUDART_VERSION;
  if (cudaDriverGetVersion(drivers) != cudaSuccess) *drivers = 0;
}
#endif
