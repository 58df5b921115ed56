// The family "regions": voxels that are counted in one of several rows. The voxels of a tile are sorted by their region
// into lanes, so that the kernels of the other families see one region in each lane. First come whole blocks of one
// region, then blocks whose lanes belong to several. Sums and coefficients are kept for each lane.
#pragma once

#include "channels.h"
#include "labels.h"
#include "own_targets.h"

namespace {

// Copies a few numbers. A call of memcpy takes longer than the copy.
template <typename E>
TK_INLINE void copy_piece(E* to, const E* from, int length) {
#if defined(__AVX512F__)
  constexpr int kMany = 64 / static_cast<int>(sizeof(E));
  int i = 0;
  for (; i + kMany <= length; i += kMany) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
  if (i == length) return;
  if constexpr (sizeof(E) == 4) {
    const __mmask16 mask = static_cast<__mmask16>((1u << (length - i)) - 1);
    _mm512_mask_storeu_epi32(to + i, mask, _mm512_maskz_loadu_epi32(mask, from + i));
  } else {
    const __mmask8 mask = static_cast<__mmask8>((1u << (length - i)) - 1);
    _mm512_mask_storeu_epi64(to + i, mask, _mm512_maskz_loadu_epi64(mask, from + i));
  }
#else
  memcpy(to, from, length * sizeof(E));
#endif
}

constexpr int kRegionVoxels = 4096;           // of a tile at most: the more, the fewer blocks of several regions
constexpr int64_t kRegionBytes = 256 * 1024;  // of a tile's logits, where that leaves enough voxels
constexpr int kNoGroup = -1;                  // of voxels that are in no region

// Of a tile: a whole number of kTileVoxels where the classes are few.
template <typename A>
int region_tile_voxels(const Volume& v) {
  const int64_t fitting = kRegionBytes / (v.classes * static_cast<int64_t>(sizeof(A)));
  return static_cast<int>(larger(256, smaller(kRegionVoxels, fitting / 256 * 256)));
}

// `length` voxels of the tile from `voxel` on, sorted to `position` and after; kNoGroup: sorted nowhere.
struct Piece {
  int32_t voxel, position, length;
};

// Voxels with the same rows: the same region or, where each class has a partition of its own, the same regions.
struct Group {
  int32_t first_voxel;  // the ids of this voxel are the ids of all
  int32_t voxels, placed;
  int32_t blocks_at, lane;  // where its whole blocks begin, and the lanes of the rest
  int32_t bucket, next;     // of its hash; the earlier group there
  int64_t members;          // voxels that count
};

// `length` voxels of the tile from `voxel` on that are in one group.
struct Run {
  int32_t voxel, length, group;
};

// A tile whose voxels are sorted by region, and its working memory.
template <typename T>
class RegionTile {
 public:
  using A = Compute<T>;
  using V = Vector<A>;
  using Int = typename Lanes<A>::Int;
  static constexpr int kLanes = Lanes<A>::count, kStep = kBlock<A>, kHashes = 2 * kRegionVoxels, kLongPiece = 6;

  // Positions: a region takes at most kBlockVectors - 1 places too many.
  static int capacity(const Volume& v) { return kBlockVectors * region_tile_voxels<A>(v) + 2 * kStep; }
  static int64_t bytes(const RegionVolume& r) {
    const Volume& v = r.volume;
    const int64_t voxels = region_tile_voxels<A>(v), positions = capacity(v), ids = r.by_class ? v.classes : 1;
    const int64_t rows = v.classes * static_cast<int64_t>(sizeof(A)) * (v.dense ? 2 : 1);
    return positions * (rows + static_cast<int64_t>(sizeof(A) + sizeof(Int))) +
           voxels * (v.dense ? v.classes * static_cast<int64_t>(sizeof(A)) : 0) +
           (v.dense ? v.classes * kVectorBytes : 0) + voxels * static_cast<int64_t>(sizeof(A) + sizeof(Int)) +
           voxels *
               (ids * 4 + static_cast<int64_t>(sizeof(Piece) + sizeof(Group) + sizeof(Run) + 2 * sizeof(int32_t))) +
           (r.merged != nullptr ? 2 * positions * static_cast<int64_t>(sizeof(A)) : 0) +
           kHashes * static_cast<int64_t>(sizeof(int32_t)) + (18 + 4) * 64;
  }

