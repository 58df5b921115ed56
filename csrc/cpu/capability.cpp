#include "capability.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

namespace tversky_kernels {
namespace cpu {
namespace {

#define TK_KERNELS(CAPABILITY, COUNT, GRADIENT)                                                             \
  Kernels {                                                                                                 \
    #CAPABILITY, count_pass_##COUNT, gradient_pass_##GRADIENT, count_scratch_bytes_##COUNT,                 \
        gradient_scratch_bytes_##GRADIENT, region_count_pass_##COUNT, region_gradient_pass_##COUNT,         \
        region_count_scratch_bytes_##COUNT, region_gradient_scratch_bytes_##COUNT, hard_count_pass_##COUNT, \
        hard_count_scratch_bytes_##COUNT                                                                    \
  }

const Kernels kCompiled[] = {
    TK_KERNELS(baseline, baseline, baseline),
#if defined(TK_WITH_AVX)
    TK_KERNELS(avx2, avx2, avx2),
    TK_KERNELS(avx512, avx512, avx512),
    TK_KERNELS(avx512_bf16, avx512, avx512_bf16),
#endif
};

Capability supported_by_processor() {
#if defined(TK_WITH_AVX)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return bf16     ? Capability::kAvx512Bf16
         : avx512 ? Capability::kAvx512
         : avx2   ? Capability::kAvx2
                  : Capability::kBaseline;
#else
  return Capability::kBaseline;
#endif
}

std::atomic<Capability>& current() {
  static std::atomic<Capability> capability{widest_capability()};
  return capability;
}

}  // namespace

Capability widest_capability() {
  static const Capability widest = [] {
    const Capability here = supported_by_processor();
    const char* asked = std::getenv("TVERSKY_KERNELS_CPU_CAPABILITY");
    for (const Kernels& k : kCompiled) {
      if (asked != nullptr && std::string(asked) == k.name) {
        return std::min(here, static_cast<Capability>(&k - kCompiled));
      }
    }
    return here;
  }();
  return widest;
}

Capability current_capability() {
  return current().load(std::memory_order_relaxed);
}

void set_capability(Capability capability) {
  current().store(std::min(capability, widest_capability()));
}

const Kernels& kernels(ElementType logits) {
  Capability capability = current_capability();
  if (capability == Capability::kAvx512Bf16 && logits != ElementType::kBFloat16) capability = Capability::kAvx512;
  return kCompiled[static_cast<int>(capability)];
}

}  // namespace cpu
}  // namespace tversky_kernels
