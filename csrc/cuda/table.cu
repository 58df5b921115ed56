// The table on CUDA: partial sums of all blocks in, loss and coefficients out. One block.
#include "kernels.h"

namespace tversky_kernels {
namespace cuda {
namespace {

constexpr int kTableThreads = 512, kTableWarps = kTableThreads / kWarp;
constexpr int kTogether = 4 * kWarp;  // columns of the partial sums that are summed before a barrier

// Of x > 0. By logarithm, for pow is a call, around which the registers would be spilled.
struct Power {
  __device__ double operator()(double x, double y) const { return exp(log(x) * y); }
};

// counts from the partial sums of all blocks: neighbouring lanes take neighbouring columns, the warps every 16th block;
// always in the same order. sums: [warps][kTogether].
template <typename A>
__device__ void sum_partial(const TableArguments& a, double* sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int columns = a.table.columns();
  const int64_t classes = a.table.classes, row = columns * classes, total = a.table.samples * row;
  for (int64_t first = 0; first < total; first += kTogether) {
#pragma unroll
    for (int i = lane; i < kTogether; i += kWarp) {
      const int64_t at = first + i;
      double sum = 0;
      if (at < total) {
        const A* from = static_cast<const A*>(a.partial) + at / row * a.programs * row + at % row;
#pragma unroll 8
        for (int p = warp; p < a.programs; p += kTableWarps) sum += static_cast<double>(from[p * row]);
      }
      sums[warp * kTogether + i] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTogether && first + i < total; i += kTableThreads) {
      double sum = 0;
#pragma unroll
      for (int w = 0; w < kTableWarps; ++w) sum += sums[w * kTogether + i];
      const int64_t n = (first + i) / row, column = (first + i) % row;
      a.counts[(n * classes + column % classes) * columns + column / classes] = sum;
    }
    __syncthreads();
  }
}

__device__ void store_loss(const TableArguments& a, int64_t i, double value) {
  if (a.loss_is_double) {
    static_cast<double*>(a.loss)[i] = value;
  } else {
    static_cast<float*>(a.loss)[i] = static_cast<float>(value);
  }
}

__device__ void add_loss(const TableArguments& a, int64_t i, double value) {
  store_loss(a, i, value + (a.loss_is_double ? static_cast<double*>(a.loss)[i] : static_cast<float*>(a.loss)[i]));
}

// The sum over the block in every thread. sums: [warps].
__device__ double block_sum(double x, double* sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) sums[warp] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kTableWarps; ++w) total += sums[w];
  return total;
}

// The counts of a row and class: the sum over its samples.
__device__ void row_counts(const TableArguments& a, int64_t r, int64_t c, double (&q)[kAllCounts]) {
  const Table& t = a.table;
#pragma unroll
  for (int i = 0; i < kAllCounts; ++i) q[i] = 0;
#pragma unroll 1
  for (int64_t n = r * t.together(); n < (r + 1) * t.together(); ++n) {
    const double* from = a.counts + (n * t.classes + c) * t.columns();
#pragma unroll
    for (int i = 0; i < kAllCounts; ++i) q[i] += i < t.columns() ? from[i] : 0.0;
  }
}

__device__ double inverse_or_zero(double x) {
  return x == 0.0 ? 0.0 : 1.0 / x;
}

// The Tversky part: coefficients, and the loss where it is not reduced. What a thread adds to the sums.
struct Sums {
  double value, count;
};

__device__ Sums tversky_part(const TableArguments& a) {
  const Table& t = a.table;
  Sums mine{0, 0};
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < t.rows * t.classes; i += blockDim.x) {
    const int64_t r = i / t.classes, c = i % t.classes;
    double q[kAllCounts];
    row_counts(a, r, c, q);
    TverskyRow row{0, 0, 0};
    if (c >= t.first_class) {
      const bool is_absent = q[kTp] + q[kFn] == 0.0;
      mine.count += is_absent && t.absent == Absent::kSkip ? 0.0 : 1.0;
      if (!is_absent || t.absent == Absent::kKeep) {
        row = tversky_row(q[kTp], q[kFp], q[kFn], t.tversky_of_class(c), Power{});
      }
    }
    double* u = a.coefficients + i * t.coefficient_columns();
    u[kBackground] = row.u_background * t.ce.tversky_weight;
    u[kForeground] = row.u_foreground * t.ce.tversky_weight;
    const double value = t.ce.tversky_weight * row.loss;
    mine.value += value;
    if (t.reduction == Reduction::kNone && c >= t.first_class) store_loss(a, r * t.kept() + c - t.first_class, value);
  }
  return mine;
}

