// The classes of a voxel split over lanes, as in split.cuh, where the classes of a voxel lie side by side
// (channels_last). They come through a tile in shared memory, from which each lane takes neighbouring classes.
#pragma once

#include "launch.h"
#include "split.cuh"
#include "voxels.cuh"

namespace tversky_kernels {
namespace cuda {

// Whether the next tile is brought to shared memory while a warp works on this one. In float32 two tiles would leave an
// sm_80 one block for each multiprocessor.
template <typename T>
constexpr bool kTileAhead = sizeof(T) == 2;
// The most classes that a lane takes from a tile by one access.
template <int kClasses>
constexpr int kUnitOf = kClasses % 2 == 0 ? 2 : 1;
// A row of a tile: as few packs as make whole pieces of 16 bytes.
struct RowOfTile {
  int packs;   // of kSplitVoxels voxels
  int pieces;  // packs that it has
  int stride;  // pieces from one row to the next, an odd number: rows begin in different banks
  __host__ __device__ RowOfTile(int classes, int element_size)
      : packs(classes * kSplitVoxels * element_size % 16 == 0 ? 1 : 2),
        pieces(classes * kSplitVoxels * packs * element_size / 16),
        stride(pieces | 1) {}
};

// kUnit_: classes that a lane takes by one access. kTurns neighbouring lanes have neighbouring units and take them in
// turn. All such groups of lanes have as many units; the first groups may have one more.
template <int kUnit_, int kTurns>
struct TileLane : LaneOfVoxel {
  static_assert(kTurns == 1 || kTurns == 2 || kTurns == 4);
  static constexpr bool kKnowsOwner = false;
  static constexpr int kUnit = kUnit_;

  int first_class;  // of this lane; offset_of gives the places of the next ones
  int own;          // how many they are

  __device__ __forceinline__ TileLane(const SplitShape& shape_, int classes) : LaneOfVoxel(shape_) {
    const Units units(classes, shape_.log_lanes);
    const int group = place / kTurns, turn = place % kTurns, start = units.first(group);
    first_class = (start + turn) * kUnit;
    own = (units.first(group + 1) - start - turn + kTurns - 1) / kTurns * kUnit;
  }

  // The distance from the lane's first class to its class j.
  static constexpr __device__ int offset_of(int j) { return j / kUnit * (kTurns * kUnit) + j % kUnit; }
  __device__ __forceinline__ int class_of(int j) const { return first_class + offset_of(j); }
  // Whether class_of(j) exists, of at most kClasses. with_interleaved_classes takes kClasses so that only the last few
  // may be missing.
  template <int kClasses>
  __device__ __forceinline__ bool has(int j) const {
    return j < kClasses - (kUnit == 2 ? 2 : 3) || j < own;
  }
  __device__ __forceinline__ bool has_label(int label) const {
    constexpr unsigned kOthers = (kTurns - 1) * kUnit;  // the bits that say whose turn it is
    const unsigned x = static_cast<unsigned>(label - first_class);
    return (x & kOthers) == 0 && x < static_cast<unsigned>(own * kTurns);
  }
  // The place of the label among this lane's classes; -1: it is none of them.
  __device__ __forceinline__ int index_of(int label) const {
    static_assert(kTurns == 1 || kTurns >= kUnit, "so that x / kTurns is the first class of its unit");
    const unsigned x = static_cast<unsigned>(label - first_class), j = kTurns == 1 ? x : x / kTurns | x % kUnit;
    return has_label(label) ? static_cast<int>(j) : -1;
  }
  __device__ __forceinline__ ClassOfLane find(int c, int classes) const {
    const Units units(classes, shape.log_lanes);
    const int group = units.group_of(c / kUnit), unit = c / kUnit - units.first(group);
    return {group * kTurns + unit % kTurns, unit / kTurns * kUnit + c % kUnit};
  }

 private:
  struct Units {
    int each, longer;  // units of a group, and groups with one unit more

    __device__ __forceinline__ Units(int classes, int log_lanes) {
      const int units = classes / kUnit, log_groups = log_lanes - kTurns / 2;  // 0, 1 or 2 fewer
      each = units >> log_groups;
      longer = units & ((1 << log_groups) - 1);
    }
    __device__ __forceinline__ int first(int group) const { return group * each + (group < longer ? group : longer); }
    __device__ __forceinline__ int group_of(int unit) const {
      const int of_longer = longer * (each + 1);
      return unit < of_longer ? unit / (each + 1) : longer + (unit - of_longer) / each;
    }
  };
};

// A lane's pack of logits; their gradient takes their place. The lanes of all warps that share voxels bring memory in
// pieces of 16 bytes. kAhead: there are two tiles, and the next voxels and labels are brought while a thread works on
// these.
template <typename T, int kClasses, int kTurns, bool kAhead>
struct PackInTile {
  using A = Compute<T>;
  using Labels = LabelRow<Reads::kSameSize, kSplitVoxels>;
  using Lane = TileLane<kUnitOf<kClasses>, kTurns>;
  static constexpr Targets kTargets = Targets::kTaken;
  static constexpr bool kPutsTargets = true;
  static constexpr int kPiece = kPack<T>, kPieces = (kClasses * kSplitVoxels + kPiece - 1) / kPiece;
  static constexpr int kUnit = Lane::kUnit;

