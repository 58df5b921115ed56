// Shared by the gradient passes: the coefficients of every class, times the upstream gradient.
#pragma once

#include "launch.h"
#include "own_targets.cuh"

namespace tversky_kernels {
namespace cuda {

__device__ __forceinline__ double upstream_gradient(const GradientArguments& a, int64_t at) {
  return a.grad_is_double ? static_cast<const double*>(a.grad_loss)[at] : static_cast<const float*>(a.grad_loss)[at];
}

// The coefficients of a class, times the upstream gradient, in double.
template <typename A, bool kCrossEntropy>
__device__ Coefficients<A> coefficients_of(const Volume& v, const GradientArguments& a, int64_t sample, int64_t c) {
  const int64_t classes = v.classes, row = sample * a.row_stride, dropped = classes - a.grad_classes;
  const double* u = a.coefficients + (row * classes + c) * (kCrossEntropy ? kAllCoefficients : kOverlapCoefficients);
  Coefficients<A> result{A(0), A(0), A(0), A(0)};
  if (a.grad_classes == 0 || c >= dropped) {
    const double upstream = upstream_gradient(a, a.grad_classes > 0 ? row * a.grad_classes + c - dropped : 0);
    result.background = static_cast<A>(u[kBackground] * upstream);
    result.foreground = static_cast<A>(foreground_coefficient(u, v.overlap) * upstream);
  }
  if (kCrossEntropy) {  // every value of the row contains the cross-entropy
    double of_row = a.grad_classes == 0 ? upstream_gradient(a, 0) : 0.0;
    for (int64_t i = 0; i < a.grad_classes; ++i) of_row += upstream_gradient(a, row * a.grad_classes + i);
    result.ce = static_cast<A>(u[kCeCoefficient] * of_row);
    result.smoothing = static_cast<A>(u[kSmoothingCoefficient] * of_row);
  }
  return result;
}

// The coefficients of all classes in shared memory, memory[C + 1], once for each block. The first is 0, for the label
// kUncounted. Returns the place of class 0. All threads must call it, and synchronise before they read.
template <bool kCrossEntropy, typename A>
[[nodiscard]] __device__ __forceinline__ const Coefficients<A>* fill_coefficients(const Volume& v,
                                                                                  const GradientArguments& a,
                                                                                  int64_t sample,
                                                                                  Coefficients<A>* memory) {
  if (threadIdx.x == 0) memory[0] = {A(0), A(0), A(0), A(0)};
#pragma unroll 1
  for (int c = threadIdx.x; c < v.classes; c += Plan::kThreads) {
    memory[c + 1] = coefficients_of<A, kCrossEntropy>(v, a, sample, c);
  }
  return memory + 1;
}

// The sum of all classes' dL/dsmoothing, from the coefficients of fill_coefficients.
template <typename A>
__device__ __forceinline__ A sum_of_smoothing(const Coefficients<A>* of_class, int classes) {
  A sum = A(0);
#pragma unroll 4
  for (int c = 0; c < classes; ++c) sum += of_class[c].smoothing;
  return sum;
}

}  // namespace cuda
}  // namespace tversky_kernels
