// The table on CUDA: partial sums of all blocks in, loss and coefficients out. One block.
#include "kernels.h"

namespace tversky_kernels {
namespace cuda {
namespace {

constexpr int kTableThreads = 1024;

struct Power {
  __device__ double operator()(double x, double y) const { return pow(x, y); }
};

template <typename A>
__device__ void sum_partial(const TableArguments& a) {
  // A warp a column, its lanes over the blocks: many loads in flight, and always the same order.
  const A* partial = static_cast<const A*>(a.partial);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t row = 3 * a.classes;
  for (int64_t column = warp; column < a.samples * row; column += warps) {
    const int64_t n = column / row, i = column % row;
    double sum = 0;
    for (int p = lane; p < a.programs; p += kWarp) sum += static_cast<double>(partial[(n * a.programs + p) * row + i]);
    sum = warp_sum(sum);
    if (lane == 0) a.counts[(n * a.classes + i % a.classes) * 3 + i / a.classes] = sum;
  }
}

__device__ void store_loss(const TableArguments& a, int64_t i, double value) {
  if (a.loss_is_double) {
    static_cast<double*>(a.loss)[i] = value;
  } else {
    static_cast<float*>(a.loss)[i] = static_cast<float>(value);
  }
}

// The sum over the block in every thread. sums: [warps].
__device__ double block_sum(double x, double* sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) sums[warp] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < warps; ++w) total += sums[w];
  return total;
}

__global__ void __launch_bounds__(kTableThreads) table_kernel(const TableArguments a, bool counts_only) {
  if (a.partial != nullptr) {
    if (a.partial_is_double) {
      sum_partial<double>(a);
    } else {
      sum_partial<float>(a);
    }
    __syncthreads();
  }
  if (counts_only) return;
  TK_SHARED(memory);
  double* sums = reinterpret_cast<double*>(memory);
  double total = 0, averaged = 0;
  const int64_t kept = a.classes - a.first_class;
  const int64_t together = a.rows == a.samples ? 1 : a.samples;
  for (int64_t i = threadIdx.x; i < a.rows * a.classes; i += blockDim.x) {
    const int64_t r = i / a.classes, c = i % a.classes;
    double tp = 0, fp = 0, fn = 0;
    for (int64_t n = r * together; n < (r + 1) * together; ++n) {
      const double* q = a.counts + (n * a.classes + c) * 3;
      tp += q[0];
      fp += q[1];
      fn += q[2];
    }
    TverskyRow row{0, 0, 0};
    if (c >= a.first_class) {
      TverskyParameters parameters = a.parameters;
      if (a.class_parameters != nullptr) {
        parameters.alpha = a.class_parameters[c];
        parameters.beta = a.class_parameters[a.classes + c];
        parameters.class_weight = a.class_parameters[2 * a.classes + c];
      }
      const bool is_absent = tp + fn == 0.0;
      averaged += is_absent && a.absent == Absent::kSkip ? 0.0 : 1.0;
      if (!is_absent || a.absent == Absent::kKeep) row = tversky_row(tp, fp, fn, parameters, Power{});
      if (a.reduction == Reduction::kNone) store_loss(a, r * kept + c - a.first_class, row.loss);
    }
    a.coefficients[i * 2] = row.u_background;
    a.coefficients[i * 2 + 1] = row.u_foreground;
    total += row.loss;
  }
  if (a.reduction == Reduction::kNone) return;
  total = block_sum(total, sums);
  double scale = 1.0;
  if (a.reduction == Reduction::kMean) {
    averaged = block_sum(averaged, sums);
    scale = averaged == 0.0 ? 0.0 : 1.0 / averaged;
  }
  if (threadIdx.x == 0) store_loss(a, 0, total * scale);
  for (int64_t i = threadIdx.x; i < a.rows * a.classes; i += blockDim.x) {  // each thread its own
    a.coefficients[i * 2] *= scale;
    a.coefficients[i * 2 + 1] *= scale;
  }
}

}  // namespace

void launch_table(const TableArguments& arguments, bool counts_only, cudaStream_t stream) {
  TK_LAUNCH((table_kernel), dim3(1), dim3(kTableThreads), kTableThreads / kWarp * sizeof(double), stream, arguments,
            counts_only);
}

}  // namespace cuda
}  // namespace tversky_kernels
