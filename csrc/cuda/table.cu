// The table on CUDA: partial sums of all blocks in, loss and coefficients out. Every block sums some columns, and the
// one that is the last to finish goes on with the table.
#include "kernels.h"

namespace tversky_kernels {
namespace cuda {
namespace {

constexpr int kTableThreads = 512, kTableWarps = kTableThreads / kWarp;
// Columns of the partial sums that a block adds up: 32 bytes of each row, which memory hands out at once.
constexpr int kTogether = 8;

// Of x > 0. By logarithm, for pow is a call, around which the registers would be spilled.
struct Power {
  __device__ double operator()(double x, double y) const { return exp(log(x) * y); }
};

// This block's columns of the counts, from the partial sums of all blocks of the count pass: neighbouring threads take
// neighbouring columns, and those of every k-th row; always in the same order. sums: [threads].
template <typename A>
__device__ void sum_partial(const TableArguments& a, double* sums) {
  const int columns = a.table.columns(), classes = static_cast<int>(a.table.classes), row = columns * classes;
  const int slices = (row + kTogether - 1) / kTogether, first = static_cast<int>(blockIdx.x) % slices * kTogether;
  const int64_t sample = static_cast<int>(blockIdx.x) / slices;
  const int width = row - first < kTogether ? row - first : kTogether, rows = kTableThreads / width;
  const int thread = static_cast<int>(threadIdx.x), r = thread / width, column = first + thread % width;
  double sum = 0;
  if (r < rows) {
    const A* from = static_cast<const A*>(a.partial) + sample * a.programs * row + column;
#pragma unroll 8
    for (int p = r; p < a.programs; p += rows) sum += static_cast<double>(from[static_cast<int64_t>(p) * row]);
  }
  sums[thread] = sum;
  __syncthreads();
  const int warp = thread / kWarp, lane = thread % kWarp;
  if (warp < width) {  // a warp for each column
    double total = 0;
#pragma unroll 1
    for (int i = lane; i < rows; i += kWarp) total += sums[i * width + warp];
    total = warp_sum(total);
    const int of_warp = first + warp;
    if (lane == 0) a.counts[(sample * classes + of_warp % classes) * columns + of_warp / classes] = total;
  }
}

// Whether all other blocks have written their counts, which this one may read then.
__device__ bool is_last_block(const TableArguments& a, double* sums) {
  __syncthreads();
  if (gridDim.x == 1) return true;
  bool& last = *reinterpret_cast<bool*>(sums);
  if (threadIdx.x == 0) {  // for all threads of the block, by the barriers
    __threadfence();
    last = atomicAdd(a.finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
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

// The sums over the block in every thread, of what the first `threads` threads have. sums: [values][warps].
template <int kValues>
__device__ void block_sums(double (&values)[kValues], int64_t threads, double* sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warps = threads < kTableThreads ? (static_cast<int>(threads) + kWarp - 1) / kWarp : kTableWarps;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const double sum = warp_sum(values[i]);
    if (lane == 0) sums[i * kTableWarps + warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = 0;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) values[i] += sums[i * kTableWarps + w];
  }
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
    for (int i = 0; i < kAllCounts; ++i) q[i] += i < t.columns() ? __ldcg(from + i) : 0.0;  // of other blocks
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
    wait_for_launch_before();
    if (a.partial_is_double) {
      sum_partial<double>(a, sums);
    } else {
      sum_partial<float>(a, sums);
    }
  }
  if (a.loss == nullptr) return;
  if (a.partial != nullptr && !is_last_block(a, sums)) return;
  const Sums tversky = tversky_part(a);
  const Sums ce = t.has_cross_entropy ? ce_part(a) : Sums{0, 0};
  if (t.reduction == Reduction::kNone) return;
  double all[4] = {tversky.value, tversky.count, ce.value, ce.count};
  block_sums(all, t.rows * t.classes, sums);
  const bool mean = t.reduction == Reduction::kMean;
  const double scale = mean ? inverse_or_zero(all[1]) : 1.0, ce_scale = mean ? inverse_or_zero(all[3]) : 1.0;
  if (threadIdx.x == 0) store_loss(a, 0, all[0] * scale + t.ce.ce_weight * (all[2] * ce_scale));
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

void launch_table(const TableArguments& a, cudaStream_t stream) {
  const int64_t slices = (a.table.columns() * a.table.classes + kTogether - 1) / kTogether;
  const dim3 grid(a.partial != nullptr ? static_cast<unsigned>(a.table.samples * slices) : 1);
  if (a.partial != nullptr && a.begins_early) {
    TK_LAUNCH_EARLY((table_kernel), grid, dim3(kTableThreads), kTableThreads * sizeof(double), stream, a);
  } else {
    TK_LAUNCH((table_kernel), grid, dim3(kTableThreads), kTableThreads * sizeof(double), stream, a);
  }
}

}  // namespace cuda
}  // namespace tversky_kernels