  RegionTile(const RegionVolume& region_volume, void* memory)
      : r_(region_volume), v_(region_volume.volume), capacity_(capacity(v_)), most_(region_tile_voxels<A>(v_)) {
    char* at = static_cast<char*>(memory);
    const auto take = [&](int64_t count, auto element) {
      using E = decltype(element);
      E* const p = reinterpret_cast<E*>(at);
      at += (count * static_cast<int64_t>(sizeof(E)) + 63) / 64 * 64;
      return p;
    };
    rows = take(v_.classes * capacity_, A{});
    weights_ = take(capacity_, A{});
    labels_ = take(capacity_, Int{});
    targets_ = take(v_.dense ? v_.classes * capacity_ : 0, A{});
    unsorted_targets_ = take(v_.dense ? v_.classes * most_ : 0, A{});
    converted_ = take(v_.dense ? v_.classes * kLanes : 0, A{});
    unsorted_weights_ = take(most_, A{});
    unsorted_labels_ = take(most_, Int{});
    ids_ = take((r_.by_class ? v_.classes : 1) * most_, int32_t{});
    pieces = take(most_, Piece{});
    groups = take(most_, Group{});
    lane_groups = take(most_ + kLanes, int32_t{});
    runs_ = take(most_, Run{});
    position_of_ = take(most_, int32_t{});
    buckets_ = take(kHashes, int32_t{});
    background_ = take(r_.merged != nullptr ? capacity_ : 0, A{});
    background_gradient_ = take(r_.merged != nullptr ? capacity_ : 0, A{});
    for (int i = 0; i < kHashes; ++i) buckets_[i] = kNoGroup;
    rest = at;
  }

  A* rows;               // [C][capacity] of the sorted voxels: their logits
  Piece* pieces;         // in the tile's order; all voxels are in one
  Group* groups;         // in the order of their first voxels
  int32_t* lane_groups;  // of the lanes of mixed blocks; kNoGroup: an empty one
  int piece_count = 0, group_count = 0;
  int whole_end = 0, positions = 0;  // positions [0, whole_end) are blocks of one group each
  char* rest;

  // An entry for each region id; kNoGroup between two tiles that are counted in place.
  int32_t* buckets() { return buckets_; }
  int row_stride() const { return capacity_; }
  // The region in which a group is counted for class c; negative: in no region.
  int32_t region(const Group& group, int64_t c) const {
    return ids_[(r_.by_class ? c * most_ : 0) + group.first_voxel];
  }

  // Whether the kernels of the other families read whole vectors of voxels in place. Those that take one vector at a
  // time do.
  bool reads_in_place() const {
    const bool one_vector = v_.activation != Activation::kSoftmax || v_.classes <= kFewClasses;
    return reads_blocks_in_place() && one_vector && !takes_general_kernels(v_) && !r_.by_class && r_.count <= kHashes;
  }
  bool reads_blocks_in_place() const {
    return allows_in_place && std::is_same_v<T, A> && v_.logits.voxel_stride == 1 && merged_ == nullptr;
  }
  // How many of the `left` voxels are taken at once.
  int take(int64_t left) const {
    const bool whole = reads_in_place() && left >= kLanes;
    return static_cast<int>(smaller(most_, whole ? left / kLanes * kLanes : left));
  }

