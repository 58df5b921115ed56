// The families. Each is a way of holding a voxel's classes while its softmax is computed. A family's file has the cases
// that it takes, its plan and both passes. families.cu chooses the family.
#pragma once

#include "launch.h"
#include "platform.h"

namespace tversky_kernels {
namespace cuda {

// Blocks of a pass.
dim3 grid_of(const Volume& volume, const Plan& plan);

struct CountLaunch {
  const Volume& v;
  const Plan& plan;
  void* partial;
  unsigned* finished;
  cudaStream_t stream;

  template <typename T, typename Kernel, typename... More>
  void run(Kernel kernel, More... more) const {
    allow_shared_bytes(kernel, plan.shared_bytes);
    TK_LAUNCH((kernel), grid_of(v, plan), dim3(Plan::kThreads), plan.shared_bytes, stream, v,
              static_cast<Compute<T>*>(partial), finished, plan.blocks, more...);
  }
};

struct GradientLaunch {
  const Volume& v;
  const Plan& plan;
  const GradientArguments& a;
  cudaStream_t stream;

  template <typename Kernel, typename... More>
  void run(Kernel kernel, More... more) const {
    allow_shared_bytes(kernel, plan.shared_bytes);
    TK_LAUNCH((kernel), grid_of(v, plan), dim3(Plan::kThreads), plan.shared_bytes, stream, v, a, plan.blocks, more...);
  }
};

struct Family {
  const char* name;
  bool by_channel;  // a block takes one channel: the blocks are a sample's and class's
  // Fills in the plan, except for its blocks. Returns false where the family does not take this volume; the plan may be
  // incomplete then. out: the gradient, in the gradient pass; null in the count pass.
  bool (*plan)(const Volume&, const GradientView* out, Plan&);
  // Blocks of a pass for each multiprocessor. pieces: of each multiprocessor.
  int (*blocks)(const Volume&, const Plan&, bool gradient, int64_t pieces);
  void (*count)(const CountLaunch&);
  void (*gradient)(const GradientLaunch&);
};

//                             holds                                          takes
extern const Family kFew;          // all classes of some voxels in one thread    softmax of 2 to 4 classes, labels
extern const Family kSplitLabels;  // the classes of a voxel over lanes           softmax, labels, up to 144 classes
extern const Family
    kSplitTargets;              // the same with a target for every class      softmax, any target, up to 160 classes
extern const Family kChannels;  // every channel by itself                     sigmoid, none
extern const Family kTiled;     // a block's voxels in shared memory           all
// With regions: regions.cu, which is the only one and has a plan of its own.

// ---- Shared by the families' plans

int bytes_of(ElementType type);
bool is_half(const Volume& volume);
bool is_resampled(const Volume& volume);
// Whether threads can read the volume by whole loads of so many voxels. (A resampled target or weight bounds the number
// of voxels.) A fresh gradient has the logits' strides or contiguous ones, which are as good.
bool can_be_read(const Volume& volume, int64_t element_size, int voxels);
// Whether the classes of a voxel lie side by side, for whole loads, in the logits and in the gradient.
bool lies_side_by_side(const Volume& volume, const GradientView* out, int64_t element_size);
// Whether the label decides: a softmax of one label a voxel, of the logits' size, without powers. T: the logits' type.
template <typename T>
bool takes_labels(const Volume& v) {
  const bool smooths = v.smooths_labels() && sizeof(T) < 8;
  return v.activation == Activation::kSoftmax && v.classes >= 2 && (!v.is_general() || smooths) && !is_resampled(v);
}
// Blocks of a gradient pass. They share nothing: the more there are, the closer together they end.
int gradient_blocks(const Volume& volume);

}  // namespace cuda
}  // namespace tversky_kernels
