// The operators on CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "../volume.h"
#include "capability.h"

namespace tversky_kernels {
namespace cpu {
namespace {

// Equal runs of voxels of one sample. They depend on the shape alone, so the sums over them do not depend on threads.
struct Chunks {
  int64_t voxels_each, per_sample;

  explicit Chunks(const Volume& v) {
    constexpr int64_t kLogits = 32768;           // fewer in a chunk are not worth handing out
    constexpr int64_t kTableBytes = 640 * 1024;  // of partial counts, all chunks together
    constexpr int64_t kRound = 1024;
    const int64_t row_bytes = v.samples * v.classes * 3 * static_cast<int64_t>(sizeof(double));
    const int64_t most = std::max<int64_t>(1, std::min<int64_t>(1024, kTableBytes / std::max<int64_t>(1, row_bytes)));
    const int64_t least_voxels = std::max(kLogits / v.classes, (v.voxels + most - 1) / most);
    voxels_each = std::max<int64_t>(1, (least_voxels + kRound - 1) / kRound) * kRound;
    per_sample = (v.voxels + voxels_each - 1) / voxels_each;
  }
};

// A worker's share of the chunks, [first, last). Its owner takes them from the front, others from the back.
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

// Calls body(sample, chunk, begin, end, scratch, worker) for every chunk. Each worker starts on a share of its own, the
// same in both passes and the one that torch's own operators give it, for what it finds in its caches there; whoever is
// done helps the others, so that nobody waits for a core that something else has slowed down.
template <typename Body>
void for_each_chunk(const Volume& v, const Chunks& chunks, int64_t scratch_bytes, const Body& body) {
  const int64_t total = v.samples * chunks.per_sample;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), total);
  const int64_t padded_scratch = (scratch_bytes + 63) / 64 * 64;
  const auto release = [](char* p) { std::free(p); };
  const std::unique_ptr<char, decltype(release)> scratch(
      static_cast<char*>(std::aligned_alloc(64, std::max<int64_t>(64, workers * padded_scratch))), release);
  if (scratch == nullptr) throw std::bad_alloc();
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

// counts[N][C][3], in a fixed order whatever the number of threads. NaN where the data are bad and that is not raised.
void count(const Volume& v, bool raise, double* counts) {
  const int64_t row = v.classes * 3;
  std::fill(counts, counts + v.samples * row, 0.0);
  if (v.samples * v.voxels == 0) return;
  const Chunks chunks(v);
  const int64_t total = v.samples * chunks.per_sample;
  std::vector<double> partial(total * row, 0.0);
  struct First {
    BadInput bad;
    int64_t chunk = std::numeric_limits<int64_t>::max();
  };
  std::vector<First> found(std::min<int64_t>(torch::stable::get_num_threads(), total));
  const Kernels& k = kernels();
  for_each_chunk(v, chunks, k.count_scratch_bytes(v),
                 [&](int64_t sample, int64_t chunk, int64_t begin, int64_t end, void* scratch, int64_t worker) {
                   BadInput bad;
                   k.count_pass(v, sample, begin, end, &partial[chunk * row], scratch, &bad);
                   if ((bad.label || bad.weight) && chunk < found[worker].chunk) found[worker] = {bad, chunk};
                 });
  const First& first =
      *std::min_element(found.begin(), found.end(), [](const First& a, const First& b) { return a.chunk < b.chunk; });
  if (first.bad.label || first.bad.weight) {
    STD_TORCH_CHECK(!raise || !first.bad.label, "target: label ", first.bad.value, " is outside [0, ",
                    v.classes + v.first_label, ")", v.has_ignore_index ? " and is not ignore_index" : "");
    STD_TORCH_CHECK(!raise, "voxel_weight: expected values >= 0, got a negative one or NaN");
    std::fill(counts, counts + v.samples * row, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  for (int64_t i = 0; i < total; ++i) {
    double* out = counts + i / chunks.per_sample * row;
    for (int64_t q = 0; q < row; ++q) out[q] += partial[i * row + q];
  }
}

// The whole loss from counts[N][C][3]: writes loss (one value, or one a row and class) and coefficients[rows][C][2].
struct Table {
  int64_t samples, classes, first_class, rows;
  Reduction reduction;
  Absent absent;
  TverskyParameters parameters;
  const double* class_parameters;  // [3][C]: alpha, beta, class weight; null: the same for all

  TverskyParameters of_class(int64_t c) const {
    TverskyParameters p = parameters;
    if (class_parameters != nullptr) {
      p.alpha = class_parameters[c];
      p.beta = class_parameters[classes + c];
      p.class_weight = class_parameters[2 * classes + c];
    }
    return p;
  }

  int64_t values() const { return reduction == Reduction::kNone ? rows * (classes - first_class) : 1; }

  void evaluate(const double* counts, double* loss, double* coefficients) const {
    const auto power = [](double x, double y) { return std::pow(x, y); };
    double sum = 0;
    int64_t averaged = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < classes; ++c) {
        double* u = coefficients + (r * classes + c) * 2;
        u[0] = u[1] = 0;
        if (c < first_class) continue;
        double tp = 0, fp = 0, fn = 0;
        for (int64_t n = rows == samples ? r : 0; n < (rows == samples ? r + 1 : samples); ++n) {
          const double* q = counts + (n * classes + c) * 3;
          tp += q[0];
          fp += q[1];
          fn += q[2];
        }
        const bool is_absent = tp + fn == 0.0;
        averaged += !(is_absent && absent == Absent::kSkip);
        double value = 0;
        if (!is_absent || absent == Absent::kKeep) {
          const TverskyRow row = tversky_row(tp, fp, fn, of_class(c), power);
          value = row.loss;
          u[0] = row.u_background;
          u[1] = row.u_foreground;
        }
        if (reduction == Reduction::kNone) {
          loss[r * (classes - first_class) + c - first_class] = value;
        } else {
          sum += value;
        }
      }
    }
    if (reduction == Reduction::kNone) return;
    const double scale = reduction == Reduction::kSum ? 1.0 : averaged == 0 ? 0.0 : 1.0 / averaged;
    *loss = sum * scale;
    for (int64_t i = 0; i < rows * classes * 2; ++i) coefficients[i] *= scale;
  }
};

Table make_table(int64_t samples, int64_t classes, const std::optional<Tensor>& class_parameters, double alpha,
                 double beta, double gamma, double smooth_nr, double smooth_dr, bool include_background, bool batch,
                 int64_t absent, int64_t reduction) {
  if (class_parameters.has_value()) {
    STD_TORCH_CHECK(class_parameters->scalar_type() == ScalarType::Double && class_parameters->is_cpu() &&
                        class_parameters->is_contiguous() && class_parameters->dim() == 2 &&
                        class_parameters->size(0) == 3 && class_parameters->size(1) == classes,
                    "class_parameters: expected a contiguous (3, C) tensor of float64 on the CPU");
  }
  Table t;
  t.samples = samples;
  t.classes = classes;
  t.first_class = include_background || classes == 1 ? 0 : 1;
  t.rows = batch ? 1 : samples;
  t.reduction = static_cast<Reduction>(reduction);
  t.absent = static_cast<Absent>(absent);
  t.parameters = {alpha, beta, gamma, smooth_nr, smooth_dr, 1.0};
  t.class_parameters = class_parameters.has_value() ? class_parameters->const_data_ptr<double>() : nullptr;
  return t;
}

std::tuple<Tensor, Tensor> evaluate_table(const Table& table, const double* counts, const Tensor& like, ScalarType type,
                                          bool batch) {
  std::vector<int64_t> shape;
  if (table.reduction == Reduction::kNone) {
    if (!batch) shape.push_back(table.rows);
    shape.push_back(table.classes - table.first_class);
  }
  Tensor loss = torch::stable::new_empty(like, shape, type);
  const std::vector<int64_t> coefficient_shape{table.rows, table.classes, 2};
  Tensor coefficients = torch::stable::new_empty(like, coefficient_shape, ScalarType::Double);
  std::vector<double> values(std::max<int64_t>(1, table.values()));
  table.evaluate(counts, values.data(), coefficients.mutable_data_ptr<double>());
  for (int64_t i = 0; i < table.values(); ++i) {
    if (type == ScalarType::Double) {
      loss.mutable_data_ptr<double>()[i] = values[i];
    } else {
      loss.mutable_data_ptr<float>()[i] = static_cast<float>(values[i]);
    }
  }
  return {loss, coefficients};
}

Tensor count_pass(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& voxel_weight,
                  int64_t activation, std::optional<int64_t> ignore_index, bool raise_bad_input) {
  check_inputs(logits, target, voxel_weight, activation);
  const VolumeTensors volume(logits, target, voxel_weight, activation, ignore_index);
  const std::vector<int64_t> shape{volume.view.samples, volume.view.classes, 3};
  Tensor counts = torch::stable::new_empty(logits, shape, ScalarType::Double);
  count(volume.view, raise_bad_input, counts.mutable_data_ptr<double>());
  return counts;
}

std::tuple<Tensor, Tensor> table(const Tensor& counts, const std::optional<Tensor>& class_parameters, double alpha,
                                 double beta, double gamma, double smooth_nr, double smooth_dr, bool include_background,
                                 bool batch, int64_t absent, int64_t reduction) {
  check_counts(counts);
  const Tensor contiguous = torch::stable::contiguous(counts);
  const Table t = make_table(counts.size(0), counts.size(1), class_parameters, alpha, beta, gamma, smooth_nr, smooth_dr,
                             include_background, batch, absent, reduction);
  return evaluate_table(t, contiguous.const_data_ptr<double>(), counts, ScalarType::Double, batch);
}

std::tuple<Tensor, Tensor> tversky_loss(const Tensor& logits, const Tensor& target,
                                        const std::optional<Tensor>& voxel_weight, int64_t activation,
                                        std::optional<int64_t> ignore_index, bool raise_bad_input,
                                        const std::optional<Tensor>& class_parameters, double alpha, double beta,
                                        double gamma, double smooth_nr, double smooth_dr, bool include_background,
                                        bool batch, int64_t absent, int64_t reduction) {
  check_inputs(logits, target, voxel_weight, activation);
  const VolumeTensors volume(logits, target, voxel_weight, activation, ignore_index);
  const Table t = make_table(volume.view.samples, volume.view.classes, class_parameters, alpha, beta, gamma, smooth_nr,
                             smooth_dr, include_background, batch, absent, reduction);
  std::vector<double> counts(volume.view.samples * volume.view.classes * 3);
  count(volume.view, raise_bad_input, counts.data());
  const ScalarType type = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return evaluate_table(t, counts.data(), logits, type, batch);
}

template <typename A>
std::vector<A> scaled_coefficients(const Tensor& grad_loss, const Tensor& coefficients) {
  const int64_t rows = coefficients.size(0), classes = coefficients.size(1);
  const int64_t kept = grad_loss.dim() == 0 ? classes : grad_loss.size(grad_loss.dim() - 1);
  const Tensor u = torch::stable::contiguous(coefficients), g = torch::stable::contiguous(grad_loss);
  const auto upstream = [&](int64_t r, int64_t c) -> double {
    if (g.dim() != 0 && c < classes - kept) return 0.0;
    const int64_t i = g.dim() == 0 ? 0 : r * kept + c - (classes - kept);
    return g.scalar_type() == ScalarType::Double ? g.const_data_ptr<double>()[i] : g.const_data_ptr<float>()[i];
  };
  std::vector<A> scaled(rows * classes * 2);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t q = 0; q < 2; ++q) {
        const int64_t i = (r * classes + c) * 2 + q;
        scaled[i] = static_cast<A>(upstream(r, c) * u.const_data_ptr<double>()[i]);
      }
    }
  }
  return scaled;
}