  // Reads some of the voxels [begin, begin + count) of a sample (take() says how many), and returns their number. Sorts
  // them unless they are counted in place.
  int fill(int64_t sample, int64_t begin, int count, BadInput& bad) {
    for (int g = 0; g < group_count; ++g) buckets_[groups[g].bucket] = kNoGroup;
    group_count = 0;
    at_ = static_cast<const T*>(v_.logits.data) + sample * v_.logits.sample_stride + begin * v_.logits.voxel_stride;
    merged_ = merged_classes(sample);
    load_ids(sample, begin, count, bad);
    in_place = reads_in_place() && count % kLanes == 0;
    const int alike = in_place || !reads_blocks_in_place() ? 0 : run_length(0, count) / kStep * kStep;
    is_uniform = alike == count || alike >= kTileVoxels;
    if (is_uniform) count = alike;
    count_ = count;
    const bool masked = load_voxels(sample, begin, count, bad);
    if (in_place || is_uniform) {
      for (int i = 0; i < count && !r_.by_class; ++i) {
        unsorted_labels_[i] = ids_[i] < 0 ? Int(kUncounted) : unsorted_labels_[i];
      }
    }
    if (is_uniform && find_group(0) != kNoGroup) {
      groups[0].members = masked ? count_counted(0, count) : count;
    }
    if (in_place || is_uniform) return count;
    sort(count, masked);
    // A place that gets no voxel counts nowhere. It holds numbers.
    const int64_t empty = positions - whole_end;
    for (int i = whole_end; i < positions; ++i) labels_[i] = kUncounted;
    if (v_.weight.data != nullptr) memset(weights_ + whole_end, 0, empty * sizeof(A));
    for (int64_t c = 0; c < v_.classes; ++c) {
      memset(rows + c * capacity_ + whole_end, 0, empty * sizeof(A));
      if (v_.dense) memset(targets_ + c * capacity_ + whole_end, 0, empty * sizeof(A));
    }
    gather(unsorted_labels_, labels_);
    if (v_.weight.data != nullptr) gather(unsorted_weights_, weights_);
    for (int64_t c = 0; v_.dense && c < v_.classes; ++c) {
      gather(unsorted_targets_ + c * most_, targets_ + c * capacity_);
    }
    for (int64_t c = 0; c < v_.classes; ++c) gather_logits(c, rows + c * capacity_);
    if (merged_ != nullptr) merge();
    return count;
  }

  // Whether all voxels are of one group, groups[0] (or of none), and blocks of them are read in place.
  bool is_uniform = false;

  // ---- In place: vectors of voxels, each with the regions of its lanes

  bool in_place = false;
  bool allows_in_place = true;
  int voxels() const { return count_; }
  IntVector<A> regions_at(int i) const { return (IntVector<A>)load_widened<Int>(ids_ + i); }
  IntVector<A> labels_at(int i) const { return load<IntVector<A>>(unsorted_labels_ + i); }
  int32_t region_at(int i) const { return ids_[i]; }
  // How many vectors from voxel i on have one region, the same for all; 0: not even the first.
  int uniform_vectors(int i) const {
    const IntVector<A> region = IntVector<A>{} + static_cast<Int>(ids_[i]);
    int vectors = 0;
    while (i + vectors * kLanes < count_ && !any(regions_at(i + vectors * kLanes) != region)) ++vectors;
    return vectors;
  }
  // Calls work(region, mask of its lanes) for each region that is not negative in the vector of voxels from i on.
  template <typename F>
  TK_INLINE void for_each_region(int i, const F& work) const {
    const IntVector<A> ids = regions_at(i);
    IntVector<A> pending = ids >= 0;
    int32_t last = kNoGroup;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t id = ids_[i + lane];
      if (id < 0 || id == last) continue;
      last = id;
      const IntVector<A> mask = pending & (ids == static_cast<Int>(id));
      if (!any(mask)) continue;
      work(id, mask);
      pending &= ~mask;
      if (!any(pending)) return;
    }
  }
  // Whether the vector of voxels from i on has many regions: more than half of the neighbours differ.
  bool is_scattered(int i) const {
    int changes = 0;
    for (int lane = 1; lane < kLanes; ++lane) changes += ids_[i + lane] != ids_[i + lane - 1];
    return changes > kLanes / 2;
  }
  Tile<A> tile_in_place(int from, int count) const {
    Tile<A> t = tile(0, count);
    t.rows = reinterpret_cast<const A*>(at_) + from;  // T is A
    t.row_stride = v_.logits.class_stride;
    t.labels = unsorted_labels_ + from;
    t.weights = v_.weight.data != nullptr ? unsorted_weights_ + from : nullptr;
    t.targets = v_.dense ? unsorted_targets_ + from : nullptr;
    t.target_stride = most_;
    return t;
  }

