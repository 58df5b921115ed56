// The count pass on the CPU: logits and target in, the counts of every class out. Compiled once per instruction set.
#include "channels.h"
#include "labels.h"
#include "own_targets.h"

namespace {

// Which family takes a tile.
template <typename T>
void count_tile(const Volume& v, const Tile<T>& tile, PresentClasses& present, LogitsVector<T>* exponentials,
                CountVectors<T>* counts, BadInput& bad) {
  const int padded = tile.padded_voxels();
  const int classes = static_cast<int>(v.classes), first_label = static_cast<int>(v.first_label);
  if (takes_general_kernels(v)) return count_general(v, tile, exponentials, counts, bad);
  switch (v.activation) {
    case Activation::kSoftmax:
      return with_softmax_options(v, tile, [&](auto labels, auto cross_entropy, auto squared) {
        count_softmax_tile<T, decltype(labels)::value, decltype(cross_entropy)::value, decltype(squared)::value>(
            tile, classes, present, exponentials, counts);
      });
    case Activation::kSigmoid:
      return count_channels<T, Activation::kSigmoid>(tile, padded, classes, first_label, present, counts);
    case Activation::kNone:
      return count_channels<T, Activation::kNone>(tile, padded, classes, first_label, present, counts);
  }
}

constexpr int kScratchVectors = larger(2 * kBlockVectors, 2 * kGeneralVectors);  // of a class: two blocks' logits

// Scratch: the tile's buffers, kScratchVectors a class, tile sums[C][kAllCounts], totals[C][kAllCounts], present
// classes.
template <typename T>
int64_t scratch_bytes(const Volume& v) {
  return TileBuffers<T>::bytes(v) + v.classes * (kScratchVectors + kAllCounts + kAllCounts) * kVectorBytes +
         PresentClasses::bytes(v.classes);
}

template <typename T>
void count(const Volume& v, int64_t sample, int64_t begin, int64_t end, double* counts, void* scratch, BadInput* bad) {
  using A = Compute<T>;
  const TileBuffers<T> buffers(v, scratch);
  const int columns = v.count_columns();
  Vector<A>* block = reinterpret_cast<Vector<A>*>(buffers.rest);
  CountVectors<T>* sums = reinterpret_cast<CountVectors<T>*>(block + v.classes * kScratchVectors);
  auto* totals = reinterpret_cast<DoubleVector(*)[kAllCounts]>(sums + v.classes);
  PresentClasses present(totals + v.classes, v.classes);
  memset(sums, 0, v.classes * sizeof(*sums));
  memset(totals, 0, v.classes * sizeof(*totals));
  int since_flush = 0;
  for (int64_t at = begin; at < end;) {
    const int voxels = buffers.take(end - at);
    count_tile(v, load_tile<T>(v, sample, at, voxels, buffers, true, *bad), present, block, sums, *bad);
    at += voxels;
    since_flush += voxels;
    if (since_flush >= kTileVoxels || at >= end) {
      for (int64_t c = 0; c < v.classes; ++c) {
        for (int q = 0; q < columns; ++q) {
          add_to_double<A>(totals[c][q], sums[c][q]);
          sums[c][q] = Vector<A>{};
        }
      }
      since_flush = 0;
    }
  }
  for (int64_t c = 0; c < v.classes; ++c) {
    for (int q = 0; q < columns; ++q) {
      const bool of_all = q == kVoxels && !v.sums_label_weights();
      counts[c * columns + q] += horizontal_sum<double>(totals[of_all ? 0 : c][q]);
    }
  }
}

}  // namespace

namespace tversky_kernels {
namespace cpu {

void TK_JOIN(count_pass, TK_CAPABILITY)(const Volume& v, int64_t sample, int64_t begin, int64_t end, double* counts,
                                        void* scratch, BadInput* bad) {
  with_logits_type(v.logits.type, [&](auto t) { count<decltype(t)>(v, sample, begin, end, counts, scratch, bad); });
}

int64_t TK_JOIN(count_scratch_bytes, TK_CAPABILITY)(const Volume& v) {
  return with_logits_type(v.logits.type, [&](auto t) { return scratch_bytes<decltype(t)>(v); });
}

}  // namespace cpu
}  // namespace tversky_kernels