// The cross-entropy's part; where it is not reduced, the mean of each row is added to the row's losses.
__device__ Sums ce_part(const TableArguments& a) {
  const Table& t = a.table;
  Sums mine{0, 0};
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < t.rows * t.classes; i += blockDim.x) {
    const int64_t r = i / t.classes, c = i % t.classes;
    double q[kAllCounts];
    row_counts(a, r, c, q);
    const CeTerms terms = ce_terms(q, t.ce_class_weight(c), t.classes, t.ce);
    mine.value += terms.sum;
    mine.count += terms.divisor;
    double per = 1.0;
    if (t.reduction == Reduction::kNone) {
      double row_sum = 0, row_divisor = 0;
#pragma unroll 1
      for (int64_t k = 0; k < t.classes; ++k) {
        row_counts(a, r, k, q);
        const CeTerms of_class = ce_terms(q, t.ce_class_weight(k), t.classes, t.ce);
        row_sum += of_class.sum;
        row_divisor += of_class.divisor;
      }
      per = inverse_or_zero(row_divisor);
      if (c >= t.first_class) add_loss(a, r * t.kept() + c - t.first_class, t.ce.ce_weight * row_sum * per);
    }
    const CeCoefficients k = ce_coefficients(t.ce_class_weight(c), t.classes, t.ce);
    double* u = a.coefficients + i * t.coefficient_columns();
    u[kCeCoefficient] = k.ce * per;
    u[kSmoothingCoefficient] = k.smoothing * per;
  }
  return mine;
}

__global__ void __launch_bounds__(kTableThreads, 1) table_kernel(const TableArguments a) {
  const Table& t = a.table;
  TK_SHARED(memory);
  double* sums = reinterpret_cast<double*>(memory);
  if (a.partial != nullptr) {
    if (a.partial_is_double) {
      sum_partial<double>(a, sums);
    } else {
      sum_partial<float>(a, sums);
    }
  }
  if (a.loss == nullptr) return;
  const Sums tversky = tversky_part(a);
  const Sums ce = t.has_cross_entropy ? ce_part(a) : Sums{0, 0};
  if (t.reduction == Reduction::kNone) return;
  double scale = 1.0, ce_scale = 1.0;
  if (t.reduction == Reduction::kMean) {
    scale = inverse_or_zero(block_sum(tversky.count, sums));
    ce_scale = inverse_or_zero(block_sum(ce.count, sums));
  }
  const double total = block_sum(tversky.value, sums) * scale;
  const double ce_total = block_sum(ce.value, sums) * ce_scale;
  if (threadIdx.x == 0) store_loss(a, 0, total + t.ce.ce_weight * ce_total);
  const int width = t.coefficient_columns();
  for (int64_t i = threadIdx.x; i < t.rows * t.classes; i += blockDim.x) {  // each thread its own
    double* u = a.coefficients + i * width;
    u[kBackground] *= scale;
    u[kForeground] *= scale;
    if (t.has_cross_entropy) {
      u[kCeCoefficient] *= ce_scale;
      u[kSmoothingCoefficient] *= ce_scale;
    }
  }
}

}  // namespace

void launch_table(const TableArguments& arguments, cudaStream_t stream) {
  TK_LAUNCH((table_kernel), dim3(1), dim3(kTableThreads), kTableWarps * kTogether * sizeof(double), stream, arguments);
}

}  // namespace cuda
}  // namespace tversky_kernels
