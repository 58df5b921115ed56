// The family "channels": every channel by itself, with any target. Sigmoid and none; eight voxels a thread.
#include "coefficients.cuh"
#include "counting.cuh"
#include "dispatch.h"
#include "families.h"
#include "own_targets.cuh"

namespace tversky_kernels {
namespace cuda {
namespace {

// Voxels that a thread takes at once, and blocks of a multiprocessor.
template <typename T>
constexpr int kChannelVoxels = sizeof(T) == 8 ? 4 : 8;
template <typename T>
constexpr int kChannelBlocks = sizeof(T) == 8 ? 2 : 3;

// Channels by themselves, with any target: a block takes one channel, its threads kVoxels voxels at once.
template <typename T, Activation kActivation>
__global__ void __launch_bounds__(Plan::kThreads, kChannelBlocks<T>)
    channel_count_pass_kernel(const Volume v, Compute<T>* __restrict__ partial, unsigned* finished,
                              const Blocks blocks) {
  using A = Compute<T>;
  constexpr int kVoxels = kChannelVoxels<T>, kPacks = kVoxels / kPack<T>;
  const int classes = static_cast<int>(v.classes), columns = v.count_columns();
  begin_count(finished);
  const ChannelShare of_channel = channel_share_of_block<Order::kBackward>(v, blocks);
  const Share share = of_channel.share;
  const int64_t channel = of_channel.channel;
  const T* row =
      static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride + channel * v.logits.class_stride;
  GeneralSums<A> sums;
  bool bad = false, outside = false;  // outside: evaluated once at the end; earlier, ptxas spills a register
  const bool plain = has_plain_channels(v);
  for_each_own<Order::kBackward, kVoxels>(share, [&](int64_t at) {
    Logits<T, kPack<T>> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = load_logits<T, kPack<T>>(row + at + i * kPack<T>);
    const auto z = [&](int k) { return packs[k / kPack<T>].at(k % kPack<T>); };
    A g[kVoxels], weights[kVoxels];
    int labels[kVoxels];
    const bool all_count = load_channel(v, share.sample, channel, at, g, labels, weights, bad);
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) outside |= labels[k] != kUncounted && is_outside(g[k]);
    if constexpr (kMayBePlain<kActivation, A>) {
      if (plain && all_count && are_plain(z, g, v.focal_gamma != 0)) {
        add_plain_channel(v, z, g, sums);
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < kVoxels; ++k) {
      if (labels[k] == kUncounted) continue;
      sums.template add_channel<kActivation>(v, z(k), g[k], weights[k]);
    }
  });
  bad |= outside && v.checks_targets;
  A values[kAllCounts] = {sums.tp, sums.fp, sums.fn, sums.ce, sums.smoothing, sums.voxels};
  A* out = partial + (share.sample * blocks.programs + share.program) * columns * classes + channel;
  block_sums(values, bad, [&](int i, A total) {
    if (i < columns) out[i * classes] = total;
  });
}

// Channels by themselves, with any target: a block takes one channel, its threads kVoxels voxels at once.
template <typename T, Activation kActivation, bool kCrossEntropy>
__global__ void __launch_bounds__(Plan::kThreads, kCrossEntropy ? 2 : kChannelBlocks<T>)
    channel_gradient_pass_kernel(const Volume v, const GradientArguments a, const Blocks blocks) {
  using A = Compute<T>;
  constexpr int kVoxels = kChannelVoxels<T>, kPacks = kVoxels / kPack<T>;
  const ChannelShare of_channel = channel_share_of_block<Order::kForward>(v, blocks);
  const Share share = of_channel.share;
  const int64_t channel = of_channel.channel;
  const T* row =
      static_cast<const T*>(v.logits.data) + share.sample * v.logits.sample_stride + channel * v.logits.class_stride;
  T* out = static_cast<T*>(a.out.data) + share.sample * a.out.sample_stride + channel * a.out.class_stride;
  const Coefficients<A> u = coefficients_of<A, kCrossEntropy>(v, a, share.sample, channel);
  bool bad = false;  // the count pass has reported it, and the coefficients are NaN then
  for_each_own<Order::kForward, kVoxels>(share, [&](int64_t at) {
    Logits<T, kPack<T>> packs[kPacks];
    Packed<T, kPack<T>> slopes[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = load_logits<T, kPack<T>>(row + at + i * kPack<T>);
    const auto z = [&](int k) { return packs[k / kPack<T>].at(k % kPack<T>); };
    const auto store = [&](int k, A dz) { slopes[k / kPack<T>].values[k % kPack<T>] = static_cast<T>(dz); };
    A g[kVoxels], weights[kVoxels];
    int labels[kVoxels];
    const bool all_count = load_channel(v, share.sample, channel, at, g, labels, weights, bad);
    bool done = false;
    if constexpr (kMayBePlain<kActivation, A>) {
      // Asked here: to hold the answer from before the loop takes one register too many.
      done = all_count && has_plain_channels(v) && are_plain(z, g, kCrossEntropy && v.focal_gamma != 0);
      if (done) plain_channel_gradient<kCrossEntropy>(v, u, z, g, store);
    }
    if (!done) {
#pragma unroll
      for (int k = 0; k < kVoxels; ++k) {
        const A slope = channel_gradient<kActivation, kCrossEntropy>(v, u, z(k), g[k]);
        store(k, labels[k] == kUncounted ? A(0) : slope * weights[k]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) store_packed(out + at + i * kPack<T>, slopes[i]);
  });
}

// Calls f(type, activation).
template <typename F>
void with_channels(const Volume& v, F&& f) {
  with_type_and_activation(v, [&](auto element, auto activation) {
    if constexpr (decltype(activation)::value != Activation::kSoftmax) f(element, activation);
  });
}

template <typename T>
bool plan_of(const Volume& v, Plan& plan) {
  plan.lanes = plan.warps = 1;
  plan.voxels = kChannelVoxels<T>;
  plan.shared_bytes = Plan::kThreads / kWarp * kAllCounts * sizeof(Compute<T>);
  const bool every_channel_decides = v.dense && v.has_ignore_index;  // whether a voxel counts
  return v.activation != Activation::kSoftmax && !every_channel_decides && can_be_read(v, sizeof(T), plan.voxels);
}

bool plan_channels(const Volume& v, const GradientView*, Plan& plan) {
  bool takes = false;
  with_logits_type(v.logits.type, [&](auto element) { takes = plan_of<decltype(element)>(v, plan); });
  return takes;
}

int blocks_channels(const Volume& v, const Plan&, bool gradient, int64_t) {
  return gradient ? gradient_blocks(v) : 6;
}

void count_channels(const CountLaunch& launch) {
  with_channels(launch.v, [&](auto element, auto activation) {
    using T = decltype(element);
    launch.template run<T>(channel_count_pass_kernel<T, decltype(activation)::value>);
  });
}

void gradient_channels(const GradientLaunch& launch) {
  with_channels(launch.v, [&](auto element, auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    with_bool(launch.v.cross_entropy != CrossEntropy::kNone, [&](auto has_cross_entropy) {
      // Without an activation there is no cross-entropy.
      constexpr bool kCrossEntropy = decltype(has_cross_entropy)::value && kActivation != Activation::kNone;
      launch.run(channel_gradient_pass_kernel<decltype(element), kActivation, kCrossEntropy>);
    });
  });
}

}  // namespace

const Family kChannels{"channels", true, plan_channels, blocks_channels, count_channels, gradient_channels};

}  // namespace cuda
}  // namespace tversky_kernels
