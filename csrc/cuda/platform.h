// What the CUDA kernels need of CUDA, for nvcc and for the host build of the tests (tests/cuda_on_host), in which
// TK_CUDA_ON_HOST is defined, g++ compiles the same sources and fibers are the threads.
//
// Rules that make both possible: kernels are launched by TK_LAUNCH; shared memory is dynamic, from TK_SHARED; no CUB.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#if defined(TK_CUDA_ON_HOST)
#include "emulation.h"
#else
#include <cuda_runtime.h>

#define TK_UNPAREN(...) __VA_ARGS__
#define TK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  TK_UNPAREN kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
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

// Its error is 2 + |x| ulp, where e^x has shrunk what it is worth; tests bound what comes of it.
__device__ __forceinline__ float exponential(float x) {
  return __expf(x);
}
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}

// log(1 + x) with relative accuracy as x -> 0; accurate functions, once a voxel or where a class asks for it.
__device__ __forceinline__ float log_one_plus(float x) {
  return log1pf(x);
}
__device__ __forceinline__ double log_one_plus(double x) {
  return log1p(x);
}
__device__ __forceinline__ float logarithm(float x) {
  return logf(x);
}
__device__ __forceinline__ double logarithm(double x) {
  return log(x);
}

// x^gamma for x in [0, 1], gamma > 0.
template <typename A>
__device__ __forceinline__ A focal_power(A x, A gamma) {
  return x > A(0) ? exponential(logarithm(x) * gamma) : x * A(0);  // NaN stays NaN
}

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// The sum over a warp, in every lane, always in the same order.
template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

}  // namespace cuda
}  // namespace tversky_kernels
