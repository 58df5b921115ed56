// From torch's tensors to the views that the kernels take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "../common/views.h"
#include "checks.h"

namespace tversky_kernels {

// The stride from voxel to voxel in row-major order of the dimensions from `first` on; nullopt where there is no single
// one.
inline std::optional<int64_t> single_stride(const Tensor& x, int64_t first) {
  int64_t stride = 1, voxels = 1;
  if (x.numel() == 0) return stride;
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

// Whether the elements fill a block of memory, each with a place of its own.
inline bool is_dense(const Tensor& x) {
  if (x.numel() == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1) dimensions.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t elements = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != elements) return false;
    elements *= size;
  }
  return true;
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

// Whether the spatial dimensions of x, from `first` on, are the logits'.
inline bool same_sizes(const Tensor& x, int64_t first, const Tensor& logits) {
  for (int64_t d = first; d < x.dim(); ++d) {
    if (x.size(d) != logits.size(d - first + 2)) return false;
  }
  return true;
}

// A target or weight for logits (N, C, *spatial). first: its first spatial dimension.
inline VoxelView voxel_view(const Tensor& x, int64_t first, const Tensor& logits, bool nearest_exact) {
  VoxelView view{};
  view.data = x.const_data_ptr();
  view.type = element_type(x.scalar_type());
  view.sample_stride = x.stride(0);
  view.class_stride = first == 2 ? x.stride(1) : 0;
  Resampling& r = view.resampling;
  const int64_t spatial = x.dim() - first;
  r.active = !same_sizes(x, first, logits);
  if (!r.active) {
    view.voxel_stride = *single_stride(x, first);
    return view;
  }
  r.shift = nearest_exact ? 0.5f : 0.0f;
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t d = spatial - 3 + i;
    r.sizes[i] = d < 0 ? 1 : logits.size(2 + d);
    r.source_sizes[i] = d < 0 ? 1 : x.size(first + d);
    r.strides[i] = d < 0 ? 0 : x.stride(first + d);
    r.scales[i] = static_cast<float>(r.source_sizes[i]) / static_cast<float>(r.sizes[i]);
  }
  return view;
}

// As `walkable`, but a volume that is resampled is walked by all its strides.
inline Tensor readable(const Tensor& x, int64_t first, const Tensor& logits) {
  return same_sizes(x, first, logits) ? walkable(x, first) : x;
}

// Owns the tensors to which the views of a Volume point. The only place where the arguments of a pass are checked.
struct VolumeTensors {
  Tensor logits, target;
  std::optional<Tensor> weight;
  Volume view{};

  VolumeTensors(const Tensor& logits_in, const Tensor& target_in, const std::optional<Tensor>& weight_in,
                const PassOptions& a, Check check = Check::kIgnore)
      : logits(walkable(checked(logits_in, target_in, weight_in, a), 2)),
        target(readable(target_in, target_in.dim() == logits_in.dim() ? 2 : 1, logits_in)) {
    if (weight_in.has_value()) weight = readable(*weight_in, 1, logits);
    view.samples = logits.size(0);
    view.classes = logits.size(1);
    view.voxels = view.samples == 0 ? 0 : logits.numel() / (view.samples * view.classes);
    view.logits = {logits.const_data_ptr(), element_type(logits.scalar_type()), logits.stride(0), logits.stride(1),
                   *single_stride(logits, 2)};
    view.dense = target.dim() == logits.dim();
    view.checks_targets = view.dense && check != Check::kIgnore;
    view.target = voxel_view(target, view.dense ? 2 : 1, logits, a.nearest_exact);
    if (weight.has_value()) view.weight = voxel_view(*weight, 1, logits, a.nearest_exact);
    view.activation = static_cast<Activation>(a.activation);
    view.overlap = static_cast<OverlapForm>(a.overlap);
    // For class indices the first two forms are the same.
    if (view.overlap == OverlapForm::kAbsolute && !view.dense) view.overlap = OverlapForm::kProduct;
    view.first_label = view.classes == 1 && view.activation != Activation::kSoftmax ? 1 : 0;
    view.has_ignore_index = a.ignore_index.has_value();
    view.ignore_index = a.ignore_index.value_or(0);
    view.cross_entropy = static_cast<CrossEntropy>(a.cross_entropy);
    view.focal_gamma = a.focal_gamma;
  }

 private:
  static const Tensor& checked(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                               const PassOptions& a) {
    check_inputs(logits, target, weight, a);
    return logits;
  }
};

// The same with regions (none: all voxels are in region 0) and classes that are merged with class 0.
struct RegionTensors {
  VolumeTensors volume;
  std::optional<Tensor> regions, merged;
  RegionVolume view{};

  RegionTensors(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& regions_in, const std::optional<Tensor>& merged_in, int64_t count,
                const PassOptions& a, Check check = Check::kIgnore)
      : volume(logits, target, weight, a, check), merged(merged_in) {
    STD_TORCH_CHECK(count >= 1 && count <= INT32_MAX, "num_regions: expected 1 to 2^31 - 1, got ", count);
    view.volume = volume.view;
    view.count = count;
    if (regions_in.has_value()) {
      check_regions(*regions_in, logits);
      regions = readable(*regions_in, 2, logits);
      view.regions = voxel_view(*regions, 2, volume.logits, a.nearest_exact);
      view.by_class = regions->size(1) != 1;
    }
    if (merged.has_value()) {
      check_merged(*merged, logits, a.activation);
      view.merged = static_cast<const uint8_t*>(merged->const_data_ptr());
    }
  }
};

}  // namespace tversky_kernels
