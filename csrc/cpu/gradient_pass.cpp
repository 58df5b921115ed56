// The gradient pass on the CPU: logits, target and coefficients in, dL/dlogits out. Compiled once per instruction set.
#include "channels.h"
#include "labels.h"
#include "own_targets.h"

namespace {

// Which family takes a tile.
template <typename T>
void gradient_tile(const Volume& v, const Tile<T>& tile, const Compute<T>* u, PresentClasses& present,
                   Vector<Compute<T>>* scratch, const GradientRows<T>& out) {
  const int padded = tile.padded_voxels();
  const int classes = static_cast<int>(v.classes), first_label = static_cast<int>(v.first_label);
  if (takes_general_kernels(v)) return general_gradient(v, tile, u, scratch, out);
  switch (v.activation) {
    case Activation::kSoftmax:
      return with_softmax_options(v, tile, [&](auto labels, auto cross_entropy, auto squared) {
        softmax_gradient_tile<T, decltype(labels)::value, decltype(cross_entropy)::value, decltype(squared)::value>(
            tile, classes, u, present, scratch, out);
      });
    case Activation::kSigmoid:
      return channels_gradient<T, Activation::kSigmoid>(tile, padded, classes, first_label, u, present, out);
    case Activation::kNone:
      return channels_gradient<T, Activation::kNone>(tile, padded, classes, first_label, u, present, out);
  }
}

// Vectors that are kept for a class: the logits of two blocks, or four things in the general kernels.
constexpr int kScratchVectors = larger(2 * kBlockVectors, 4 * kGeneralVectors);

// Scratch: the tile's buffers, kScratchVectors a class, gradient rows[C][row voxels], present classes.
template <typename T>
int64_t scratch_bytes(const Volume& v) {
  return TileBuffers<T>::bytes(v) + v.classes * kScratchVectors * kVectorBytes +
         v.classes * TileBuffers<T>::voxels_per_row(v) * static_cast<int64_t>(sizeof(T)) +
         PresentClasses::bytes(v.classes);
}

template <typename T>
void gradient(const Volume& v, int64_t sample, int64_t begin, int64_t end, const void* coefficients,
              const GradientView& view, void* scratch) {
  using A = Compute<T>;
  const A* u = static_cast<const A*>(coefficients);
  TileBuffers<T> buffers(v, scratch);
  const bool inner =
      is_inner(v, view.class_stride, view.voxel_stride) && is_inner(v, v.logits.class_stride, v.logits.voxel_stride);
  // The gradient of copied voxels goes to rows first.
  if (!inner && (view.voxel_stride != 1 || v.logits.voxel_stride != 1)) buffers.tile_voxels = buffers.row_voxels;
  Vector<A>* block = reinterpret_cast<Vector<A>*>(buffers.rest);
  T* buffer = reinterpret_cast<T*>(block + v.classes * kScratchVectors);
  PresentClasses present(buffer + v.classes * buffers.row_voxels, v.classes);
  const bool streamed = is_streamed<T>(v, view, inner);
  BadInput bad;  // the count pass has reported it, and the coefficients are NaN then
  for (int64_t at = begin; at < end;) {
    const int voxels = buffers.take(end - at);
    const Tile<T> tile = load_tile<T>(v, sample, at, voxels, buffers, inner, bad);
    T* there = static_cast<T*>(view.data) + sample * view.sample_stride + at * view.voxel_stride;
    const bool direct = tile.is_inner || (view.voxel_stride == 1 && voxels == tile.padded_voxels());
    const GradientRows<T> out = direct ? GradientRows<T>{there, view.class_stride, streamed}
                                       : GradientRows<T>{buffer, buffers.row_voxels, false};
    gradient_tile(v, tile, u, present, block, out);
    if (!direct) {
      copy_rows<true>(there, view.class_stride, view.voxel_stride, buffer, buffers.row_voxels, v.classes, voxels);
    }
    at += voxels;
  }
  if (streamed) finish_streams();
}

}  // namespace

namespace tversky_kernels {
namespace cpu {

void TK_JOIN(gradient_pass, TK_CAPABILITY)(const Volume& v, int64_t sample, int64_t begin, int64_t end,
                                           const void* coefficients, const GradientView& out, void* scratch) {
#if defined(TK_ONLY_BFLOAT16)  // see setup.py and kernels()
  return gradient<BFloat16>(v, sample, begin, end, coefficients, out, scratch);
#else
  with_logits_type(v.logits.type,
                   [&](auto t) { gradient<decltype(t)>(v, sample, begin, end, coefficients, out, scratch); });
#endif
}

int64_t TK_JOIN(gradient_scratch_bytes, TK_CAPABILITY)(const Volume& v) {
  return with_logits_type(v.logits.type, [&](auto t) { return scratch_bytes<decltype(t)>(v); });
}

}  // namespace cpu
}  // namespace tversky_kernels
