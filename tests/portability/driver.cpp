// Runs the CPU kernels without torch, so that they can be built for another processor, by another compiler, or with
// sanitizers. Reads one problem from standard input, writes counts (float64) and gradient (the logits' type).
// The buffers are exactly as large as the tensors, so that AddressSanitizer sees a read or write beyond them.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace tversky_kernels;
using namespace tversky_kernels::cpu;

namespace {

struct Header {
  int64_t samples, classes, voxels, logits_type, target_type, activation, has_ignore_index, ignore_index, class_stride,
      voxel_stride, begin, end, dense, overlap, cross_entropy, focal_gamma, target_side, side, logits_bytes,
      target_bytes, weight_bytes, coefficient_bytes;
};

std::unique_ptr<char[]> read_bytes(int64_t bytes) {
  std::unique_ptr<char[]> data(new char[bytes > 0 ? bytes : 1]);
  if (bytes > 0 && std::fread(data.get(), 1, bytes, stdin) != static_cast<size_t>(bytes)) std::abort();
  return data;
}

}  // namespace

int main() {
  Header h;
  if (std::fread(&h, sizeof h, 1, stdin) != 1) return 2;
  const auto logits = read_bytes(h.logits_bytes), target = read_bytes(h.target_bytes),
             weight = read_bytes(h.weight_bytes), coefficients = read_bytes(h.coefficient_bytes);
  Volume v{};
  const int64_t sample_stride = h.classes * h.voxels;
  v.logits = {logits.get(), static_cast<ElementType>(h.logits_type), sample_stride, h.class_stride, h.voxel_stride};
  // Squares of h.side, and of h.target_side where the target has another resolution.
  const int64_t target_voxels = h.target_side > 0 ? h.target_side * h.target_side : h.voxels;
  Resampling resampling{};
  if (h.target_side > 0) {
    const float scale = static_cast<float>(h.target_side) / static_cast<float>(h.side);
    resampling = {
        true, {1, h.side, h.side}, {1, h.target_side, h.target_side}, {0, h.target_side, 1}, {1, scale, scale}};
  }
  v.target = {target.get(),
              static_cast<ElementType>(h.target_type),
              (h.dense ? h.classes : 1) * target_voxels,
              target_voxels,
              1,
              resampling};
  v.weight = {h.weight_bytes > 0 ? weight.get() : nullptr, ElementType::kFloat, target_voxels, 0, 1, resampling};
  v.samples = h.samples;
  v.classes = h.classes;
  v.voxels = h.voxels;
  v.activation = static_cast<Activation>(h.activation);
  v.first_label = h.classes == 1 ? 1 : 0;
  v.has_ignore_index = h.has_ignore_index != 0;
  v.ignore_index = h.ignore_index;
  v.dense = h.dense != 0;
  v.overlap = static_cast<OverlapForm>(h.overlap);
  v.cross_entropy = static_cast<CrossEntropy>(h.cross_entropy);
  v.focal_gamma = static_cast<double>(h.focal_gamma);

  const int64_t row = h.classes * v.count_columns();
  std::vector<double> counts(h.samples * row, 0.0);
  std::vector<char> gradient(h.logits_bytes, 0x7f);
  const GradientView out{gradient.data(), sample_stride, h.class_stride, h.voxel_stride};
  const auto scratch = [&](int64_t bytes) {  // NaN, and to the byte
    void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    std::memset(p, 0xff, bytes);
    return std::unique_ptr<void, void (*)(void*)>(p, std::free);
  };
  BadInput bad;
  for (int64_t n = 0; n < h.samples; ++n) {
    const auto for_counts = scratch(TK_JOIN(count_scratch_bytes, TK_CAPABILITY)(v));
    TK_JOIN(count_pass, TK_CAPABILITY)(v, n, h.begin, h.end, &counts[n * row], for_counts.get(), &bad);
    const auto for_gradient = scratch(TK_JOIN(gradient_scratch_bytes, TK_CAPABILITY)(v));
    TK_JOIN(gradient_pass, TK_CAPABILITY)(v, n, h.begin, h.end, coefficients.get(), out, for_gradient.get());
  }
  std::fwrite(counts.data(), sizeof(double), counts.size(), stdout);
  std::fwrite(gradient.data(), 1, gradient.size(), stdout);
  return bad.label || bad.weight ? 3 : 0;
}