  // ---- Sorted

 private:
  bool load_voxels(int64_t sample, int64_t begin, int count, BadInput& bad) {
    bool masked = false;
    for (int at = 0; at < count; at += kTileVoxels) {
      const int some = static_cast<int>(smaller(kTileVoxels, count - at));
      if (v_.dense) {
        load_targets(v_, sample, begin + at, some, converted_, unsorted_targets_ + at, most_, unsorted_labels_ + at,
                     masked);
      } else {
        load_labels(v_, sample, begin + at, some, unsorted_labels_ + at, masked, bad);
      }
      if (v_.weight.data != nullptr) {
        load_weights(v_, sample, begin + at, some, unsorted_weights_ + at, unsorted_labels_ + at, masked, bad);
      }
    }
    return masked;
  }

 public:
  // Positions [from, from + count) as the other families' kernels take a tile.
  Tile<A> tile(int from, int count) const {
    Tile<A> t;
    t.rows = rows + from;
    t.row_stride = capacity_;
    t.labels = labels_ + from;
    t.bytes = nullptr;
    t.weights = v_.weight.data != nullptr ? weights_ + from : nullptr;
    t.targets = v_.dense ? targets_ + from : nullptr;
    t.target_stride = capacity_;
    t.first_label = static_cast<Int>(v_.first_label);
    t.voxels = count;
    t.masked = true;
    t.is_inner = false;
    t.focal_gamma = static_cast<A>(v_.focal_gamma);
    return t;
  }

  // The gradients of the classes that belong to the background, from the gradient of the background: see merge().
  void spread_background() {
    if (merged_ == nullptr) return;
    memcpy(background_gradient_, rows, positions * sizeof(A));
    for (int64_t c = 0; c < v_.classes; ++c) {
      if (c > 0 && !merged_[c]) continue;
      A* const row = rows + c * capacity_;
      gather_logits(c, row);
      for (int i = 0; i < positions; i += kLanes) {
        const V upstream = load<V>(background_gradient_ + i);
        const V share = exp_nonpositive<A>(load<V>(row + i) - load<V>(background_ + i));
        store(row + i, upstream == 0 ? V{} : upstream * share);  // a voxel that does not count may hold NaN
      }
    }
  }

  // Writes the rows to the places of the voxels; 0 for voxels in no region.
  void scatter(const GradientView& view, int64_t sample, int64_t begin) const {
    T* const out = static_cast<T*>(view.data) + sample * view.sample_stride + begin * view.voxel_stride;
    for (int64_t c = 0; c < v_.classes; ++c) {
      if (fragmented_) {
        A* const from = rows + c * capacity_;
        from[nowhere()] = 0;
        for (int first = 0; first < count_; first += kLanes) {
          const int some = static_cast<int>(smaller(kLanes, count_ - first));
          A values[kLanes];
          for (int i = 0; i < some; ++i) values[i] = from[position_of_[first + i]];
          write(out + c * view.class_stride + first * view.voxel_stride, view.voxel_stride, values, some);
        }
        continue;
      }
      for (int i = 0; i < piece_count; ++i) {
        const Piece& p = pieces[i];
        T* const to = out + c * view.class_stride + p.voxel * view.voxel_stride;
        const A* const from = p.position == kNoGroup ? nullptr : rows + c * capacity_ + p.position;
        write(to, view.voxel_stride, from, p.length);
      }
    }
  }

