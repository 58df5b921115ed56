// Which family takes a volume, and how many blocks its passes have.
#include "families.h"

#include <algorithm>
#include <cstdint>

namespace tversky_kernels {
namespace cuda {
namespace {

// The first one that takes a volume is used.
constexpr const Family* kFamilies[] = {&kFew, &kSplitLabels, &kSplitTargets, &kChannels, &kTiled};

bool aligned(const LogitsView& x, int64_t element_size, int64_t bytes) {
  return x.voxel_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0 &&
         x.sample_stride * element_size % bytes == 0 && x.class_stride * element_size % bytes == 0;
}

}  // namespace

int bytes_of(ElementType type) {
  switch (type) {
    case ElementType::kBool:
    case ElementType::kUint8:
    case ElementType::kInt8: return 1;
    case ElementType::kHalf:
    case ElementType::kBFloat16:
    case ElementType::kInt16: return 2;
    case ElementType::kFloat:
    case ElementType::kInt32: return 4;
    default: return 8;
  }
}

bool is_half(const Volume& v) {
  return v.logits.type == ElementType::kHalf || v.logits.type == ElementType::kBFloat16;
}

bool is_resampled(const Volume& v) {
  return v.target.resampling.active || v.weight.resampling.active;
}

bool can_be_read(const Volume& v, int64_t element_size, int voxels) {
  return v.voxels % voxels == 0 && aligned(v.logits, element_size, std::min<int64_t>(16, voxels * element_size)) &&
         !(is_resampled(v) && v.voxels >= int64_t{1} << 31);
}

bool lies_side_by_side(const Volume& v, const GradientView* out, int64_t element_size) {
  const LogitsView& x = v.logits;
  return x.class_stride == 1 && x.voxel_stride == v.classes && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         x.sample_stride * element_size % 16 == 0 &&
         (out == nullptr || (out->class_stride == 1 && out->voxel_stride == v.classes));
}

int gradient_blocks(const Volume& v) {
  return is_half(v) ? 6 : 24;
}

dim3 grid_of(const Volume& v, const Plan& plan) {
  return dim3(static_cast<unsigned>(v.samples * (plan.family->by_channel ? v.classes : 1) * plan.blocks.programs));
}

// All blocks of a pass, for each multiprocessor: whole rounds of the blocks that it holds at once. These are 4 for two
// classes without a cross-entropy, 2 or 3 for most cases. In the count pass each round costs some microseconds and one
// more sum a block. In the gradient pass more rounds end closer together. Where classes are split, a block with few
// pieces keeps its warps close, so that they read and write one place of memory at about the same time. All of it was
// measured on an H100.
Plan make_plan(const Volume& v, const GradientView* out, int multiprocessors) {
  Plan plan{};
  for (const Family* family : kFamilies) {
    plan = {};
    plan.family = family;
    if (family->plan(v, out, plan)) break;
  }
  const int64_t rows = std::max<int64_t>(1, plan.family->by_channel ? v.samples * v.classes : v.samples);
  const int64_t of_block = plan.lanes == 0 ? plan.voxels : int64_t{plan.voxels} * Plan::kThreads / plan.lanes;
  const int64_t pieces = (v.voxels + of_block - 1) / of_block;
  const int of_one = plan.family->blocks(v, plan, out != nullptr, rows * pieces / multiprocessors);
  const int64_t blocks = static_cast<int64_t>(multiprocessors) * of_one;
  int64_t programs = std::max<int64_t>(1, std::min(pieces, blocks / rows));
  if (out == nullptr) {
    // A thread's sums are float. Where all voxels are alike, each addition rounds the same way. So there are more
    // rounds of blocks, and no thread adds too many values.
    constexpr int64_t kMostTurns = 32;
    const int64_t turns = (pieces + programs - 1) / programs;
    const int64_t rounds = std::max<int64_t>(1, (turns + kMostTurns - 1) / kMostTurns);
    programs = std::max<int64_t>(1, std::min(pieces, programs * rounds));
  }
  // At least two blocks of a multiprocessor run at once.
  const int64_t groups = std::max<int64_t>(1, programs / (2 * static_cast<int64_t>(multiprocessors)));
  const int64_t group = programs / groups;
  plan.blocks = {static_cast<int>(groups * group), static_cast<int>(group), static_cast<int>(of_block),
                 static_cast<int>(pieces / groups), static_cast<int>(pieces % groups)};
  return plan;
}

void launch_count_pass(const Volume& v, const Plan& plan, void* partial, unsigned* finished, cudaStream_t stream) {
  plan.family->count({v, plan, partial, finished, stream});
}

void launch_gradient_pass(const Volume& v, const Plan& plan, const GradientArguments& a, cudaStream_t stream) {
  plan.family->gradient({v, plan, a, stream});
}

}  // namespace cuda
}  // namespace tversky_kernels
