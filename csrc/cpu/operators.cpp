// The operators on CPU tensors.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../torch/operators.h"
#include "capability.h"
#include "gradient_memory.h"

namespace tversky_kernels {
namespace cpu {
namespace {

// Equal runs of voxels of one sample. They depend on the shape alone, so the sums do not depend on the number of
// threads.
struct Chunks {
  int64_t voxels_each, per_sample;

  explicit Chunks(const Volume& v) {
    constexpr int64_t kLogits = 32768;           // fewer in a chunk are not worth handing out
    constexpr int64_t kTableBytes = 640 * 1024;  // of partial counts, all chunks together
    constexpr int64_t kRound = 1024;
    const int64_t row_bytes = v.samples * v.classes * v.count_columns() * static_cast<int64_t>(sizeof(double));
    const int64_t most = std::max<int64_t>(1, std::min<int64_t>(1024, kTableBytes / std::max<int64_t>(1, row_bytes)));
    const int64_t least_voxels = std::max(kLogits / v.classes, (v.voxels + most - 1) / most);
    voxels_each = std::max<int64_t>(1, (least_voxels + kRound - 1) / kRound) * kRound;
    per_sample = (v.voxels + voxels_each - 1) / voxels_each;
  }
};

// A worker's share of the chunks, [first, last). Its owner takes chunks from the front, other workers take them from
// the back.
class Share {
 public:
  void set(uint32_t first, uint32_t last) { range_.store(uint64_t{last} << 32 | first, std::memory_order_relaxed); }

  std::optional<uint32_t> take(bool from_front) {
    uint64_t range = range_.load(std::memory_order_relaxed);
    for (;;) {
      const uint32_t first = static_cast<uint32_t>(range), last = static_cast<uint32_t>(range >> 32);
      if (first >= last) return std::nullopt;
      const uint64_t rest = from_front ? uint64_t{last} << 32 | (first + 1) : uint64_t{last - 1} << 32 | first;
      if (range_.compare_exchange_weak(range, rest, std::memory_order_relaxed)) return from_front ? first : last - 1;
    }
  }

 private:
  alignas(64) std::atomic<uint64_t> range_{0};
};

// Calls body(sample, chunk, begin, end, scratch, worker) for every chunk. Each worker starts on its own share. The
// share is the same in both passes and in torch's operators, so the worker finds it in its caches. A worker that has
// finished helps the others: nobody waits for a core that another program has slowed down.
template <typename Body>
void for_each_chunk(const Volume& v, const Chunks& chunks, int64_t scratch_bytes, const Body& body) {
  const int64_t total = v.samples * chunks.per_sample;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), total);
  const int64_t padded_scratch = (scratch_bytes + 63) / 64 * 64;
  const auto release = [](char* p) { std::free(p); };
  const std::unique_ptr<char, decltype(release)> scratch(
      static_cast<char*>(std::aligned_alloc(64, std::max<int64_t>(64, workers * padded_scratch))), release);
  STD_TORCH_CHECK(scratch != nullptr, "can't allocate memory: you tried to allocate ", workers * padded_scratch,
                  " bytes for working memory");
  const auto run = [&](int64_t i, int64_t worker) {
    const int64_t sample = i / chunks.per_sample, begin = i % chunks.per_sample * chunks.voxels_each;
    body(sample, i, begin, std::min(v.voxels, begin + chunks.voxels_each), scratch.get() + worker * padded_scratch,
         worker);
  };
  if (workers <= 1) {
    for (int64_t i = 0; i < total; ++i) run(i, 0);
    return;
  }
  std::vector<Share> shares(workers);
  for (int64_t w = 0; w < workers; ++w) {
    shares[w].set(static_cast<uint32_t>(total * w / workers), static_cast<uint32_t>(total * (w + 1) / workers));
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      while (const auto i = shares[worker].take(true)) run(*i, worker);
      for (int64_t other = 1; other < workers; ++other) {
        while (const auto i = shares[(worker + other) % workers].take(false)) run(*i, worker);
      }
    }
  });
}