 private:
  const RegionVolume& r_;
  const Volume& v_;
  int capacity_, most_;
  A *weights_, *targets_, *unsorted_targets_, *converted_, *unsorted_weights_;
  Int *labels_, *unsorted_labels_;
  int32_t *ids_, *buckets_;
  Run* runs_;
  int32_t* position_of_;  // of each voxel, where the pieces are too short to copy them whole
  bool fragmented_ = false;
  int count_ = 0;
  const T* at_ = nullptr;  // the logits of the first voxel
  const uint8_t* merged_ = nullptr;
  A *background_, *background_gradient_;  // of merged classes: the logit of class 0, and its gradient

  // ---- Classes that were not annotated

  // The classes of a sample that belong to its background; null: there are none.
  const uint8_t* merged_classes(int64_t sample) const {
    if (r_.merged == nullptr) return nullptr;
    const uint8_t* const of_sample = r_.merged + sample * v_.classes;
    for (int64_t c = 1; c < v_.classes; ++c) {
      if (of_sample[c]) return of_sample;
    }
    return nullptr;
  }

  // The softmax gives the probability of these classes to class 0: its logit becomes the logarithm of the sum of their
  // exponentials, and their logits become -inf.
  void merge() {
    for (int i = 0; i < positions; i += kLanes) {
      V top = load<V>(rows + i), sum{};
      for (int64_t c = 1; c < v_.classes; ++c) {
        if (merged_[c]) top = maximum(top, load<V>(rows + c * capacity_ + i));
      }
      for (int64_t c = 0; c < v_.classes; ++c) {
        if (c > 0 && !merged_[c]) continue;
        const V z = load<V>(rows + c * capacity_ + i);
        sum += exp_nonpositive<A>(z == top ? V{} : z - top);  // -inf less itself is 0 here
        if (c > 0) store(rows + c * capacity_ + i, broadcast<A>(-__builtin_inff()));
      }
      const V background = top + log_positive<A>(sum);
      store(rows + i, background);
      store(background_ + i, background);
    }
  }

  // ---- Regions

  template <typename I>
  void load_ids_of(int64_t sample, int64_t begin, int count, BadInput& bad) {
    const VoxelView& view = r_.regions;
    for (int64_t c = 0; c < (r_.by_class ? v_.classes : 1); ++c) {
      const I* p = static_cast<const I*>(view.data) + sample * view.sample_stride + c * view.class_stride;
      int32_t* const out = ids_ + c * most_;
      I most = 0;
      for (int first = 0; first < count; first += kTileVoxels) {
        const int some = static_cast<int>(smaller(kTileVoxels, count - first));
        I memory[kTileVoxels];
        const I* gathered = gather_resampled(view, p, begin + first, some, memory);
        const int64_t stride = gathered != nullptr ? 1 : view.voxel_stride;
        const I* from = gathered != nullptr ? gathered : p + (begin + first) * stride;
        for (int i = 0; i < some; ++i) {
          const I id = from[i * stride];
          most = id > most ? id : most;
          out[first + i] = id < 0 ? kNoGroup : static_cast<int32_t>(id);
        }
      }
      if (static_cast<int64_t>(most) < r_.count) continue;
      for (int i = 0; i < count; ++i) {  // an id of more than 32 bits is read again
        const int64_t id = static_cast<int64_t>(
            p[view.resampling.active ? view.resampling.offset(begin + i) : (begin + i) * view.voxel_stride]);
        if (id < r_.count) continue;
        if (!bad.region) bad.region_value = id;
        bad.region = true;
        out[i] = kNoGroup;
      }
    }
  }

  void load_ids(int64_t sample, int64_t begin, int count, BadInput& bad) {
    if (r_.regions.data == nullptr) {
      memset(ids_, 0, count * sizeof(*ids_));
      return;
    }
    switch (r_.regions.type) {
      case ElementType::kUint8: return load_ids_of<uint8_t>(sample, begin, count, bad);
      case ElementType::kInt8: return load_ids_of<int8_t>(sample, begin, count, bad);
      case ElementType::kInt16: return load_ids_of<int16_t>(sample, begin, count, bad);
      case ElementType::kInt32: return load_ids_of<int32_t>(sample, begin, count, bad);
      default: return load_ids_of<int64_t>(sample, begin, count, bad);
    }
  }

