// Memory for fresh gradients on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace tversky_kernels {
namespace cpu {

// Not written yet. It has the logits' type, shape and layout; where two logits share memory, a layout of its own.
torch::stable::Tensor new_gradient(const torch::stable::Tensor& logits);

// Whether the memory of large gradients is kept for the next ones; the bytes that gradients occupy, and the bytes that
// wait. keep changes the first; false gives the waiting memory back.
std::tuple<bool, int64_t, int64_t> gradient_memory(std::optional<bool> keep);

}  // namespace cpu
}  // namespace tversky_kernels
