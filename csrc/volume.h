// From torch's tensors to the views that the kernels take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "views.h"

namespace tversky_kernels {

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

}  // namespace tversky_kernels