  T* none;  // this thread's own place, for a class that it does not have
  T* tile;
  T* other;  // kAhead: the next tile
  unsigned char* label_slots;
  int classes;

  __device__ __forceinline__ PackInTile(unsigned char* memory, const Volume& v, const Lane& lane)
      : none(reinterpret_cast<T*>(memory) + threadIdx.x), classes(static_cast<int>(v.classes)) {
    *none = static_cast<T>(-INFINITY);
    T* const tiles = reinterpret_cast<T*>(memory) + Plan::kThreads;
    const RowOfTile row(classes, sizeof(T));
    const int of_group = lane.slots / row.packs * row.stride * kPiece, of_block = lane.groups() * of_group;
    tile = tiles + lane.group() * of_group;
    other = tile + of_block;
    label_slots = reinterpret_cast<unsigned char*>(tiles + 2 * of_block);
  }
  // Called before load, with the voxels that it will load.
  __device__ __forceinline__ void expect(const Volume& v, const T* rows, const Labels& labels, const Lane& lane,
                                         int64_t at) const {
    if constexpr (kAhead) {
      bring(v, rows, lane, at, other);
      if (labels.whole()) labels.expect(at < v.voxels ? at : 0, label_slots);
    }
  }
  // Afterwards the logits are there for all lanes that share voxels. next: the voxels to bring next; -1: none. True:
  // all labels are classes.
  __device__ __forceinline__ bool load(const Volume& v, const T* rows, const Labels& row, const Lane& lane, int64_t at,
                                       int64_t next, int (&labels)[kSplitVoxels], A (&of_target)[kSplitVoxels],
                                       bool& bad) {
    bool all_known = false;
    if constexpr (kAhead) {
      T* const filled = other;
      other = tile;
      tile = filled;
      wait_for_copies();
      synchronise(lane);  // the others' copies are there, and nobody uses the other tile any more
      all_known = take_split_labels(v, row, label_slots, at, labels, bad);
      if (next >= 0) expect(v, rows, row, lane, next);
    } else {
      bring(v, rows, lane, at, tile);
      all_known = load_split_labels(v, row, at, labels, bad);
      wait_for_copies();
      synchronise(lane);
    }
    take_targets<kTargets>(labels, of_target, [&](int label, int k) {
      return lane.has_label(label) ? own_classes(k, lane) + (label - lane.first_class) : none;
    });
    return all_known;
  }
  // After take, where no gradient is put back and stored: the tile may be filled again.
  __device__ __forceinline__ void release(const Lane& lane) const {
    if constexpr (!kAhead) synchronise(lane);
  }
  __device__ __forceinline__ void take(const Lane& lane, Logits<T, kSplitVoxels> (&logits)[kClasses]) const {
    const T* of_voxel[kSplitVoxels];
#pragma unroll
    for (int k = 0; k < kSplitVoxels; ++k) of_voxel[k] = own_classes(k, lane);
#pragma unroll
    for (int j = 0; j < kClasses; j += kUnit) load_unit(of_voxel, j, lane.template has<kClasses>(j), &logits[j]);
  }
  __device__ __forceinline__ void put(const Packed<T, kSplitVoxels> (&gradient)[kClasses], int k,
                                      const Lane& lane) const {
    T* const own = own_classes(k, lane);
#pragma unroll
    for (int j = 0; j < kClasses; j += kUnit) {
      Packed<T, kUnit> unit;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) unit.values[i] = gradient[j + i].values[k];
      if (lane.template has<kClasses>(j)) store_shared(own + Lane::offset_of(j), unit);
    }
  }
  // After put, which does not know the labels: writes their gradients over those of put.
  __device__ __forceinline__ void put_targets(const T (&gradient)[kSplitVoxels], const int (&labels)[kSplitVoxels],
                                              const Lane& lane) const {
    asm volatile("" : : : "memory");  // words of another type have been written there
#pragma unroll
    for (int k = 0; k < kSplitVoxels; ++k) {
      if (lane.has_label(labels[k])) own_classes(k, lane)[labels[k] - lane.first_class] = gradient[k];
    }
  }
  __device__ __forceinline__ void store(const Volume& v, const GradientView& out, int64_t sample, const Lane& lane,
                                        int64_t at) const {
    synchronise(lane);
    T* const to = static_cast<T*>(out.data) + opaque(static_cast<int>(sample)) * out.sample_stride;
    const int64_t address = address_of_tile(to, lane, at);
    for_each_piece_of_thread(v, lane, at, [&](unsigned offset, int place) {
      store_packed(reinterpret_cast<T*>(address + offset), load_packed<T, kPiece>(tile + place));
    });
  }

