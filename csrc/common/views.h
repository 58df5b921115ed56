// Tensors as the kernels see them: addresses and strides, whatever holds them.
#pragma once

#include <stdint.h>

#include "mathematics.h"

namespace tversky_kernels {

enum class ElementType : int { kFloat, kDouble, kHalf, kBFloat16, kBool, kUint8, kInt8, kInt16, kInt32, kInt64 };

// (N, C, voxels) with any strides, in elements.
struct LogitsView {
  const void* data;
  ElementType type;
  int64_t sample_stride, class_stride, voxel_stride;
};

// Which voxel of a finer (or coarser) volume each voxel reads: the one that torch's interpolate takes, with
// mode="nearest" (the corner of the voxel) or "nearest-exact" (its centre). Three dimensions, the last one innermost;
// missing dimensions have size 1.
struct Resampling {
  bool active;
  int64_t sizes[3];         // of this volume
  int64_t source_sizes[3];  // of the volume that is read
  int64_t strides[3];       // of the volume that is read, in elements
  float scales[3];          // source size / size
  float shift;              // of the place in a voxel: 0 is its corner, 0.5 its centre

  // Rounded as torch rounds: once after the product and the first shift.
  static TK_MATH float place(float x, float scale, float shift) {
#if defined(__CUDACC__)
    return fmaf(x, scale, -shift) + shift;
#else
    return static_cast<float>(static_cast<double>(x) * scale - shift) + shift;
#endif
  }
  template <typename Index>
  TK_MATH int64_t source(int dimension, Index i) const {
    const Index at = static_cast<Index>(place(static_cast<float>(i) + shift, scales[dimension], shift));
    const Index last = static_cast<Index>(source_sizes[dimension] - 1);
    return (at < last ? at : last) * strides[dimension];
  }
  // The offset of the voxel to read for this volume's voxel, from the start of the sample.
  TK_MATH int64_t offset(int64_t voxel) const {
    const int64_t row = voxel / sizes[2];
    return source(0, row / sizes[1]) + source(1, row % sizes[1]) + source(2, voxel % sizes[2]);
  }
};

// (N, voxels), or for a dense target (N, C, voxels), with any strides, in elements. data is null where the argument was
// not given. A resampled volume does not use voxel_stride.
struct VoxelView {
  const void* data;
  ElementType type;
  int64_t sample_stride, class_stride, voxel_stride;
  Resampling resampling;

  // The offset of a voxel from the start of its sample.
  TK_MATH int64_t offset(int64_t voxel) const {
    return resampling.active ? resampling.offset(voxel) : voxel * voxel_stride;
  }
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
  bool dense;           // the target has a value for every class, g[n, c, voxel]
  bool checks_targets;  // the count pass finds values outside [0, 1]
  OverlapForm overlap;
  int64_t first_label;  // the label of channel 0: 0, or 1 where one sigmoid channel stands for the foreground
  bool has_ignore_index;
  int64_t ignore_index;
  CrossEntropy cross_entropy;
  double focal_gamma;

  // Counts and coefficients of a class.
  TK_MATH int count_columns() const { return cross_entropy == CrossEntropy::kNone ? kOverlapCounts : kAllCounts; }
  TK_MATH int coefficient_columns() const {
    return cross_entropy == CrossEntropy::kNone ? kOverlapCoefficients : kAllCoefficients;
  }
  // Whether column kVoxels of a class is the weight of the voxels with its label. Otherwise it is the weight of all
  // voxels.
  TK_MATH bool sums_label_weights() const {
    return overlap == OverlapForm::kSquared && !dense && activation == Activation::kSoftmax;
  }
  // Whether a softmax's label is the target, its cross-entropy is smoothed, and there is no power and no square. The
  // volume is_general then, but for most types and layouts CUDA's kernels for one label a voxel compute it.
  TK_MATH bool smooths_labels() const {
    return cross_entropy == CrossEntropy::kSmoothed && activation == Activation::kSoftmax && !dense &&
           overlap != OverlapForm::kSquared && focal_gamma == 0;
  }
  // Whether every class of a voxel needs its own g and its own term. CUDA's kernels for one label a voxel do not make
  // them; the CPU's make some: see takes_general_kernels.
  TK_MATH bool is_general() const {
    return dense || (overlap == OverlapForm::kSquared && activation != Activation::kSoftmax) ||
           (cross_entropy != CrossEntropy::kNone &&
            (activation != Activation::kSoftmax || cross_entropy == CrossEntropy::kSmoothed));
  }
};

// A volume whose voxels are counted in rows, one for each region.
struct RegionVolume {
  Volume volume;
  VoxelView regions;  // ids, (N, 1 or C, voxels): in [0, count); negative: the voxel is in none; null: all are 0
  int64_t count;
  bool by_class;          // each class has a partition of its own
  const uint8_t* merged;  // [N][C], 1 for classes whose probability belongs to class 0; null: no class
};

}  // namespace tversky_kernels
