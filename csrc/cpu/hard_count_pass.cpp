// Counts of predicted classes on the CPU: the class with the largest logit beside the label. Compiled once per
// instruction set.
#include "tile.h"

namespace {

constexpr int kTables = 4;  // neighbouring voxels count in different tables, so that they need not wait for each other
constexpr int kPairClasses = 32;  // up to here pairs of label and prediction are counted: one addition a voxel

// Scratch: the tile's buffers, each voxel's predicted class, tables of true positives, predictions and labels, pairs.
template <typename T>
int64_t scratch_bytes(const Volume& v) {
  return TileBuffers<T>::bytes(v) + kTileVoxels * static_cast<int64_t>(sizeof(typename Lanes<Compute<T>>::Int)) + 64 +
         kTables * 3 * v.classes * static_cast<int64_t>(sizeof(double)) +
         kTables * kPairClasses * kPairClasses * static_cast<int64_t>(sizeof(uint32_t));
}

// The class of the largest logit, the first of equals. NaN is larger than any number, as in torch.
template <typename T>
void predict(const Tile<T>& tile, int classes, typename Lanes<Compute<T>>::Int* predicted) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  using Int = typename Lanes<A>::Int;
  for (int i = 0; i < tile.padded_voxels(); i += Lanes<A>::count) {
    V best = load_logits(tile.rows + i);
    I index{};
    for (int c = 1; c < classes; ++c) {
      const V z = load_logits(tile.rows + c * tile.row_stride + i);
      const I takes = (z > best) | ((z != z) & (best == best));
      best = takes ? z : best;
      index = takes ? I{} + static_cast<Int>(c) : index;
    }
    store(predicted + i, index);
  }
}

template <typename T>
void count(const Volume& v, int64_t sample, int64_t begin, int64_t end, double* counts, void* scratch, BadInput* bad) {
  using A = Compute<T>;
  using Int = typename Lanes<A>::Int;
  TileBuffers<T> buffers(v, scratch);
  if (v.logits.voxel_stride != 1) buffers.tile_voxels = buffers.row_voxels;  // copied voxels are kept in rows
  const int64_t classes = v.classes, size = 3 * classes;
  Int* const predicted = reinterpret_cast<Int*>(buffers.rest);
  double* const tables = reinterpret_cast<double*>(predicted + kTileVoxels);
  memset(tables, 0, kTables * size * sizeof(*tables));
  const bool in_pairs = classes <= kPairClasses && v.weight.data == nullptr;
  const int64_t all_pairs = classes * classes;
  uint32_t* const pairs = reinterpret_cast<uint32_t*>(tables + kTables * size);
  if (in_pairs) memset(pairs, 0, kTables * all_pairs * sizeof(*pairs));
  for (int64_t at = begin; at < end;) {
    const int voxels = buffers.take(end - at);
    const Tile<T> tile = load_tile<T>(v, sample, at, voxels, buffers, false, *bad);
    predict(tile, static_cast<int>(classes), predicted);
    if (in_pairs && tile.bytes != nullptr) {
      for (int i = 0; i < voxels; ++i) ++pairs[i % kTables * all_pairs + tile.bytes[i] * classes + predicted[i]];
    } else if (in_pairs) {
      for (int i = 0; i < voxels; ++i) {
        const Int label = tile.labels[i];
        if (label >= 0) ++pairs[i % kTables * all_pairs + label * classes + predicted[i]];
      }
    }
    for (int i = 0; !in_pairs && i < voxels; ++i) {
      const int64_t label = tile.bytes != nullptr ? tile.bytes[i] : static_cast<int64_t>(tile.labels[i]);
      if (label < 0) continue;
      const double weight = tile.weights != nullptr ? static_cast<double>(tile.weights[i]) : 1.0;
      double* const table = tables + i % kTables * size;
      table[label] += predicted[i] == label ? weight : 0.0;
      table[classes + predicted[i]] += weight;
      table[2 * classes + label] += weight;
    }
    at += voxels;
  }
  for (int64_t k = 0; k < kTables * size; ++k) counts[k % size] += tables[k];
  for (int64_t k = 0; in_pairs && k < kTables * all_pairs; ++k) {
    const int64_t label = k % all_pairs / classes, prediction = k % classes;
    if (label == prediction) counts[label] += pairs[k];
    counts[classes + prediction] += pairs[k];
    counts[2 * classes + label] += pairs[k];
  }
}

}  // namespace

namespace tversky_kernels {
namespace cpu {

void TK_JOIN(hard_count_pass, TK_CAPABILITY)(const Volume& v, int64_t sample, int64_t begin, int64_t end,
                                             double* counts, void* scratch, BadInput* bad) {
  with_logits_type(v.logits.type, [&](auto t) { count<decltype(t)>(v, sample, begin, end, counts, scratch, bad); });
}

int64_t TK_JOIN(hard_count_scratch_bytes, TK_CAPABILITY)(const Volume& v) {
  return with_logits_type(v.logits.type, [&](auto t) { return scratch_bytes<decltype(t)>(v); });
}

}  // namespace cpu
}  // namespace tversky_kernels
