// Which of the compiled instruction sets this processor runs.
#pragma once

#include "kernels.h"

namespace tversky_kernels {
namespace cpu {

// The last one rounds a bfloat16 gradient in another way than the one before. It has no other kernels of its own.
enum class Capability : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kLast = kAvx512Bf16 };

// The widest that this build, this processor and TVERSKY_KERNELS_CPU_CAPABILITY allow.
Capability widest_capability();

// The one in use. It starts as the widest.
Capability current_capability();
void set_capability(Capability);  // at most the widest

const Kernels& kernels(ElementType logits);  // of the current capability, for logits of this type

}  // namespace cpu
}  // namespace tversky_kernels
