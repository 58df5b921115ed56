// Tensors as the kernels see them, and the walk over a volume by many threads with the same result for any number.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../checks.h"
#include "kernels.h"

namespace tversky_kernels {
namespace cpu {

// The stride from voxel to voxel in row-major order of the dimensions from `first` on; nullopt where there is no single
// one.
inline std::optional<int64_t> single_stride(const Tensor& x, int64_t first) {
  int64_t stride = 1, voxels = 1;
  for (int64_t d = x.dim() - 1; d >= first; --d) {
    if (x.size(d) == 1) continue;
    if (voxels == 1) {
      stride = x.stride(d);
    } else if (x.stride(d) != stride * voxels) {
      return std::nullopt;
    }
    voxels *= x.size(d);
  }
  return stride;
}

// The tensor itself where its voxels lie one stride apart, else a contiguous copy.
inline Tensor walkable(const Tensor& x, int64_t first) {
  return single_stride(x, first).has_value() ? x : torch::stable::contiguous(x);
}

inline ElementType element_type(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return ElementType::kFloat;
    case ScalarType::Double: return ElementType::kDouble;
    case ScalarType::Half: return ElementType::kHalf;
    case ScalarType::BFloat16: return ElementType::kBFloat16;
    case ScalarType::Bool: return ElementType::kBool;
    case ScalarType::Byte: return ElementType::kUint8;
    case ScalarType::Char: return ElementType::kInt8;
    case ScalarType::Short: return ElementType::kInt16;
    case ScalarType::Int: return ElementType::kInt32;
    default: return ElementType::kInt64;
  }
}

inline VoxelView voxel_view(const Tensor& x) {
  return {x.const_data_ptr(), element_type(x.scalar_type()), x.stride(0), *single_stride(x, 1)};
}

// Owns what the views of a Volume point to.
struct VolumeTensors {
  Tensor logits, target;
  std::optional<Tensor> weight;
  Volume view;

  VolumeTensors(const Tensor& logits_in, const Tensor& target_in, const std::optional<Tensor>& weight_in,
                int64_t activation, const std::optional<int64_t>& ignore_index)
      : logits(walkable(logits_in, 2)), target(walkable(target_in, 1)) {
    if (weight_in.has_value()) weight = walkable(*weight_in, 1);
    view.samples = logits.size(0);
    view.classes = logits.size(1);
    view.voxels = view.samples == 0 ? 0 : logits.numel() / (view.samples * view.classes);
    view.logits = {logits.const_data_ptr(), element_type(logits.scalar_type()), logits.stride(0), logits.stride(1),
                   *single_stride(logits, 2)};
    view.target = voxel_view(target);
    view.weight = weight.has_value() ? voxel_view(*weight) : VoxelView{nullptr, ElementType::kFloat, 0, 0};
    view.activation = static_cast<Activation>(activation);
    view.first_label = view.classes == 1 && view.activation != Activation::kSoftmax ? 1 : 0;
    view.has_ignore_index = ignore_index.has_value();
    view.ignore_index = ignore_index.value_or(0);
  }
};

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

}  // namespace cpu
}  // namespace tversky_kernels