bool is_bad(const BadInput& bad) {
  return bad.label || bad.weight || bad.target || bad.region;
}

// The error about a bad value. Python shows its first line.
void raise_bad_input(const Volume& v, const BadInput& bad) {
  STD_TORCH_CHECK(!bad.label, "target: expected labels in [0, ", v.classes + v.first_label, ")",
                  v.has_ignore_index ? " or the ignore_index " + std::to_string(v.ignore_index) : std::string(),
                  ", got ", bad.value, "\n");
  STD_TORCH_CHECK(!bad.weight, "voxel_weight: expected values >= 0, got ", bad.weight_value, "\n");
  STD_TORCH_CHECK(!bad.target, "target: expected values of a dense target in [0, 1], got ", bad.target_value,
                  "; check_target=False takes any\n");
}

void raise_bad_region(const RegionVolume& r, const BadInput& bad) {
  STD_TORCH_CHECK(!bad.region, "regions: expected values below num_regions = ", r.count, ", got ", bad.region_value,
                  "\n");
}

// Where one of the overlap counts of a class is NaN, all of them become NaN: a voxel of another class adds nothing to
// its tp.
void spread_nan(int64_t rows, int columns, double* counts) {
  for (int64_t i = 0; i < rows; ++i) {
    double* q = counts + i * columns;
    if (!std::isnan(q[kTp] + q[kFp] + q[kFn])) continue;
    q[kTp] = q[kFp] = q[kFn] = std::numeric_limits<double>::quiet_NaN();
  }
}

// The first bad value that each worker has found.
class FoundBad {
 public:
  explicit FoundBad(int64_t chunks) : found_(std::min<int64_t>(torch::stable::get_num_threads(), chunks)) {}
  void add(int64_t worker, int64_t chunk, const BadInput& bad) {
    if (is_bad(bad) && chunk < found_[worker].chunk) found_[worker] = {bad, chunk};
  }
  const BadInput& first() const {
    return std::min_element(found_.begin(), found_.end(), [](const One& a, const One& b) { return a.chunk < b.chunk; })
        ->bad;
  }

 private:
  struct One {
    BadInput bad;
    int64_t chunk = std::numeric_limits<int64_t>::max();
  };
  std::vector<One> found_;
};

// Adds each chunk's sums, `row` of them, to those of its sample, counts[N][row]: in a fixed order whatever the number
// of threads. pass(kernels, sample, begin, end, sums, scratch, bad) counts a chunk. Returns the first bad value.
template <typename Pass>
BadInput count_chunks(const Volume& v, ScratchBytes Kernels::* scratch_bytes, int64_t row, double* counts,
                      const Pass& pass) {
  const Chunks chunks(v);
  const int64_t total = v.samples * chunks.per_sample;
  std::vector<double> partial(total * row, 0.0);
  FoundBad found(total);
  const Kernels& k = kernels(v.logits.type);
  for_each_chunk(v, chunks, (k.*scratch_bytes)(v),
                 [&](int64_t sample, int64_t chunk, int64_t begin, int64_t end, void* scratch, int64_t worker) {
                   BadInput bad;
                   pass(k, sample, begin, end, &partial[chunk * row], scratch, &bad);
                   found.add(worker, chunk, bad);
                 });
  for (int64_t i = 0; i < total; ++i) {
    double* out = counts + i / chunks.per_sample * row;
    for (int64_t q = 0; q < row; ++q) out[q] += partial[i * row + q];
  }
  return found.first();
}

