// The operators: checks, shapes and new tensors, the same for every device. What runs there is the Backend's:
//   count(logits, volume, check, counts)                           the counts table [N][C][3 or 6]
//   evaluate(table, counts, loss, coefficients)                    the table alone
//   forward(logits, volume, check, table, loss, coefficients)     both
//   gradient(volume, grad_loss, coefficients, out)                 the gradient pass; all tensors contiguous but out
//   new_gradient(logits)                                           its memory, the voxels one stride apart
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/table.h"
#include "volume.h"

// The dispatcher hands an operator its arguments one by one. These lists and the records that they become have each of
// them once, in the order of PassOptions and TableOptions in tversky_kernels/_options.py.
#define TK_PASS_ARGUMENTS                                                                                              \
  int64_t activation, std::optional<int64_t> ignore_index, int64_t overlap, int64_t cross_entropy, double focal_gamma, \
      bool nearest_exact
#define TK_PASS_RECORD                                                           \
  PassOptions {                                                                  \
    activation, ignore_index, overlap, cross_entropy, focal_gamma, nearest_exact \
  }
#define TK_TABLE_ARGUMENTS                                                                                             \
  const std::optional<Tensor>&class_parameters, double alpha, double beta, double gamma, double smooth_nr,             \
      double smooth_dr, bool include_background, bool batch, int64_t absent, int64_t reduction, double tversky_weight, \
      double ce_weight, double label_smoothing, int64_t ce_mean
#define TK_TABLE_RECORD                                                                                              \
  TableOptions {                                                                                                     \
    class_parameters, {alpha, beta, gamma, smooth_nr, smooth_dr, 1.0}, include_background, batch, absent, reduction, \
        {tversky_weight, ce_weight, label_smoothing, CeMean{}}, ce_mean                                              \
  }

namespace tversky_kernels {

struct TableOptions {
  const std::optional<Tensor>& class_parameters;
  TverskyParameters tversky;
  bool include_background, batch;
  int64_t absent, reduction;
  CeParameters ce;
  int64_t ce_mean;
};

inline void check_in_place(const Tensor& logits) {
  check_logits(logits);
  STD_TORCH_CHECK(single_stride(logits, 2).has_value(), "logits: in place, its voxels must lie one stride apart");
  STD_TORCH_CHECK(is_dense(logits), "logits: in place, each must have a place of its own, with nothing in between");
}

template <typename Backend>
struct Operators {
  static Tensor count_pass(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& voxel_weight,
                           TK_PASS_ARGUMENTS, int64_t check) {
    const VolumeTensors volume(logits, target, voxel_weight, TK_PASS_RECORD, checked_mode(check));
    const std::vector<int64_t> shape{volume.view.samples, volume.view.classes, volume.view.count_columns()};
    Tensor counts = torch::stable::new_empty(logits, shape, ScalarType::Double);
    Backend::count(logits, volume.view, static_cast<Check>(check), counts);
    return counts;
  }

  static std::tuple<Tensor, Tensor> table(const Tensor& counts, TK_TABLE_ARGUMENTS) {
    check_counts(counts);
    const Tensor in_order = contiguous(counts);
    const Table t = make_table(counts, counts.size(0), counts.size(1), counts.size(2) == kAllCounts, TK_TABLE_RECORD);
    auto [loss, coefficients] = results(counts, t, ScalarType::Double, batch);
    Backend::evaluate(t, in_order, loss, coefficients);
    return {loss, coefficients};
  }

  static std::tuple<Tensor, Tensor> tversky_loss(const Tensor& logits, const Tensor& target,
                                                 const std::optional<Tensor>& voxel_weight, TK_PASS_ARGUMENTS,
                                                 int64_t check, TK_TABLE_ARGUMENTS) {
    const VolumeTensors volume(logits, target, voxel_weight, TK_PASS_RECORD, checked_mode(check));
    const Table t = make_table(logits, volume.view.samples, volume.view.classes, cross_entropy != 0, TK_TABLE_RECORD);
    const ScalarType type = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    auto [loss, coefficients] = results(logits, t, type, batch);
    Backend::forward(logits, volume.view, static_cast<Check>(check), t, loss, coefficients);
    return {loss, coefficients};
  }

  static Tensor gradient_pass(const Tensor& grad_loss, const Tensor& coefficients, const Tensor& logits,
                              const Tensor& target, const std::optional<Tensor>& voxel_weight, TK_PASS_ARGUMENTS) {
    const VolumeTensors volume(logits, target, voxel_weight, TK_PASS_RECORD);
    Tensor gradient = Backend::new_gradient(volume.logits);
    write_gradient(gradient, volume.view, grad_loss, coefficients);
    return gradient;
  }

  static void gradient_pass_(Tensor logits, const Tensor& grad_loss, const Tensor& coefficients, const Tensor& target,
                             const std::optional<Tensor>& voxel_weight, TK_PASS_ARGUMENTS) {
    check_in_place(logits);
    const VolumeTensors volume(logits, target, voxel_weight, TK_PASS_RECORD);
    write_gradient(logits, volume.view, grad_loss, coefficients);
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("count_pass", TORCH_BOX(&Operators::count_pass));
    m.impl("table", TORCH_BOX(&Operators::table));
    m.impl("tversky_loss", TORCH_BOX(&Operators::tversky_loss));
    m.impl("gradient_pass", TORCH_BOX(&Operators::gradient_pass));
    m.impl("gradient_pass_", TORCH_BOX(&Operators::gradient_pass_));
  }

