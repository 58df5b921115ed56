// The table on CUDA: from the partial sums of all blocks to loss and coefficients. Every block sums some columns, and
// the block that ends last goes on with the table.
#include "launch.h"
#include "voxels.cuh"

namespace tversky_kernels {
namespace cuda {
namespace {

// So few threads and registers that a block fits beside one of the count pass.
constexpr int kTableThreads = 384, kTableWarps = kTableThreads / kWarp;
// Columns of the partial sums that one of several blocks adds up: 32 bytes of each row, the least that memory hands
// out.
constexpr int kTogether = 8;

// For x > 0. By logarithms: pow is a call, for which registers would be spilled.
struct Power {
  __device__ double operator()(double x, double y) const { return exp(log(x) * y); }
};

// How one block sums all columns. Unless there are many columns, that is faster than to exchange sums between blocks.
struct Alone {
  int threads;  // of each sample; 0: there are several blocks
  int vector;   // values that a thread reads at once
  int lanes;    // a power of two: threads that put a column's sums together

  // The most bytes of partial sums that one block reads. For more, several blocks read and tell each other their sums
  // (on an H100).
  static constexpr int64_t kMostBytes = 48 * 1024;

  __host__ Alone(int64_t samples, int64_t programs, int64_t row, int64_t element_size)
      : threads(0), vector(1), lanes(kWarp) {
    if (samples == 0 || samples > kTableThreads || row > 4 * kTableThreads) return;
    const int64_t of_sample = programs * row;
    const int most = static_cast<int>(16 / element_size);
    if (of_sample % most == 0) vector = most;
    if (samples * of_sample * element_size > kMostBytes * vector / most) return;
    // As many threads as make each of them always read the same columns.
    int64_t period = row;
    for (int v = vector; v > 1 && period % 2 == 0; v /= 2) period /= 2;
    threads = static_cast<int>(kTableThreads / samples / period * period);
    while (lanes > 1 && samples * row * lanes > kTableThreads) lanes /= 2;
  }
  // Doubles in shared memory: the threads' sums, and the counts from there on.
  __host__ __device__ int64_t sums(int64_t samples) const { return samples * threads * vector; }
};

// The counts, from the partial sums of all blocks of the count pass, in shared memory too; always in the same order.
// memory: [samples][threads][vector] and [samples][classes][columns].
template <typename A, int kVector>
__device__ void sum_all(const TableArguments& a, const Alone& alone, int programs, double* memory) {
  const int samples = static_cast<int>(a.table.samples), classes = static_cast<int>(a.table.classes);
  const int columns = a.table.columns(), row = columns * classes;
  const int thread = static_cast<int>(threadIdx.x), of_sample = alone.threads * kVector;
  if (thread < samples * alone.threads) {
    const int sample = thread / alone.threads, vectors = programs * row / kVector;
    const A* from = static_cast<const A*>(a.partial) + static_cast<int64_t>(sample) * programs * row;
    double sum[kVector] = {};
#pragma unroll 8
    for (int i = thread % alone.threads; i < vectors; i += alone.threads) {
      const auto values = load_packed<A, kVector>(from + i * kVector);
#pragma unroll
      for (int k = 0; k < kVector; ++k) sum[k] += static_cast<double>(values.values[k]);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) memory[thread * kVector + k] = sum[k];
  }
  __syncthreads();
  double* counts = memory + samples * of_sample;
  for (int first = 0; first < samples * row; first += kTableThreads / alone.lanes) {
    const int job = first + thread / alone.lanes, sample = job / row, column = job - sample * row;
    double total = 0;
    if (sample < samples) {
      for (int i = column + thread % alone.lanes * row; i < of_sample; i += alone.lanes * row) {
        total += memory[sample * of_sample + i];
      }
    }
    for (int distance = alone.lanes / 2; distance > 0; distance /= 2) {
      total += __shfl_xor_sync(kFullWarp, total, distance);
    }
    if (sample < samples && thread % alone.lanes == 0) {
      const int at = (sample * classes + column % classes) * columns + column / classes;
      counts[at] = total;
      if (programs > 0) a.counts[at] = total;
    }
  }
  __syncthreads();
}

// One of several blocks sums its columns of the counts. Neighbouring threads take neighbouring columns, and every k-th
// row of them, always in the same order. sums: [threads].
template <typename A>
__device__ void sum_columns(const TableArguments& a, int programs, double* sums) {
  const int columns = a.table.columns(), classes = static_cast<int>(a.table.classes), row = columns * classes;
  const int slices = (row + kTogether - 1) / kTogether, first = static_cast<int>(blockIdx.x) % slices * kTogether;
  const int64_t sample = static_cast<int>(blockIdx.x) / slices;
  const int width = row - first < kTogether ? row - first : kTogether, rows = kTableThreads / width;
  const int thread = static_cast<int>(threadIdx.x), r = thread / width, column = first + thread % width;
  double sum = 0;
  if (r < rows) {
    const A* from = static_cast<const A*>(a.partial) + sample * programs * row + column;
#pragma unroll 8
    for (int p = r; p < programs; p += rows) sum += static_cast<double>(from[static_cast<int64_t>(p) * row]);
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
    if (lane == 0 && programs > 0)
      a.counts[(sample * classes + of_warp % classes) * columns + of_warp / classes] = total;
  }
  __syncthreads();
}

// Whether all other blocks have written their counts. This block may read them then.
__device__ bool is_last_block(const TableArguments& a, double* sums) {
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

// The sums over the first `threads` threads of the block, in every thread. sums: [values][warps].
template <int kValues>
__device__ void block_sums(double (&values)[kValues], int threads, double* sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warps = threads < kTableThreads ? (threads + kWarp - 1) / kWarp : kTableWarps;
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

// The counts of a row and class: the sum over its samples. counts: in shared memory, null where they are the blocks'.
__device__ void row_counts(const TableArguments& a, const double* counts, int r, int c, double (&q)[kAllCounts]) {
  const Table& t = a.table;
  const int columns = t.columns(), classes = static_cast<int>(t.classes), together = static_cast<int>(t.together());
#pragma unroll
  for (int i = 0; i < kAllCounts; ++i) q[i] = 0;
#pragma unroll 1
  for (int n = r * together; n < (r + 1) * together; ++n) {
    const int64_t at = (static_cast<int64_t>(n) * classes + c) * columns;
#pragma unroll
    for (int i = 0; i < kAllCounts; ++i) {
      if (i < columns) q[i] += counts != nullptr ? counts[at + i] : __ldcg(a.counts + at + i);
    }
  }
}

// Where one of the overlap counts of a class is NaN, all of them become NaN: a voxel of another class adds nothing to
// its tp. counts: see row_counts.
__device__ void spread_nan(const TableArguments& a, const double* counts) {
  const int columns = a.table.columns(), items = static_cast<int>(a.table.samples * a.table.classes);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < items; i += kTableThreads) {
    const int64_t at = int64_t{i} * columns;
    double sum = 0;
    for (int q = 0; q < kOverlapCounts; ++q) sum += counts != nullptr ? counts[at + q] : __ldcg(a.counts + at + q);
    if (sum == sum) continue;
    for (int q = 0; q < kOverlapCounts; ++q) a.counts[at + q] = sum;
  }
}

__device__ double inverse_or_zero(double x) {
  return x == 0.0 ? 0.0 : 1.0 / x;
}

// The sums over all classes that make the loss, before the mean.
enum LossSum { kTversky, kTverskyClasses, kCrossEntropySum, kDivisor, kLossSums };

// The coefficients of a row and class, before the mean. Where the loss is not reduced, the coefficients are the row's
// own, and the mean cross-entropy of the row is added to them. Adds the class's part to the sums. stores: the loss that
// is not reduced.
__device__ void evaluate(const TableArguments& a, const double* counts, int item, bool stores,
                         double (&sums)[kLossSums], double (&u)[kAllCoefficients]) {
  const Table& t = a.table;
  const int classes = static_cast<int>(t.classes), first_class = static_cast<int>(t.first_class);
  const int r = item / classes, c = item - r * classes;
  double q[kAllCounts];
  row_counts(a, counts, r, c, q);
  TverskyRow row{0, 0, 0};
  if (c >= first_class) {
    const bool is_absent = q[kTp] + q[kFn] == 0.0;
    sums[kTverskyClasses] += is_absent && t.absent == Absent::kSkip ? 0.0 : 1.0;
    if (!is_absent || t.absent == Absent::kKeep) {
      row = tversky_row(q[kTp], q[kFp], q[kFn], t.tversky_of_class(c), Power{});
    }
  }
  u[kBackground] = row.u_background * t.ce.tversky_weight;
  u[kForeground] = row.u_foreground * t.ce.tversky_weight;
  double value = t.ce.tversky_weight * row.loss;
  sums[kTversky] += value;
  const bool none = t.reduction == Reduction::kNone;
  if (t.has_cross_entropy) {
    const CeTerms terms = ce_terms(q, t.ce_class_weight(c), t.classes, t.ce);
    sums[kCrossEntropySum] += terms.sum;
    sums[kDivisor] += terms.divisor;
    double per = 1.0;
    if (none) {
      double row_sum = 0, row_divisor = 0;
#pragma unroll 1
      for (int k = 0; k < classes; ++k) {
        row_counts(a, counts, r, k, q);
        const CeTerms of_class = ce_terms(q, t.ce_class_weight(k), t.classes, t.ce);
        row_sum += of_class.sum;
        row_divisor += of_class.divisor;
      }
      per = inverse_or_zero(row_divisor);
      value += t.ce.ce_weight * row_sum * per;
    }
    const CeCoefficients k = ce_coefficients(t.ce_class_weight(c), t.classes, t.ce);
    u[kCeCoefficient] = k.ce * per;
    u[kSmoothingCoefficient] = k.smoothing * per;
  }
  if (none && stores && c >= first_class) store_loss(a, int64_t{r} * t.kept() + c - first_class, value);
}

// From the counts to the loss and the coefficients. counts: see row_counts. stores: whether the results are written.
__device__ void make_table(const TableArguments& a, const double* counts, bool stores, double* sums) {
  const Table& t = a.table;
  const int items = static_cast<int>(t.rows * t.classes), width = t.coefficient_columns();
  double all[kLossSums] = {}, first[kAllCoefficients] = {};  // of a thread's first class, which stay in registers
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < items; i += kTableThreads) {
    double u[kAllCoefficients] = {};
    evaluate(a, counts, i, stores, all, u);
    const bool is_first = i < kTableThreads;
#pragma unroll
    for (int k = 0; k < kAllCoefficients; ++k) {
      first[k] = is_first ? u[k] : first[k];
      if (!is_first && k < width && stores) a.coefficients[int64_t{i} * width + k] = u[k];
    }
  }
  const bool none = t.reduction == Reduction::kNone, mean = t.reduction == Reduction::kMean;
  if (!none) block_sums(all, items, sums);
  const double scale = mean ? inverse_or_zero(all[kTverskyClasses]) : 1.0;
  const double ce_scale = mean ? inverse_or_zero(all[kDivisor]) : 1.0;
  if (!stores) return;
  if (!none && threadIdx.x == 0) {
    store_loss(a, 0, all[kTversky] * scale + t.ce.ce_weight * (all[kCrossEntropySum] * ce_scale));
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < items; i += kTableThreads) {  // each thread its own
    double* of_item = a.coefficients + int64_t{i} * width;
#pragma unroll
    for (int k = 0; k < kAllCoefficients; ++k) {
      const double factor = k < kOverlapCoefficients ? scale : ce_scale;
      if (k < width) {
        of_item[k] = bounded_coefficient((i < kTableThreads ? first[k] : of_item[k]) * factor, t.most_coefficient);
      }
    }
  }
}

// A launch that rehearses goes through everything twice. The first time is while the count pass still runs: it reads no
// partial sums (with several blocks it reads whatever the memory of the counts holds) and stores nothing. The second
// time the instructions and the other data are in the caches (2 us less on an H100).
__global__ void __launch_bounds__(kTableThreads, 2) table_kernel(const TableArguments a, const Alone alone) {
  TK_SHARED(memory);
  double* sums = reinterpret_cast<double*>(memory);
  const bool sums_partial = a.partial != nullptr;
  const double* counts = alone.threads > 0 ? sums + alone.sums(a.table.samples) : nullptr;
#pragma unroll 1
  for (int turn = a.rehearses ? 0 : 1; turn < 2; ++turn) {
    const bool stores = recomputed(turn) > 0;
    if (sums_partial) {
      if (stores) wait_for_launch_before();
      const int programs = stores ? a.programs : 0;
      if (alone.threads == 0) {
        if (a.partial_is_double) {
          sum_columns<double>(a, programs, sums);
        } else {
          sum_columns<float>(a, programs, sums);
        }
      } else if (a.partial_is_double) {
        alone.vector == 1 ? sum_all<double, 1>(a, alone, programs, sums) : sum_all<double, 2>(a, alone, programs, sums);
      } else {
        alone.vector == 1 ? sum_all<float, 1>(a, alone, programs, sums) : sum_all<float, 4>(a, alone, programs, sums);
      }
      if (a.loss == nullptr) {
        if (!stores) continue;
        if (alone.threads == 0 && !is_last_block(a, sums)) return;
        spread_nan(a, counts);
        return;
      }
      if (alone.threads == 0 && stores && !is_last_block(a, sums)) return;
    }
    make_table(a, counts, stores, sums);
    __syncthreads();
  }
}

}  // namespace

void launch_table(const TableArguments& a, cudaStream_t stream) {
  const int64_t samples = a.table.samples, row = a.table.columns() * a.table.classes;
  const bool sums_partial = a.partial != nullptr;
  const Alone alone(sums_partial ? samples : 0, a.programs, row, a.partial_is_double ? 8 : 4);
  const bool several = sums_partial && alone.threads == 0;
  const dim3 grid(several ? static_cast<unsigned>(samples * ((row + kTogether - 1) / kTogether)) : 1);
  const int64_t values = alone.threads > 0 ? alone.sums(samples) + samples * row : 0;
  const size_t bytes = (values > kTableThreads ? values : kTableThreads) * sizeof(double);
  if (sums_partial && a.begins_early) {
    TK_LAUNCH_EARLY((table_kernel), grid, dim3(kTableThreads), bytes, stream, a, alone);
  } else {
    TK_LAUNCH((table_kernel), grid, dim3(kTableThreads), bytes, stream, a, alone);
  }
}

}  // namespace cuda
}  // namespace tversky_kernels
