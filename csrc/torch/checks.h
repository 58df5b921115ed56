// Checks of the operators' arguments. Python has checked the user's arguments and has its own messages. These checks
// guard the memory of the kernels against direct calls of torch.ops.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace tversky_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_logits(const Tensor& logits) {
  const ScalarType t = logits.scalar_type();
  STD_TORCH_CHECK(
      t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16,
      "logits: expected float16, bfloat16, float32 or float64, got ", torch::headeronly::toString(t));
  STD_TORCH_CHECK(logits.dim() >= 2, "logits: expected (N, C, *spatial), got ", logits.dim(), " dimension(s)");
  STD_TORCH_CHECK(logits.size(1) >= 1, "logits: expected at least one class, got none");
  STD_TORCH_CHECK(logits.size(1) <= INT32_MAX, "logits: expected fewer classes than 2^31, got ", logits.size(1));
}

inline void check_device(const char* name, const Tensor& x, const Tensor& logits) {
  if (x.is_cpu() && logits.is_cpu()) return;  // the CPU has one; a device takes longer to compare
  STD_TORCH_CHECK(x.device() == logits.device(), name, ": expected it on the logits' device");
}

inline void check_range(const char* name, int64_t value, int64_t most) {
  STD_TORCH_CHECK(value >= 0 && value <= most, name, ": expected 0 to ", most, ", got ", value);
}

// (N, *spatial) or, with classes, (N, C, *spatial), for logits (N, C, *spatial). With 1 to 3 dimensions the spatial
// sizes may differ; the nearest voxels are read then. one_for_all: one channel serves all classes.
inline void check_volume(const char* name, const Tensor& x, const Tensor& logits, bool with_classes,
                         bool one_for_all = false) {
  const int64_t first = with_classes ? 2 : 1, spatial = logits.dim() - 2;
  STD_TORCH_CHECK(x.dim() == first + spatial, name, ": expected ", first + spatial, " dimensions, got ", x.dim());
  for (int64_t d = 0; d < (one_for_all ? 1 : first); ++d) {
    STD_TORCH_CHECK(x.size(d) == logits.size(d), name, ": expected size ", logits.size(d), " in dimension ", d,
                    ", got ", x.size(d));
  }
  for (int64_t d = 0; d < spatial; ++d) {
    const int64_t size = x.size(first + d), expected = logits.size(2 + d);
    STD_TORCH_CHECK(size == expected || (spatial <= 3 && size > 0), name, ": expected size ", expected,
                    " in dimension ", first + d, ", got ", size);
  }
  check_device(name, x, logits);
}

inline bool is_integral(ScalarType t) {
  return t == ScalarType::Bool || t == ScalarType::Byte || t == ScalarType::Char || t == ScalarType::Short ||
         t == ScalarType::Int || t == ScalarType::Long;
}
inline bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16;
}

inline void check_target(const Tensor& target, const Tensor& logits) {
  const ScalarType t = target.scalar_type();
  const bool dense = target.dim() == logits.dim();
  STD_TORCH_CHECK(is_integral(t) || (dense && is_floating(t)),
                  "target: expected class indices of bool, uint8, int8, int16, int32 or int64, or a dense target of "
                  "these or a floating type, got ",
                  torch::headeronly::toString(t));
  check_volume("target", target, logits, dense);
}

inline void check_voxel_weight(const std::optional<Tensor>& weight, const Tensor& logits) {
  if (!weight.has_value()) return;
  const ScalarType t = weight->scalar_type();
  STD_TORCH_CHECK(t == ScalarType::Bool || t == ScalarType::Byte || is_floating(t),
                  "voxel_weight: expected bool, uint8 or floating, got ", torch::headeronly::toString(t));
  check_volume("voxel_weight", *weight, logits, false);
}

// (N, 1 or C, *spatial).
inline void check_regions(const Tensor& regions, const Tensor& logits) {
  const ScalarType t = regions.scalar_type();
  STD_TORCH_CHECK(is_integral(t) && t != ScalarType::Bool, "regions: expected uint8, int8, int16, int32 or int64, got ",
                  torch::headeronly::toString(t));
  check_volume("regions", regions, logits, true, regions.dim() > 1 && regions.size(1) == 1);
}