  // How many voxels from `voxel` on have the same ids.
  int run_length(int voxel, int end) const {
    int run = end;
    for (int64_t c = 0; c < (r_.by_class ? v_.classes : 1); ++c) {
      const int32_t* ids = ids_ + c * most_;
      const int32_t id = ids[voxel];
      using I = typename Integers<int32_t>::Vector;
      constexpr int kIds = Integers<int32_t>::count;
      int at = voxel + 1;
      while (at + kIds <= run && !any(load<I>(ids + at) != id)) at += kIds;
      while (at < run && ids[at] == id) ++at;
      run = at;
    }
    return run - voxel;
  }

  // The group of a voxel. Makes it where there is none.
  int find_group(int voxel) {
    if (!r_.by_class && r_.count <= kHashes) {  // the id is the bucket
      const int32_t id = ids_[voxel];
      if (id < 0) return kNoGroup;
      if (buckets_[id] == kNoGroup) {
        groups[group_count] = {voxel, 0, 0, 0, 0, id, kNoGroup, 0};
        buckets_[id] = group_count++;
      }
      return buckets_[id];
    }
    const int64_t rows_of_ids = r_.by_class ? v_.classes : 1;
    uint32_t hash = 0;
    bool some = false;
    for (int64_t c = 0; c < rows_of_ids; ++c) {
      const int32_t id = ids_[c * most_ + voxel];
      some |= id >= 0;
      hash = (hash ^ static_cast<uint32_t>(id)) * 0x9e3779b1u;
      hash ^= hash >> 15;
    }
    if (!some) return kNoGroup;
    const int32_t bucket = static_cast<int32_t>(hash % kHashes);
    for (int32_t g = buckets_[bucket]; g != kNoGroup; g = groups[g].next) {
      bool same = true;
      for (int64_t c = 0; same && c < rows_of_ids; ++c) {
        same = ids_[c * most_ + voxel] == ids_[c * most_ + groups[g].first_voxel];
      }
      if (same) return g;
    }
    groups[group_count] = {voxel, 0, 0, 0, 0, bucket, buckets_[bucket], 0};
    buckets_[bucket] = group_count;
    return group_count++;
  }

  // ---- Sorting

  // Fills pieces, groups and lane_groups.
  void sort(int count, bool masked) {
    int runs = 0;
    for (int at = 0; at < count;) {
      const int length = run_length(at, count), g = find_group(at);
      runs_[runs++] = {at, length, g};
      if (g != kNoGroup) {
        groups[g].voxels += length;
        groups[g].members += masked ? count_counted(at, length) : length;
      }
      at += length;
    }
    int lanes = 0;
    whole_end = 0;
    for (int g = 0; g < group_count; ++g) {
      Group& group = groups[g];
      group.blocks_at = whole_end;
      group.lane = lanes;
      whole_end += group.voxels / kStep * kStep;
      for (int i = 0; i < lanes_of(group); ++i) lane_groups[lanes++] = g;
    }
    while (lanes % kLanes != 0) lane_groups[lanes++] = kNoGroup;
    positions = whole_end + lanes * kBlockVectors;
    piece_count = 0;
    for (int i = 0; i < runs; ++i) place(runs_[i]);
    fragmented_ = piece_count > count / kLongPiece;
    if (!fragmented_) return;
    for (int i = 0; i < piece_count; ++i) {
      const Piece& p = pieces[i];
      for (int k = 0; k < p.length; ++k)
        position_of_[p.voxel + k] = p.position == kNoGroup ? nowhere() : p.position + k;
    }
  }

  // A place for voxels that are in no region.
  int nowhere() const { return capacity_ - 1; }

  static int lanes_of(const Group& group) { return (group.voxels % kStep + kBlockVectors - 1) / kBlockVectors; }

  int count_counted(int at, int length) const {
    int counted = 0;
    for (int i = at; i < at + length; ++i) counted += unsorted_labels_[i] >= 0;
    return counted;
  }