// counts[N][C][columns]; NaN where values are bad and no error is raised.
void count(const Volume& v, Check check, double* counts) {
  const int64_t row = v.classes * v.count_columns();
  std::fill(counts, counts + v.samples * row, 0.0);
  if (v.samples * v.voxels == 0) return;
  const BadInput bad =
      count_chunks(v, &Kernels::count_scratch_bytes, row, counts,
                   [&](const Kernels& k, int64_t sample, int64_t begin, int64_t end, double* sums, void* scratch,
                       BadInput* found) { k.count_pass(v, sample, begin, end, sums, scratch, found); });
  if (is_bad(bad)) {
    if (check == Check::kRaise) raise_bad_input(v, bad);
    std::fill(counts, counts + v.samples * row, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  spread_nan(v.samples * v.classes, v.count_columns(), counts);
}

// The whole loss from counts[N][C][columns]. Writes the loss (one value, or one for each row and class) and the
// coefficients.
void evaluate_table(const Table& t, const double* counts, double* loss, double* coefficients) {
  const auto power = [](double x, double y) { return std::pow(x, y); };
  const int columns = t.columns(), width = t.coefficient_columns();
  const bool none = t.reduction == Reduction::kNone;
  double sum = 0, ce_sum = 0, ce_divisor = 0;
  int64_t averaged = 0;
  for (int64_t r = 0; r < t.rows; ++r) {
    double row_ce = 0, row_divisor = 0;
    for (int64_t c = 0; c < t.classes; ++c) {
      double* u = coefficients + (r * t.classes + c) * width;
      u[kBackground] = u[kForeground] = 0;
      double q[kAllCounts] = {};
      for (int64_t n = r * t.together(); n < (r + 1) * t.together(); ++n) {
        for (int i = 0; i < columns; ++i) q[i] += counts[(n * t.classes + c) * columns + i];
      }
      if (t.has_cross_entropy) {
        const CeTerms terms = ce_terms(q, t.ce_class_weight(c), t.classes, t.ce);
        row_ce += terms.sum;
        row_divisor += terms.divisor;
      }
      if (c < t.first_class) continue;
      const bool is_absent = q[kTp] + q[kFn] == 0.0;
      averaged += !(is_absent && t.absent == Absent::kSkip);
      double value = 0;
      if (!is_absent || t.absent == Absent::kKeep) {
        const TverskyRow row = tversky_row(q[kTp], q[kFp], q[kFn], t.tversky_of_class(c), power);
        value = row.loss;
        u[kBackground] = row.u_background;
        u[kForeground] = row.u_foreground;
      }
      if (none) {
        loss[r * t.kept() + c - t.first_class] = t.ce.tversky_weight * value;
      } else {
        sum += value;
      }
    }
    ce_sum += row_ce;
    ce_divisor += row_divisor;
    if (none && t.has_cross_entropy) {
      const double per = row_divisor == 0.0 ? 0.0 : 1.0 / row_divisor;
      for (int64_t i = 0; i < t.kept(); ++i) loss[r * t.kept() + i] += t.ce.ce_weight * row_ce * per;
      for (int64_t c = 0; c < t.classes; ++c) coefficients[(r * t.classes + c) * width + kCeCoefficient] = per;
    }
  }
  const bool mean = t.reduction == Reduction::kMean;
  const double scale = t.ce.tversky_weight * (!mean ? 1.0 : averaged == 0 ? 0.0 : 1.0 / averaged);
  const double ce_scale = !mean ? 1.0 : ce_divisor == 0.0 ? 0.0 : 1.0 / ce_divisor;
  if (!none) *loss = sum * scale + t.ce.ce_weight * ce_sum * ce_scale;
  for (int64_t i = 0; i < t.rows * t.classes; ++i) {
    double* u = coefficients + i * width;
    u[kBackground] = bounded_coefficient(u[kBackground] * scale, t.most_coefficient);
    u[kForeground] = bounded_coefficient(u[kForeground] * scale, t.most_coefficient);
    if (t.has_cross_entropy) {
      const double per = none ? u[kCeCoefficient] : ce_scale;
      const CeCoefficients k = ce_coefficients(t.ce_class_weight(i % t.classes), t.classes, t.ce);
      u[kCeCoefficient] = bounded_coefficient(k.ce * per, t.most_coefficient);
      u[kSmoothingCoefficient] = bounded_coefficient(k.smoothing * per, t.most_coefficient);
    }
  }
}

// coefficients[rows][C][columns] times the upstream gradient, in the type of the pass.
template <typename A>
std::vector<A> scaled_coefficients(const Tensor& grad_loss, const Tensor& coefficients, OverlapForm form) {
  const int64_t rows = coefficients.size(0), classes = coefficients.size(1), columns = coefficients.size(2);
  const int64_t kept = grad_loss.dim() == 0 ? 1 : grad_loss.size(grad_loss.dim() - 1);
  const auto upstream = [&](int64_t i) -> double {
    return grad_loss.scalar_type() == ScalarType::Double ? grad_loss.const_data_ptr<double>()[i]
                                                         : grad_loss.const_data_ptr<float>()[i];
  };
  const double* all = coefficients.const_data_ptr<double>();
  std::vector<A> scaled(rows * classes * columns);
  for (int64_t r = 0; r < rows; ++r) {
    double of_row = 0;  // of the cross-entropy, which every value of the row contains
    for (int64_t i = 0; i < kept; ++i) of_row += upstream(grad_loss.dim() == 0 ? 0 : r * kept + i);
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t of_class = c - (classes - kept);
      const double g = grad_loss.dim() == 0 ? of_row : of_class < 0 ? 0.0 : upstream(r * kept + of_class);
      const int64_t at = (r * classes + c) * columns;
      const double* u = all + at;
      scaled[at + kBackground] = static_cast<A>(g * u[kBackground]);
      scaled[at + kForeground] = static_cast<A>(g * foreground_coefficient(u, form));
      for (int64_t q = kOverlapCoefficients; q < columns; ++q) scaled[at + q] = static_cast<A>(of_row * u[q]);
    }
  }
  return scaled;
}

struct Cpu {
  static void count(const Tensor&, const Volume& v, Check check, const Tensor& counts) {
    tversky_kernels::cpu::count(v, check, counts.mutable_data_ptr<double>());
  }

  static void evaluate(const Table& t, const double* counts, const Tensor& loss, const Tensor& coefficients) {
    std::vector<double> values(std::max<int64_t>(1, loss.numel()));
    evaluate_table(t, counts, values.data(), coefficients.mutable_data_ptr<double>());
    for (int64_t i = 0; i < loss.numel(); ++i) {
      if (loss.scalar_type() == ScalarType::Double) {
        loss.mutable_data_ptr<double>()[i] = values[i];
      } else {
        loss.mutable_data_ptr<float>()[i] = static_cast<float>(values[i]);
      }
    }
  }
  static void evaluate(const Table& t, const Tensor& counts, const Tensor& loss, const Tensor& coefficients) {
    evaluate(t, counts.const_data_ptr<double>(), loss, coefficients);
  }

  static void forward(const Tensor&, const Volume& v, Check check, const Table& t, const Tensor& loss,
                      const Tensor& coefficients) {
    std::vector<double> counts(v.samples * v.classes * v.count_columns());
    tversky_kernels::cpu::count(v, check, counts.data());
    evaluate(t, counts.data(), loss, coefficients);
  }

  static Tensor new_gradient(const Tensor& logits) { return tversky_kernels::cpu::new_gradient(logits); }

  static void gradient(const Volume& v, const Tensor& grad_loss, const Tensor& coefficients, const Tensor& out) {
    const GradientView view{out.mutable_data_ptr(), out.stride(0), out.stride(1), *single_stride(out, 2)};
    std::vector<float> u_float;
    std::vector<double> u_double;
    if (v.logits.type == ElementType::kDouble) {
      u_double = scaled_coefficients<double>(grad_loss, coefficients, v.overlap);
    } else {
      u_float = scaled_coefficients<float>(grad_loss, coefficients, v.overlap);
    }
    const int64_t row = coefficients.size(0) == 1 ? 0 : v.classes * v.coefficient_columns();
    const Kernels& k = kernels(v.logits.type);
    for_each_chunk(v, Chunks(v), k.gradient_scratch_bytes(v),
                   [&](int64_t sample, int64_t, int64_t begin, int64_t end, void* scratch, int64_t) {
                     const void* u = u_double.empty() ? static_cast<const void*>(&u_float[sample * row])
                                                      : static_cast<const void*>(&u_double[sample * row]);
                     k.gradient_pass(v, sample, begin, end, u, view, scratch);
                   });
  }
};

// ---- Regions

// The rows of a chunk: only of the regions that it meets.
struct ChunkRows {
  int64_t size;
  std::vector<int64_t> regions;
  std::vector<double> values;
};

// The rows of a chunk while it is counted. slots: the place of each region's row; -1: it has none.
struct RowsOfChunk {
  ChunkRows* rows;
  std::vector<int32_t>* slots;

  static double* row(void* context, int64_t region) {
    auto* self = static_cast<RowsOfChunk*>(context);
    int32_t& slot = (*self->slots)[region];
    ChunkRows& rows = *self->rows;
    if (slot < 0) {
      slot = static_cast<int32_t>(rows.regions.size());
      rows.regions.push_back(region);
      rows.values.resize(rows.values.size() + rows.size, 0.0);
    }
    return rows.values.data() + slot * rows.size;
  }
};

// Fewer chunks than without regions: each has rows of its own.
Chunks region_chunks(const Volume& v) {
  Chunks chunks(v);
  constexpr int64_t kLeast = 32768, kMost = 64;
  const int64_t least = std::max<int64_t>(kLeast, (v.voxels * v.samples + kMost - 1) / kMost);
  chunks.voxels_each = (least + 4095) / 4096 * 4096;
  chunks.per_sample = (v.voxels + chunks.voxels_each - 1) / chunks.voxels_each;
  return chunks;
}

struct CpuRegions {
  static void count(const RegionVolume& r, Check check, const Tensor& out) {
    const Volume& v = r.volume;
    const int columns = v.count_columns() + 1;
    const int64_t row = v.classes * columns, all = v.samples * r.count * row;
    double* const counts = out.mutable_data_ptr<double>();
    std::fill(counts, counts + all, 0.0);
    if (v.samples * v.voxels == 0) return;
    const Chunks chunks = region_chunks(v);
    const int64_t total = v.samples * chunks.per_sample;
    std::vector<ChunkRows> found(total, ChunkRows{row, {}, {}});
    const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), total);
    std::vector<std::vector<int32_t>> slots(workers, std::vector<int32_t>(r.count, -1));
    FoundBad bad_input(total);
    const Kernels& k = kernels(v.logits.type);
    for_each_chunk(v, chunks, k.region_count_scratch_bytes(r),
                   [&](int64_t sample, int64_t chunk, int64_t begin, int64_t end, void* scratch, int64_t worker) {
                     BadInput bad;
                     RowsOfChunk context{&found[chunk], &slots[worker]};
                     k.region_count_pass(r, sample, begin, end, RegionRows{&RowsOfChunk::row, &context}, scratch, &bad);
                     for (const int64_t region : found[chunk].regions) slots[worker][region] = -1;
                     bad_input.add(worker, chunk, bad);
                   });
    if (is_bad(bad_input.first())) {
      if (check == Check::kRaise) {
        raise_bad_region(r, bad_input.first());
        raise_bad_input(v, bad_input.first());
      }
      std::fill(counts, counts + all, std::numeric_limits<double>::quiet_NaN());
      return;
    }
    for (int64_t i = 0; i < total; ++i) {
      const ChunkRows& rows = found[i];
      for (size_t s = 0; s < rows.regions.size(); ++s) {
        double* to = counts + (i / chunks.per_sample * r.count + rows.regions[s]) * row;
        for (int64_t q = 0; q < row; ++q) to[q] += rows.values[s * row + q];
      }
    }
    spread_nan(v.samples * r.count * v.classes, columns, counts);
  }

  static Tensor new_gradient(const Tensor& logits) { return tversky_kernels::cpu::new_gradient(logits); }

  static void gradient(const RegionVolume& r, const Tensor& coefficients, const Tensor& out) {
    const Volume& v = r.volume;
    const GradientView view{out.mutable_data_ptr(), out.stride(0), out.stride(1), *single_stride(out, 2)};
    const int64_t row = r.count * v.classes * v.coefficient_columns();
    std::vector<float> u_float;
    std::vector<double> u_double;
    if (v.logits.type == ElementType::kDouble) {
      u_double = in_type<double>(coefficients, v);
    } else {
      u_float = in_type<float>(coefficients, v);
    }
    const Kernels& k = kernels(v.logits.type);
    for_each_chunk(v, region_chunks(v), k.region_gradient_scratch_bytes(r),
                   [&](int64_t sample, int64_t, int64_t begin, int64_t end, void* scratch, int64_t) {
                     const void* u = u_double.empty() ? static_cast<const void*>(&u_float[sample * row])
                                                      : static_cast<const void*>(&u_double[sample * row]);
                     k.region_gradient_pass(r, sample, begin, end, u, view, scratch);
                   });
  }

 private:
  template <typename A>
  static std::vector<A> in_type(const Tensor& coefficients, const Volume& v) {
    const double* u = coefficients.const_data_ptr<double>();
    const int columns = v.coefficient_columns();
    std::vector<A> converted(coefficients.numel());
    for (int64_t i = 0; i < coefficients.numel(); i += columns) {
      for (int q = 0; q < columns; ++q) converted[i + q] = static_cast<A>(u[i + q]);
      converted[i + kForeground] = static_cast<A>(foreground_coefficient(u + i, v.overlap));
    }
    return converted;
  }
};