void write_gradient(const VolumeTensors& volume, const Tensor& grad_loss, const Tensor& coefficients,
                    const Tensor& out) {
  const Volume& v = volume.view;
  if (v.samples * v.voxels == 0) return;
  const GradientView view{out.mutable_data_ptr(), out.stride(0), out.stride(1), *single_stride(out, 2)};
  std::vector<float> u_float;
  std::vector<double> u_double;
  if (v.logits.type == ElementType::kDouble) {
    u_double = scaled_coefficients<double>(grad_loss, coefficients);
  } else {
    u_float = scaled_coefficients<float>(grad_loss, coefficients);
  }
  const int64_t row = coefficients.size(0) == 1 ? 0 : v.classes * 2;
  const Kernels& k = kernels();
  for_each_chunk(v, Chunks(v), k.gradient_scratch_bytes(v),
                 [&](int64_t sample, int64_t, int64_t begin, int64_t end, void* scratch, int64_t) {
                   const void* u = u_double.empty() ? static_cast<const void*>(&u_float[sample * row])
                                                    : static_cast<const void*>(&u_double[sample * row]);
                   k.gradient_pass(v, sample, begin, end, u, view, scratch);
                 });
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
  write_gradient(volume, grad_loss, coefficients, gradient);
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
  write_gradient(volume, grad_loss, coefficients, logits);
}

int64_t cpu_capability(std::optional<int64_t> force) {
  if (force.has_value()) set_capability(static_cast<Capability>(*force));
  return static_cast<int64_t>(current_capability());
}

}  // namespace
}  // namespace cpu
}  // namespace tversky_kernels

STABLE_TORCH_LIBRARY_IMPL(tversky_kernels, CPU, m) {
  m.impl("count_pass", TORCH_BOX(&tversky_kernels::cpu::count_pass));
  m.impl("table", TORCH_BOX(&tversky_kernels::cpu::table));
  m.impl("tversky_loss", TORCH_BOX(&tversky_kernels::cpu::tversky_loss));
  m.impl("gradient_pass", TORCH_BOX(&tversky_kernels::cpu::gradient_pass));
  m.impl("gradient_pass_", TORCH_BOX(&tversky_kernels::cpu::gradient_pass_));
}

STABLE_TORCH_LIBRARY_IMPL(tversky_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&tversky_kernels::cpu::cpu_capability));
}