 private:
  // The first voxel of the tile that holds the lane's voxels from `at` on.
  __device__ __forceinline__ int64_t first_of_tile(const Lane& lane, int64_t at) const {
    return at - lane.slot * kSplitVoxels;
  }
  // One number. Each piece adds its offset to it.
  __device__ __forceinline__ int64_t address_of_tile(const T* rows, const Lane& lane, int64_t at) const {
    return recomputed(reinterpret_cast<int64_t>(rows + first_of_tile(lane, at) * classes));
  }
  __device__ __forceinline__ void bring(const Volume& v, const T* rows, const Lane& lane, int64_t at, T* to) const {
    const int64_t address = address_of_tile(rows, lane, at);
    for_each_piece_of_thread(v, lane, at, [&](unsigned offset, int place) {
      begin_copy<16, false>(to + place, reinterpret_cast<const T*>(address + offset));
    });
  }
  // Calls f(offset, place) for the pieces that a thread brings. offset: in bytes, from the tile's beginning in the
  // volume. place: in shared memory.
  template <typename F>
  __device__ __forceinline__ void for_each_piece_of_thread(const Volume& v, const Lane& lane, int64_t at, F&& f) const {
    const int64_t left = v.voxels - first_of_tile(lane, at);
    const int most = lane.slots * kSplitVoxels, inside = left < most ? static_cast<int>(left) : most;
    const int total = static_cast<int>(static_cast<unsigned>(inside) / kPiece) * classes;
    const int threads = kWarp << lane.shape.log_warps;
    const int thread = opaque(static_cast<int>(threadIdx.x)) & (threads - 1);
    // The row, by a multiplication: all numbers are small. Where a row has an odd number of pieces there is no gap
    // between two rows.
    const RowOfTile row(classes, sizeof(T));
    const unsigned inverse = row.stride > row.pieces ? (1u << 20) / static_cast<unsigned>(row.pieces) + 1 : 0u;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int i = thread + j * threads;
      const unsigned of_row = static_cast<unsigned>(i) * inverse >> 20;
      if (i < total) f(static_cast<unsigned>(i) * 16, (i + static_cast<int>(of_row)) * kPiece);
    }
  }
  // The logits of classes j and after, one unit, from the place where the lane's own classes of each voxel begin; -inf
  // where there are none.
  static __device__ __forceinline__ void load_unit(const T* const (&of_voxel)[kSplitVoxels], int j, bool there,
                                                   Logits<T, kSplitVoxels>* of_class) {
    T none[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) none[i] = static_cast<T>(-INFINITY);
    if constexpr (Logits<T, kSplitVoxels>::kPairs) {  // as words, for numbers of 16 bits are moved more than once
      uint32_t words[kSplitVoxels], nothing = 0;
      memcpy(&nothing, none, sizeof none);
#pragma unroll
      for (int k = 0; k < kSplitVoxels; ++k) {
        words[k] = nothing;
        if (there) words[k] = *reinterpret_cast<const Word<sizeof none>*>(of_voxel[k] + Lane::offset_of(j));
      }
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
#pragma unroll
        for (int k = 0; k < kSplitVoxels; k += 2) {
          of_class[i].elements[k / 2] = halves_of_pairs(words[k], words[k + 1], i == 1);
        }
      }
    } else {
      T values[kUnit][kSplitVoxels];
#pragma unroll
      for (int k = 0; k < kSplitVoxels; ++k) {
        Packed<T, kUnit> unit;
        memcpy(unit.values, none, sizeof none);
        if (there) unit = load_packed<T, kUnit>(of_voxel[k] + Lane::offset_of(j));
#pragma unroll
        for (int i = 0; i < kUnit; ++i) values[i][k] = unit.values[i];
      }
#pragma unroll
      for (int i = 0; i < kUnit; ++i) of_class[i] = logits_of(values[i]);
    }
  }
  // Where the lane's classes of its voxel k begin: one number. ptxas adds the offsets of the classes as constants.
  __device__ __forceinline__ T* own_classes(int k, const Lane& lane) const {
    const RowOfTile row(classes, sizeof(T));
    const int of_row = row.packs == 1 ? 0 : lane.slot & 1, number = lane.slot >> (row.packs - 1);
    return tile + recomputed(number * row.stride * kPiece + (of_row * kSplitVoxels + k) * classes + lane.first_class);
  }
  // The lanes of all warps that share voxels.
  __device__ __forceinline__ void synchronise(const Lane& lane) const {
    if (lane.shape.log_warps == 0) {
      __syncwarp();
    } else {
      synchronise_warps(1 + lane.group(), kWarp << lane.shape.log_warps);
    }
  }
};

// kTurns: see with_interleaved_classes.
template <int kClasses, int kTurns>
using LaneFor = std::conditional_t<(kTurns > 0), TileLane<kUnitOf<kClasses>, (kTurns > 0 ? kTurns : 1)>, SplitLane>;

// kKeepsTargets: where a pack is brought ahead, and contiguous.
template <typename T, int kClasses, int kTurns, bool kAhead, bool kKeepsTargets = false>
using PackOf = std::conditional_t<(kTurns > 0), PackInTile<T, kClasses, (kTurns > 0 ? kTurns : 1), kTileAhead<T>>,
                                  PackInRegisters<T, kClasses, kAhead, kKeepsTargets>>;

}  // namespace cuda
}  // namespace tversky_kernels
