// The parts of CUDA that the kernels use, for nvcc and for the host build of the tests (tests/cuda_on_host), in which
// TK_CUDA_ON_HOST is defined, g++ compiles the same sources and fibers are the threads.
//
// Rules that make both possible: kernels are launched by TK_LAUNCH; shared memory is dynamic, from TK_SHARED; no CUB.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(TK_CUDA_ON_HOST)
#include "emulation.h"
#else
#include <cuda_runtime.h>

#define TK_UNPAREN(...) __VA_ARGS__
#define TK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  TK_UNPAREN kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
// The same for a kernel that may begin while the kernel before it on the stream still runs. The first kernel calls
// let_next_launch_begin. The second calls wait_for_launch_before before it reads the first one's results. From compute
// capability 9.0 on.
#define TK_LAUNCH_EARLY(kernel, grid, block, shared_bytes, stream, ...) \
  tversky_kernels::cuda::launch_early(TK_UNPAREN kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define TK_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace tversky_kernels {
namespace cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename T>
struct Accumulation {
  using Type = float;
};
template <>
struct Accumulation<double> {
  using Type = double;
};
template <typename T>
using Compute = typename Accumulation<T>::Type;

// e^x for x <= 80, mostly <= 0. The error is 2 + |x| ulp: it is large where e^x is small and is added to 1. Tests bound
// the result. A value below the smallest normal number is 0. __expf would take four more instructions.
constexpr float kLog2E = 1.4426950408889634f;
__device__ __forceinline__ float power_of_two(float x) {
#if defined(TK_CUDA_ON_HOST)
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float exponential(float x) {
  return power_of_two(x * kLog2E);
}
__device__ __forceinline__ double exponential(double x) {
  return x < -708.3964185322641 ? 0.0 : exp(x);
}

// e^(x - top) by one instruction less, times a factor near 1. The factor is the same for all x of one top, so a softmax
// cancels it. scaled_top: of scale_top.
__device__ __forceinline__ float scale_top(float top) {
  return top * kLog2E;
}
__device__ __forceinline__ double scale_top(double top) {
  return top;
}
__device__ __forceinline__ float exponential_below(float x, float scaled_top) {
  return power_of_two(fmaf(x, kLog2E, -scaled_top));
}
__device__ __forceinline__ double exponential_below(double x, double scaled_top) {
  return exponential(x - scaled_top);
}

// One instruction; a comparison and a selection are two. Not NaN where only one is, but then the exponentials are NaN.
__device__ __forceinline__ float larger(float a, float b) {
  return fmaxf(a, b);
}
__device__ __forceinline__ double larger(double a, double b) {
  return fmax(a, b);
}

__device__ __forceinline__ float magnitude(float x) {
  return fabsf(x);
}
__device__ __forceinline__ double magnitude(double x) {
  return fabs(x);
}

// The smaller one; NaN where either is.
__device__ __forceinline__ float smaller(float a, float b) {
#if defined(TK_CUDA_ON_HOST)
  return a != a ? a : b < a ? b : a;
#else
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#endif
}
__device__ __forceinline__ double smaller(double a, double b) {
  return a != a ? a : b < a ? b : a;
}

// Two numbers of half precision at once, as they lie in memory.
__device__ __forceinline__ uint32_t larger_pair(Half, uint32_t a, uint32_t b) {
#if defined(TK_CUDA_ON_HOST)
  return emulation::larger_pair<Half>(a, b);
#else
  uint32_t largest;
  asm("max.f16x2 %0, %1, %2;" : "=r"(largest) : "r"(a), "r"(b));
  return largest;
#endif
}
__device__ __forceinline__ uint32_t larger_pair(BFloat16, uint32_t a, uint32_t b) {
#if defined(TK_CUDA_ON_HOST)
  return emulation::larger_pair<BFloat16>(a, b);
#else
  uint32_t largest;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(largest) : "r"(a), "r"(b));
  return largest;
#endif
}

// The first or second number of a pair.
__device__ __forceinline__ float half_of_pair(Half, uint32_t pair, bool second) {
  return static_cast<float>(Half(static_cast<unsigned short>(second ? pair >> 16 : pair & 0xffff), Half::from_bits()));
}
__device__ __forceinline__ float half_of_pair(BFloat16, uint32_t pair, bool second) {
  const uint32_t bits = second ? pair & 0xffff0000u : pair << 16;
#if defined(TK_CUDA_ON_HOST)
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#else
  return __uint_as_float(bits);
#endif
}
// The first halves, or the second halves, of two pairs as a pair.
__device__ __forceinline__ uint32_t halves_of_pairs(uint32_t a, uint32_t b, bool second) {
#if defined(TK_CUDA_ON_HOST)
  return second ? (b & 0xffff0000u) | a >> 16 : b << 16 | (a & 0xffffu);
#else
  return __byte_perm(a, b, second ? 0x7632 : 0x5410);
#endif
}

// 1 / x for the sum of a voxel's exponentials, at least 1: within 1 ulp.
__device__ __forceinline__ float reciprocal(float x) {
#if defined(TK_CUDA_ON_HOST)
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ double reciprocal(double x) {
  return 1.0 / x;
}

// 2 atanh(s) for s in [0, 1/3], with relative accuracy as s -> 0: by a polynomial of s^2 through Chebyshev's points of
// atanh(s) / s, which is off by 1.6e-8 at the most.
__device__ __forceinline__ float twice_atanh(float s) {
  const float z = s * s;
  float polynomial = fmaf(0.13433774f, z, 0.14116979f);
  polynomial = fmaf(polynomial, z, 0.20003836f);
  polynomial = fmaf(polynomial, z, 0.3333332f);
  return 2.0f * fmaf(s * z, polynomial, s);
}

// log(1 + x) for x in [0, 1], and -log(1 - x) for x in [0, 1/2].
__device__ __forceinline__ float log_one_plus_small(float x) {
  return twice_atanh(x * reciprocal(2.0f + x));
}
__device__ __forceinline__ double log_one_plus_small(double x) {
  return log1p(x);
}
__device__ __forceinline__ float minus_log_one_minus_small(float x) {
  return twice_atanh(x * reciprocal(2.0f - x));
}
__device__ __forceinline__ double minus_log_one_minus_small(double x) {
  return -log1p(-x);
}

// The same for any x >= 0; beyond 1 a logarithm is within 2.4e-7 of itself. Half the instructions of log1pf.
__device__ __forceinline__ float log_one_plus(float x) {
#if defined(TK_CUDA_ON_HOST)
  const float logarithm = std::log2(1.0f + x);
#else
  float logarithm;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(logarithm) : "f"(1.0f + x));
#endif
  return x <= 1.0f ? log_one_plus_small(x) : logarithm * 0.6931471805599453f;
}
__device__ __forceinline__ double log_one_plus(double x) {
  return log1p(x);
}

// Accurate: where a class asks for it.
__device__ __forceinline__ float logarithm(float x) {
  return logf(x);
}
__device__ __forceinline__ double logarithm(double x) {
  return log(x);
}

// x^gamma for x in [0, 1], gamma > 0.
struct FocalPower {
  template <typename A>
  __device__ __forceinline__ A operator()(A x, A gamma) const {
    return x > A(0) ? exponential(logarithm(x) * gamma) : x * A(0);  // NaN stays NaN
  }
};

// x, by a way that the compiler does not see through. So it computes values that follow from x again instead of keeping
// them: registers are few, and predicates fewer.
__device__ __forceinline__ int recomputed(int x) {
  asm("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int64_t recomputed(int64_t x) {
#if !defined(TK_CUDA_ON_HOST)
  asm("" : "+l"(x));
#endif
  return x;
}
__device__ __forceinline__ float recomputed(float x) {
#if !defined(TK_CUDA_ON_HOST)
  asm("" : "+f"(x));
#endif
  return x;
}

// The opposite: x stays in its register and is not computed again.
__device__ __forceinline__ int64_t kept(int64_t x) {
#if !defined(TK_CUDA_ON_HOST)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// Byte i of four, by one instruction.
__device__ __forceinline__ int byte_of(uint32_t bytes, int i) {
#if defined(TK_CUDA_ON_HOST)
  return static_cast<int>(bytes >> (8 * i) & 0xff);
#else
  return static_cast<int>(__byte_perm(bytes, 0, 0x4440 | i));
#endif
}

#if !defined(TK_CUDA_ON_HOST)
template <typename... Parameters>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                  Parameters... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);  // the caller asks for the last error, as after any launch
}
#endif
__device__ __forceinline__ void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Waits until all results of the launch before are there.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// A barrier of some of a block's warps, `threads` in all; number: 1 to 15, one for each group of warps.
__device__ __forceinline__ void synchronise_warps(int number, int threads) {
#if defined(TK_CUDA_ON_HOST)
  emulation::barrier(__LINE__, number, threads);
#else
  asm volatile("barrier.sync %0, %1;" : : "r"(number), "r"(threads) : "memory");
#endif
}

// Before a launch: a kernel gets more than 48 KiB of shared memory only if it was asked for.
template <typename Kernel>
void allow_shared_bytes([[maybe_unused]] Kernel kernel, int bytes) {
  if (bytes <= 48 * 1024) return;
#if defined(TK_CUDA_ON_HOST)
  emulation::allow_shared_bytes(bytes);
#else
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);  // as launch_early
#endif
}

// Begins to copy 4, 8 or 16 bytes from global to shared memory; both must be aligned to that size. The calling thread
// can read them after wait_for_copies. kShared: other threads copy the same bytes, so they should stay in the L1 cache.
// Smaller copies always do.
template <int kBytes, bool kShared>
__device__ __forceinline__ void begin_copy(void* shared, const void* global) {
#if defined(TK_CUDA_ON_HOST)
  emulation::begin_copy(shared, global, kBytes);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16 && !kShared) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" : : "r"(to), "l"(global), "n"(kBytes) : "memory");
  }
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#if defined(TK_CUDA_ON_HOST)
  emulation::wait_for_copies();
#else
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// x, by a way that no compiler sees through, not even ptxas: values that follow from x are not computed before a loop
// and kept. All lanes of the warp must call it.
__device__ __forceinline__ int opaque(int x) {
  return __shfl_sync(kFullWarp, x, static_cast<int>(threadIdx.x) % kWarp);
}

// The sum over a warp, in every lane, always in the same order.
template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

}  // namespace cuda
}  // namespace tversky_kernels
