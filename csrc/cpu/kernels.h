// The interface between the operators (compiled once) and the kernels (compiled once per instruction set).
#pragma once

#include <stdint.h>

#include "../common/views.h"

namespace tversky_kernels {
namespace cpu {

// Bad values that a pass has found while it read the data.
struct BadInput {
  bool label = false;   // a label that is neither a class nor ignore_index
  int64_t value = 0;    // its value
  bool weight = false;  // a voxel weight that is negative or NaN
  double weight_value = 0;
  bool target = false;  // a value of a dense target outside [0, 1]
  double target_value = 0;
  bool region = false;  // a region that is not below the number of regions
  int64_t region_value = 0;
};

// Adds the counts of voxels [begin, end) of one sample to counts[C][3 or 6], see enum Count.
using CountPass = void (*)(const Volume&, int64_t sample, int64_t begin, int64_t end, double* counts, void* scratch,
                           BadInput*);

// Writes the gradient of voxels [begin, end) of one sample. coefficients[C][2 or 4], see enum Coefficient, in the type
// of the computation (double for double logits, else float).
using GradientPass = void (*)(const Volume&, int64_t sample, int64_t begin, int64_t end, const void* coefficients,
                              const GradientView&, void* scratch);

// Bytes of scratch that one call of either pass needs.
using ScratchBytes = int64_t (*)(const Volume&);

// Where the counts of a chunk go: row(context, region) is the region's [C][4 or 7], the last column the number of
// voxels.
struct RegionRows {
  double* (*row)(void* context, int64_t region);
  void* context;
};

// The same passes where voxels are counted by region; coefficients[R][C][2 or 4].
using RegionCountPass = void (*)(const RegionVolume&, int64_t sample, int64_t begin, int64_t end, const RegionRows&,
                                 void* scratch, BadInput*);
using RegionGradientPass = void (*)(const RegionVolume&, int64_t sample, int64_t begin, int64_t end,
                                    const void* coefficients, const GradientView&, void* scratch);
using RegionScratchBytes = int64_t (*)(const RegionVolume&);

// Adds to counts[3][C], of voxels [begin, end) of one sample: those of class c predicted as c, those predicted as c,
// and those of class c. Softmax, class indices.
using HardCountPass = void (*)(const Volume&, int64_t sample, int64_t begin, int64_t end, double* counts, void* scratch,
                               BadInput*);

struct Kernels {
  const char* name;
  CountPass count_pass;
  GradientPass gradient_pass;
  ScratchBytes count_scratch_bytes, gradient_scratch_bytes;
  RegionCountPass region_count_pass;
  RegionGradientPass region_gradient_pass;
  RegionScratchBytes region_count_scratch_bytes, region_gradient_scratch_bytes;
  HardCountPass hard_count_pass;
  ScratchBytes hard_count_scratch_bytes;
};

// The name of an entry point in the file that is compiled for TK_CAPABILITY.
#define TK_JOIN_(a, b) a##_##b
#define TK_JOIN(a, b) TK_JOIN_(a, b)

#define TK_DECLARE_KERNELS(CAPABILITY)                                                                                \
  void count_pass_##CAPABILITY(const Volume&, int64_t, int64_t, int64_t, double*, void*, BadInput*);                  \
  void gradient_pass_##CAPABILITY(const Volume&, int64_t, int64_t, int64_t, const void*, const GradientView&, void*); \
  int64_t count_scratch_bytes_##CAPABILITY(const Volume&);                                                            \
  int64_t gradient_scratch_bytes_##CAPABILITY(const Volume&);                                                         \
  void region_count_pass_##CAPABILITY(const RegionVolume&, int64_t, int64_t, int64_t, const RegionRows&, void*,       \
                                      BadInput*);                                                                     \
  void region_gradient_pass_##CAPABILITY(const RegionVolume&, int64_t, int64_t, int64_t, const void*,                 \
                                         const GradientView&, void*);                                                 \
  int64_t region_count_scratch_bytes_##CAPABILITY(const RegionVolume&);                                               \
  int64_t region_gradient_scratch_bytes_##CAPABILITY(const RegionVolume&);                                            \
  void hard_count_pass_##CAPABILITY(const Volume&, int64_t, int64_t, int64_t, double*, void*, BadInput*);             \
  int64_t hard_count_scratch_bytes_##CAPABILITY(const Volume&);

TK_DECLARE_KERNELS(baseline)
TK_DECLARE_KERNELS(avx2)
TK_DECLARE_KERNELS(avx512)
TK_DECLARE_KERNELS(avx512_bf16)

}  // namespace cpu
}  // namespace tversky_kernels