 private:
  static Check checked_mode(int64_t check) {
    check_range("check", check, 2);
    return static_cast<Check>(check);
  }

  static Table make_table(const Tensor& like, int64_t samples, int64_t classes, bool has_cross_entropy,
                          const TableOptions& a) {
    if (a.class_parameters.has_value()) {
      const Tensor& given = *a.class_parameters;
      STD_TORCH_CHECK(given.scalar_type() == ScalarType::Double && given.is_contiguous() && given.dim() == 2 &&
                          given.size(0) == 4 && given.size(1) == classes,
                      "class_parameters: expected a contiguous (4, C) tensor of float64 on the logits' device");
      check_device("class_parameters", given, like);
    }
    check_range("absent", a.absent, 2);
    check_range("reduction", a.reduction, 2);
    check_range("ce_mean", a.ce_mean, 3);
    Table t{};
    t.samples = samples;
    t.classes = classes;
    t.first_class = a.include_background || classes == 1 ? 0 : 1;
    t.rows = a.batch ? 1 : samples;
    t.has_cross_entropy = has_cross_entropy;
    t.most_coefficient = like.scalar_type() == ScalarType::Double ? kMostOfDouble : kMostOfFloat;
    t.reduction = static_cast<Reduction>(a.reduction);
    t.absent = static_cast<Absent>(a.absent);
    t.tversky = a.tversky;
    t.ce = a.ce;
    t.ce.mean = static_cast<CeMean>(a.ce_mean);
    t.class_parameters = a.class_parameters.has_value() ? a.class_parameters->const_data_ptr<double>() : nullptr;
    return t;
  }

  // Loss and coefficients, not written yet.
  static std::tuple<Tensor, Tensor> results(const Tensor& like, const Table& t, ScalarType type, bool batch) {
    std::vector<int64_t> shape;
    if (t.reduction == Reduction::kNone) {
      if (!batch) shape.push_back(t.rows);
      shape.push_back(t.kept());
    }
    const std::vector<int64_t> coefficient_shape{t.rows, t.classes, t.coefficient_columns()};
    return {torch::stable::new_empty(like, shape, type),
            torch::stable::new_empty(like, coefficient_shape, ScalarType::Double)};
  }

  static void write_gradient(const Tensor& out, const Volume& volume, const Tensor& grad_loss,
                             const Tensor& coefficients) {
    check_coefficients(coefficients, out, static_cast<int64_t>(volume.cross_entropy));
    check_grad_loss(grad_loss, coefficients);
    if (volume.samples * volume.voxels == 0) return;
    Backend::gradient(volume, contiguous(grad_loss), contiguous(coefficients), out);
  }

  // is_contiguous is asked first: torch's own function goes through the dispatcher.
  static Tensor contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }
};

// The operators of losses with regions. The Backend's:
//   count(volume, check, counts)                   the counts [N][R][C][4 or 7]
//   gradient(volume, coefficients, out)            the gradient pass; the upstream gradient is in the coefficients
//   new_gradient(logits)                           as above
template <typename Backend>
struct RegionOperators {
  static Tensor count_pass(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& voxel_weight,
                           const std::optional<Tensor>& regions, const std::optional<Tensor>& merged,
                           int64_t num_regions, TK_PASS_ARGUMENTS, int64_t check) {
    check_range("check", check, 2);
    const Check mode = static_cast<Check>(check);
    const RegionTensors volume(logits, target, voxel_weight, regions, merged, num_regions, TK_PASS_RECORD, mode);
    const Volume& v = volume.view.volume;
    const std::vector<int64_t> shape{v.samples, num_regions, v.classes, v.count_columns() + 1};
    Tensor counts = torch::stable::new_empty(logits, shape, ScalarType::Double);
    Backend::count(volume.view, mode, counts);
    return counts;
  }

  static Tensor gradient_pass(const Tensor& coefficients, const Tensor& logits, const Tensor& target,
                              const std::optional<Tensor>& voxel_weight, const std::optional<Tensor>& regions,
                              const std::optional<Tensor>& merged, TK_PASS_ARGUMENTS) {
    check_region_coefficients(coefficients, logits, cross_entropy);
    const RegionTensors volume(logits, target, voxel_weight, regions, merged, coefficients.size(1), TK_PASS_RECORD);
    Tensor gradient = Backend::new_gradient(volume.volume.logits);
    write_gradient(gradient, volume.view, coefficients);
    return gradient;
  }

  static void gradient_pass_(Tensor logits, const Tensor& coefficients, const Tensor& target,
                             const std::optional<Tensor>& voxel_weight, const std::optional<Tensor>& regions,
                             const std::optional<Tensor>& merged, TK_PASS_ARGUMENTS) {
    check_in_place(logits);
    check_region_coefficients(coefficients, logits, cross_entropy);
    const RegionTensors volume(logits, target, voxel_weight, regions, merged, coefficients.size(1), TK_PASS_RECORD);
    write_gradient(logits, volume.view, coefficients);
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("region_count_pass", TORCH_BOX(&RegionOperators::count_pass));
    m.impl("region_gradient_pass", TORCH_BOX(&RegionOperators::gradient_pass));
    m.impl("region_gradient_pass_", TORCH_BOX(&RegionOperators::gradient_pass_));
  }

 private:
  static void write_gradient(const Tensor& out, const RegionVolume& volume, const Tensor& coefficients) {
    if (volume.volume.samples * volume.volume.voxels == 0) return;
    Backend::gradient(volume, coefficients.is_contiguous() ? coefficients : torch::stable::contiguous(coefficients),
                      out);
  }
};

}  // namespace tversky_kernels