// (N, C), on the logits' device.
inline void check_merged(const Tensor& merged, const Tensor& logits, int64_t activation) {
  STD_TORCH_CHECK(merged.scalar_type() == ScalarType::Bool && merged.dim() == 2 && merged.size(0) == logits.size(0) &&
                      merged.size(1) == logits.size(1) && merged.is_contiguous(),
                  "merged: expected (N, C), contiguous, of bool");
  STD_TORCH_CHECK(activation == 0, "merged: expected None without a softmax");
  check_device("merged", merged, logits);
}

// (N, R, C, 2 or 4).
inline void check_region_coefficients(const Tensor& coefficients, const Tensor& logits, int64_t cross_entropy) {
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Double && coefficients.dim() == 4 &&
                      coefficients.size(0) == logits.size(0) && coefficients.size(1) >= 1 &&
                      coefficients.size(2) == logits.size(1) && coefficients.size(3) == (cross_entropy == 0 ? 2 : 4),
                  "coefficients: expected (N, R, C, 2, or 4 with a cross-entropy) of float64");
  check_device("coefficients", coefficients, logits);
}

// How a pass reads the volumes: the operators' arguments as they come.
struct PassOptions {
  int64_t activation;
  std::optional<int64_t> ignore_index;
  int64_t overlap;
  int64_t cross_entropy;
  double focal_gamma;
  bool nearest_exact;
};

// The arguments that both passes read.
inline void check_inputs(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& voxel_weight,
                         const PassOptions& a) {
  check_logits(logits);
  check_target(target, logits);
  check_voxel_weight(voxel_weight, logits);
  check_range("activation", a.activation, 2);
  check_range("overlap", a.overlap, 2);
  STD_TORCH_CHECK(a.cross_entropy >= 0 && a.cross_entropy <= (a.activation == 2 ? 0 : 2),
                  "cross_entropy: expected 0, 1 or 2 (0 without an activation), got ", a.cross_entropy);
  STD_TORCH_CHECK(a.focal_gamma >= 0, "focal_gamma: expected a number >= 0, got ", a.focal_gamma);
}

// The (N, C, 3) counts table: tp, fp, fn; with a cross-entropy (N, C, 6).
inline void check_counts(const Tensor& counts) {
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Double && counts.dim() == 3 && counts.size(1) >= 1 &&
                      counts.size(0) <= INT32_MAX && counts.size(1) <= INT32_MAX &&
                      (counts.size(2) == 3 || counts.size(2) == 6),
                  "counts: expected (N, C, 3 or 6) of float64");
}

// (rows, C, 2), or 4 with a cross-entropy, for rows = N, or 1 where the batch was summed.
inline void check_coefficients(const Tensor& coefficients, const Tensor& logits, int64_t cross_entropy) {
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Double && coefficients.dim() == 3 &&
                      (coefficients.size(0) == logits.size(0) || coefficients.size(0) == 1) &&
                      coefficients.size(1) == logits.size(1) && coefficients.size(2) == (cross_entropy == 0 ? 2 : 4),
                  "coefficients: expected (N or 1, C, 2, or 4 with a cross-entropy) of float64");
  check_device("coefficients", coefficients, logits);
}

// The gradient of a loss that is a scalar or has the last C' of the C classes in its last dimension.
inline void check_grad_loss(const Tensor& grad_loss, const Tensor& coefficients) {
  const ScalarType t = grad_loss.scalar_type();
  STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::Double, "grad_loss: expected float32 or float64, got ",
                  torch::headeronly::toString(t));
  check_device("grad_loss", grad_loss, coefficients);
  if (grad_loss.dim() == 0) return;
  const int64_t classes = grad_loss.size(grad_loss.dim() - 1);
  const int64_t rows = grad_loss.dim() == 1 ? 1 : grad_loss.size(0);
  STD_TORCH_CHECK(grad_loss.dim() <= 2 && rows == coefficients.size(0) && classes <= coefficients.size(1) &&
                      classes + 1 >= coefficients.size(1),
                  "grad_loss: its shape does not fit the coefficients");
}

}  // namespace tversky_kernels
