// Tensors as the kernels see them: addresses and strides, whatever holds them.
#pragma once

#include <stdint.h>

#include "tversky_math.h"

namespace tversky_kernels {

enum class ElementType : int { kFloat, kDouble, kHalf, kBFloat16, kBool, kUint8, kInt8, kInt16, kInt32, kInt64 };

// (N, C, voxels) with any strides, in elements.
struct LogitsView {
  const void* data;
  ElementType type;
  int64_t sample_stride, class_stride, voxel_stride;
};

// (N, voxels) with any strides, in elements. data is null where the argument was not given.
struct VoxelView {
  const void* data;
  ElementType type;
  int64_t sample_stride, voxel_stride;
};

// A tensor of the logits' type and shape, with any strides, in elements.
struct GradientView {
  void* data;
  int64_t sample_stride, class_stride, voxel_stride;
};

struct Volume {
  LogitsView logits;
  VoxelView target;
  VoxelView weight;
  int64_t samples, classes, voxels;
  Activation activation;
  int64_t first_label;  // the label of channel 0: 0, or 1 where one sigmoid channel stands for the foreground
  bool has_ignore_index;
  int64_t ignore_index;
};

}  // namespace tversky_kernels