// (N, 3, C): the voxels of class c predicted as c, those predicted as c, and those of class c.
Tensor hard_count_pass(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& voxel_weight,
                       std::optional<int64_t> ignore_index, bool raises) {
  const PassOptions options{0, ignore_index, 0, 0, 0.0, false};
  const VolumeTensors volume(logits, target, voxel_weight, options);
  const Volume& v = volume.view;
  STD_TORCH_CHECK(!v.dense, "target: expected class indices");
  const std::vector<int64_t> shape{v.samples, 3, v.classes};
  Tensor counts = torch::stable::new_zeros(logits, shape, ScalarType::Double);
  if (v.samples * v.voxels == 0) return counts;
  const BadInput bad =
      count_chunks(v, &Kernels::hard_count_scratch_bytes, 3 * v.classes, counts.mutable_data_ptr<double>(),
                   [&](const Kernels& k, int64_t sample, int64_t begin, int64_t end, double* sums, void* scratch,
                       BadInput* found) { k.hard_count_pass(v, sample, begin, end, sums, scratch, found); });
  if (raises) raise_bad_input(v, bad);
  return counts;
}

int64_t cpu_capability(std::optional<int64_t> force) {
  if (force.has_value()) {
    check_range("force", *force, static_cast<int64_t>(Capability::kLast));
    set_capability(static_cast<Capability>(*force));
  }
  return static_cast<int64_t>(current_capability());
}

}  // namespace
}  // namespace cpu
}  // namespace tversky_kernels

STABLE_TORCH_LIBRARY_IMPL(tversky_kernels, CPU, m) {
  tversky_kernels::Operators<tversky_kernels::cpu::Cpu>::implement(m);
  tversky_kernels::RegionOperators<tversky_kernels::cpu::CpuRegions>::implement(m);
  m.impl("hard_count_pass", TORCH_BOX(&tversky_kernels::cpu::hard_count_pass));
}

STABLE_TORCH_LIBRARY_IMPL(tversky_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&tversky_kernels::cpu::cpu_capability));
  m.impl("cpu_gradient_memory", TORCH_BOX(&tversky_kernels::cpu::gradient_memory));
}
