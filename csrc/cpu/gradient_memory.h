// Memory for fresh gradients on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace tversky_kernels {
namespace cpu {

// Not written yet; of the logits' type, shape and, where no two of their elements share memory, layout.
torch::stable::Tensor new_gradient(const torch::stable::Tensor& logits);

// Whether large gradients' memory is kept for the next ones, and the bytes of it that gradients occupy and that wait.
// keep changes the first; false gives what waits back.
std::tuple<bool, int64_t, int64_t> gradient_memory(std::optional<bool> keep);

}  // namespace cpu
}  // namespace tversky_kernels