  // Neighbouring voxels go to neighbouring lanes, or to whole blocks.
  void place(Run run) {
    if (run.group == kNoGroup) {
      pieces[piece_count++] = {run.voxel, kNoGroup, run.length};
      return;
    }
    Group& group = groups[run.group];
    const int whole = group.voxels / kStep * kStep, first_lane = group.lane % kLanes;
    const int block = whole_end + group.lane / kLanes * kStep;
    while (run.length > 0) {
      int position, most, at = group.placed - whole;
      if (at < 0) {
        position = group.blocks_at + group.placed;
        most = -at;
      } else {  // its lanes may be in two blocks
        int lanes = static_cast<int>(smaller(lanes_of(group), kLanes - first_lane));
        int from = block + first_lane;
        if (at >= lanes * kBlockVectors) {
          at -= lanes * kBlockVectors;
          lanes = lanes_of(group) - lanes;
          from = block + kStep;
        }
        position = from + at / lanes * kLanes + at % lanes;
        most = lanes - at % lanes;
      }
      const int length = static_cast<int>(smaller(run.length, most));
      pieces[piece_count++] = {run.voxel, position, length};
      group.placed += length;
      run.voxel += length;
      run.length -= length;
    }
  }

  // ---- Copies

  template <typename E>
  void gather(const E* from, E* to) const {
    if (fragmented_) {
      for (int i = 0; i < count_; ++i) to[position_of_[i]] = from[i];
      return;
    }
    for (int i = 0; i < piece_count; ++i) {
      const Piece& p = pieces[i];
      if (p.position != kNoGroup) copy_piece(to + p.position, from + p.voxel, p.length);
    }
  }

  void gather_logits(int64_t c, A* to) const {
    const LogitsView& z = v_.logits;
    const T* const from = at_ + c * z.class_stride;
    if (fragmented_) {
      for (int i = 0; i < count_; ++i) to[position_of_[i]] = to_accumulation<T, A>(from[i * z.voxel_stride]);
      return;
    }
    for (int i = 0; i < piece_count; ++i) {
      const Piece& p = pieces[i];
      if (p.position != kNoGroup) read(from + p.voxel * z.voxel_stride, z.voxel_stride, to + p.position, p.length);
    }
  }

  static void read(const T* from, int64_t stride, A* to, int length) {
    if (stride != 1) {
      for (int i = 0; i < length; ++i) to[i] = to_accumulation<T, A>(from[i * stride]);
    } else if constexpr (std::is_same_v<T, A>) {
      copy_piece(to, from, length);
    } else {
      convert(from, length, to);
    }
  }

  // from: null for zeros.
  static void write(T* to, int64_t stride, const A* from, int length) {
    if (from == nullptr) {
      for (int i = 0; i < length; ++i) to[i * stride] = T{};
    } else if constexpr (std::is_same_v<T, A>) {
      if (stride == 1) {
        copy_piece(to, from, length);
      } else {
        for (int i = 0; i < length; ++i) to[i * stride] = from[i];
      }
    } else {
      for (int i = 0; i < length; i += kLanes) {
        const int some = static_cast<int>(smaller(kLanes, length - i));
        A values[kLanes] = {};
        T stored[kLanes];
        memcpy(values, from + i, some * sizeof(A));
        store_logits(stored, load<V>(values), false);
        if (stride == 1) {
          memcpy(to + i, stored, some * sizeof(T));
        } else {
          for (int k = 0; k < some; ++k) to[(i + k) * stride] = stored[k];
        }
      }
    }
  }
};

// Calls work with the number of classes as a constant, 0 where it is above kFewClasses.
template <typename F>
TK_INLINE void with_few_classes(int64_t classes, const F& work) {
  static_assert(kFewClasses == 4, "as here");
  switch (classes) {
    case 2: return work(std::integral_constant<int, 2>{});
    case 3: return work(std::integral_constant<int, 3>{});
    case 4: return work(std::integral_constant<int, 4>{});
    default: return work(std::integral_constant<int, 0>{});
  }
}

}  // namespace
