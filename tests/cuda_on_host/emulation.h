// Runs CUDA kernels on the host, to find what a compiler cannot: the threads of a block are fibers, the blocks run one
// after the other.
//
// Found at run time, as exceptions that name block and thread: a barrier that not all threads reach, or in different
// places; a warp operation whose lanes disagree about the mask or that some lane never reaches; a lane outside its own
// mask. Shared memory is allocated anew for every block, exactly as large as was asked for and filled with NaN, so that
// use before a store gives NaN and AddressSanitizer sees the bounds. TK_EMULATION_SEED=n runs the threads in a random
// order between barriers, and lets some warps run far ahead of others, n the seed: results must not depend on it.
// TK_EMULATION_RACES=1 also finds, in compiled code (ptx.cpp), two accesses to shared memory of which one is a store
// and which no barrier orders, whether or not it did any harm in this order of the threads.
//
// Not modelled: the memory model, the accuracy of device intrinsics, and time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "shared memory comes from TK_SHARED")

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 << 10;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// Where a fiber, or who runs it, goes on.
struct Context {
  ucontext_t first;  // the fiber's beginning
  jmp_buf place;
  bool has_begun = false;
};

// swapcontext would ask the system for the signals' mask at every turn, which takes longer than most turns;
// AddressSanitizer knows of no other way.
inline void go_on(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.first, &to.first);
#else
  if (_setjmp(from.place) != 0) return;
  from.has_begun = true;
  if (to.has_begun) _longjmp(to.place, 1);
  setcontext(&to.first);
#endif
}

struct Thread {
  Context* context = nullptr;
  unsigned index = 0;
  State state = State::kReady;
  std::vector<Copy> copies;  // begun and not waited for
  int line = 0;              // of the barrier
  int barrier = 0;           // its number, and how many threads it is for
  size_t expected = 0;
  unsigned mask = 0;        // of the warp operation
  unsigned operations = 0;  // warp operations so far: lanes that meet must have the same number
  bool orders = false;      // the warp operation is a barrier of memory, too
  unsigned delay = 0;       // rounds for which it does not run although it could
};

// Which accesses to shared memory come before which, by the barriers alone: every thread knows up to which time it has
// been ordered after each other one. A time passes with every barrier of a thread.
class Races {
 public:
  Races(size_t threads, size_t bytes)
      : threads_(threads), known_(threads * threads), words_((bytes + kWordBytes - 1) / kWordBytes) {
    for (size_t i = 0; i < threads; ++i) known_[i * threads + i] = 1;
  }
  // Of a thread; what it does there, and another one did without a barrier between them, or "".
  std::string access(unsigned thread, size_t at, size_t bytes, bool stores) {
    const Access mine{thread, known_[thread * threads_ + thread]};
    for (size_t i = at / kWordBytes; i <= (at + bytes - 1) / kWordBytes; ++i) {
      Word& word = words_[i];
      if (!comes_before(word.store, thread)) return told(stores ? "writes" : "reads", "writes", at, word.store.thread);
      if (!stores) {
        const auto same = [&](const Access& a) { return a.thread == thread; };
        const auto found = std::find_if(word.loads.begin(), word.loads.end(), same);
        found == word.loads.end() ? word.loads.push_back(mine) : void(*found = mine);
        continue;
      }
      for (const Access& load : word.loads) {
        if (!comes_before(load, thread)) return told("writes", "reads", at, load.thread);
      }
      word.loads.clear();
      word.store = mine;
    }
    return "";
  }
  void barrier(const std::vector<unsigned>& of) {
    std::vector<uint32_t> all(threads_);
    for (const unsigned thread : of) {
      for (size_t i = 0; i < threads_; ++i) all[i] = std::max(all[i], known_[thread * threads_ + i]);
    }
    for (const unsigned thread : of) {
      std::copy(all.begin(), all.end(), known_.begin() + static_cast<std::ptrdiff_t>(thread * threads_));
      ++known_[thread * threads_ + thread];
    }
  }

 private:
  struct Access {
    unsigned thread = 0;
    uint32_t time = 0;
  };
  struct Word {
    Access store;
    std::vector<Access> loads;  // since then, the last one of each thread
  };
  static constexpr size_t kWordBytes = 2;  // as the smallest numbers that different threads have side by side

  bool comes_before(const Access& a, unsigned thread) const {
    return a.thread == thread || known_[thread * threads_ + a.thread] >= a.time;
  }
  static std::string told(const char* mine, const char* others, size_t at, unsigned other) {
    return std::string("a race: it ") + mine + " byte " + std::to_string(at) + " of shared memory, which thread " +
           std::to_string(other) + " " + others + ", and no barrier is between";
  }

  size_t threads_;
  std::vector<uint32_t> known_;  // [thread][of thread]
  std::vector<Word> words_;
};

struct Block {
  dim3 index, grid, size;
  std::unique_ptr<Races> races;  // null: they are not looked for
  std::vector<Thread> threads;
  std::vector<uint64_t> exchanged;  // [warp][parity][lane]
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes = 0;
  std::string error;
  const std::function<void()>* kernel = nullptr;
  Context scheduler;
};

inline Block*& current_block() {
  static thread_local Block* block = nullptr;
  return block;
}
inline Thread*& current_thread() {
  static thread_local Thread* thread = nullptr;
  return thread;
}

[[noreturn]] inline void fail(const Block& block, const Thread& thread, const std::string& what) {
  throw std::runtime_error("CUDA on the host: block " + std::to_string(block.index.x) + ", thread " +
                           std::to_string(thread.index) + ": " + what);
}

inline void wait_as(State state) {
  Thread* self = current_thread();
  self->state = state;
  go_on(*self->context, current_block()->scheduler);
}

// A fiber runs one thread after another.
inline void run_threads() {
  for (;;) {
    try {
      (*current_block()->kernel)();
    } catch (const std::exception& error) {
      std::string& first = current_block()->error;
      if (first.empty()) first = error.what();
    }
    wait_as(State::kDone);
  }
}

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};

  Fiber() {
    getcontext(&context.first);
    context.first.uc_stack.ss_sp = stack.get();
    context.first.uc_stack.ss_size = kStackBytes;
    context.first.uc_link = nullptr;
    makecontext(&context.first, run_threads, 0);
  }
};

// Those of the threads of a block, kept for the next one.
inline std::vector<std::unique_ptr<Fiber>>& fibers() {
  static thread_local std::vector<std::unique_ptr<Fiber>> all;
  return all;
}
inline Context& context_of(unsigned thread) {
  while (fibers().size() <= thread) fibers().push_back(std::make_unique<Fiber>());
  return fibers()[thread]->context;
}

// Of all threads, or one with a number for some warps.
inline void barrier(int line, int number = 0, size_t threads = 0) {
  Thread* self = current_thread();
  self->line = line;
  self->barrier = number;
  self->expected = threads > 0 ? threads : current_block()->threads.size();
  wait_as(State::kAtBarrier);
}

// Where TK_EMULATION_RACES is set: an access to shared memory.
inline void look_for_races(const void* at, size_t bytes, bool stores) {
  const Block& block = *current_block();
  if (block.races == nullptr) return;
  const auto from = static_cast<size_t>(static_cast<const unsigned char*>(at) - block.shared.get());
  const std::string found = block.races->access(current_thread()->index, from, bytes, stores);
  if (!found.empty()) fail(block, *current_thread(), found);
}

// What is copied is there when it is waited for, and not before.
inline void begin_copy(void* to, const void* from, size_t bytes) {
  current_thread()->copies.push_back({to, from, bytes});
}
inline void wait_for_copies() {
  for (const Copy& copy : current_thread()->copies) {
    look_for_races(copy.to, copy.bytes, true);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  current_thread()->copies.clear();
}

// Every lane of the mask gives a value and gets the one of lane `source`.
template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "at most eight bytes are exchanged");
  Block& block = *current_block();
  Thread& self = *current_thread();
  const unsigned lane = self.index % kWarpSize;
  if ((mask >> lane & 1) == 0) fail(block, self, "it is not in the mask of its own warp operation");
  uint64_t* slots = &block.exchanged[(self.index / kWarpSize * 2 + self.operations % 2) * kWarpSize];
  std::memcpy(&slots[lane], &value, sizeof value);
  self.mask = mask;
  wait_as(State::kInWarp);
  ++self.operations;
  std::memcpy(&value, &slots[source % kWarpSize], sizeof value);
  return value;
}

// The same with work(lane, value) for all lanes of the mask.
template <typename T, typename F>
void exchange_all(unsigned mask, T value, F&& work) {
  const Block& block = *current_block();
  const Thread& self = *current_thread();
  const uint64_t* slots = &block.exchanged[(self.index / kWarpSize * 2 + self.operations % 2) * kWarpSize];
  exchange(mask, value, self.index);
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    std::memcpy(&value, &slots[lane], sizeof value);
    work(lane, value);
  }
}

// A barrier of the lanes of the mask, and of what they read and write.
inline void synchronise_warp(unsigned mask) {
  current_thread()->orders = true;
  exchange(mask, 0u, 0u);
  current_thread()->orders = false;
}

// Lets those go on who wait for nobody any more, of the warps in a random order only some. False: none could.
inline bool release(Block& block, std::mt19937* random) {
  bool any = false;
  constexpr int kBarriers = 16;
  size_t done = 0, waiting[kBarriers] = {};
  const Thread* first[kBarriers] = {};
  for (const Thread& t : block.threads) {
    done += t.state == State::kDone;
    if (t.state != State::kAtBarrier) continue;
    ++waiting[t.barrier];
    const Thread*& earlier = first[t.barrier];
    if (earlier == nullptr) earlier = &t;
    if (t.line != earlier->line || t.expected != earlier->expected) {
      fail(block, t,
           "waits at the barrier of line " + std::to_string(t.line) + ", thread " + std::to_string(earlier->index) +
               " at that of line " + std::to_string(earlier->line));
    }
  }
  for (int i = 0; i < kBarriers; ++i) {
    if (first[i] == nullptr) continue;
    if (i == 0 && done > 0 && waiting[0] + done == block.threads.size()) {
      fail(block, *first[0], "waits at a barrier that other threads have left the kernel without");
    }
    if (waiting[i] < first[i]->expected) continue;
    if (waiting[i] > first[i]->expected) fail(block, *first[i], "waits at a barrier with too many others");
    unsigned delay = 0;  // of every second warp: what it reads next, others may have overwritten by then
    std::vector<unsigned> together;
    for (Thread& t : block.threads) {
      if (t.index % kWarpSize == 0) delay = random != nullptr && (*random)() % 2 == 0 ? (*random)() % 256 : 0;
      if (t.state != State::kAtBarrier || t.barrier != i) continue;
      t.state = State::kReady;
      t.delay = delay;
      together.push_back(t.index);
    }
    if (block.races != nullptr) block.races->barrier(together);
    any = true;
  }
  std::vector<size_t> warps;
  for (size_t warp = 0; warp < block.threads.size(); warp += kWarpSize) warps.push_back(warp);
  if (random != nullptr) std::shuffle(warps.begin(), warps.end(), *random);
  for (const size_t warp : warps) {
    if (random != nullptr && any && (*random)() % 2 == 0) continue;
    const size_t lanes = std::min<size_t>(kWarpSize, block.threads.size() - warp);
    for (size_t i = 0; i < lanes; ++i) {
      const Thread& t = block.threads[warp + i];
      if (t.state != State::kInWarp) continue;
      bool complete = true;
      for (unsigned k = 0; k < kWarpSize && complete; ++k) {
        if ((t.mask >> k & 1) == 0) continue;
        if (k >= lanes) fail(block, t, "its mask names a lane that the block does not have");
        const Thread& other = block.threads[warp + k];
        if (other.state == State::kInWarp && other.mask != t.mask) fail(block, t, "lanes disagree about the mask");
        complete = other.state == State::kInWarp && other.operations == t.operations;
      }
      if (!complete) continue;
      const unsigned mask = t.mask;
      std::vector<unsigned> together;
      for (unsigned k = 0; k < lanes; ++k) {
        if ((mask >> k & 1) == 0) continue;
        block.threads[warp + k].state = State::kReady;
        together.push_back(static_cast<unsigned>(warp) + k);
      }
      if (block.races != nullptr && t.orders) block.races->barrier(together);
      any = true;
    }
  }
  return any;
}

inline void run_block(Block& block, std::mt19937* random) {
  std::vector<unsigned> order(block.threads.size());
  for (unsigned i = 0; i < order.size(); ++i) {
    order[i] = i;
    Thread& t = block.threads[i];
    t.index = i;
    t.state = State::kReady;
    t.operations = 0;
    t.delay = 0;
    t.copies.clear();
    t.context = &context_of(i);
  }
  for (;;) {
    if (random != nullptr) std::shuffle(order.begin(), order.end(), *random);
    bool ran = false;
    for (const unsigned i : order) {
      Thread& t = block.threads[i];
      if (t.state != State::kReady) continue;
      ran = true;
      if (t.delay > 0) {
        --t.delay;
        continue;
      }
      current_thread() = &t;
      go_on(block.scheduler, *t.context);
      if (!block.error.empty()) throw std::runtime_error(block.error);
    }
    const bool all_done = std::all_of(block.threads.begin(), block.threads.end(),
                                      [](const Thread& t) { return t.state == State::kDone; });
    if (all_done) return;
    if (!release(block, random) && !ran) {
      for (const Thread& t : block.threads) {
        if (t.state != State::kDone) fail(block, t, "waits for threads that never come");
      }
    }
  }
}

// As much as a block of every card since sm_80 may have; for the next launch.
inline thread_local size_t allowed_shared_bytes = 48 * 1024;
inline void allow_shared_bytes(size_t bytes) {
  if (bytes > 99 * 1024) throw std::runtime_error("CUDA on the host: more than 99 KiB of shared memory");
  allowed_shared_bytes = bytes;
}

// looks_for_races: the kernel tells of its accesses to shared memory, and orders them by the barriers of this file.
inline void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel,
                   bool looks_for_races = false) {
  const size_t threads = static_cast<size_t>(size.x) * size.y * size.z;
  if (threads == 0 || threads > 1024)
    throw std::runtime_error("CUDA on the host: a block of 1 to 1024 threads expected");
  if (shared_bytes > allowed_shared_bytes)
    throw std::runtime_error("CUDA on the host: more shared memory than allowed");
  allowed_shared_bytes = 48 * 1024;
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("CUDA on the host: grid y and z end at 65535");
  const char* seed = std::getenv("TK_EMULATION_SEED");
  Block block;
  block.grid = grid;
  block.size = size;
  block.kernel = &kernel;
  block.threads = std::vector<Thread>(threads);
  block.exchanged.resize((threads + kWarpSize - 1) / kWarpSize * 2 * kWarpSize);
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    block.index = dim3(i % grid.x, i / grid.x, 0);
    block.shared.reset(new unsigned char[shared_bytes > 0 ? shared_bytes : 1]);
    block.shared_bytes = shared_bytes;
    std::memset(block.shared.get(), 0xff, shared_bytes);
    if (looks_for_races) block.races = std::make_unique<Races>(threads, shared_bytes);
    std::mt19937 random(seed != nullptr ? std::atoi(seed) * 7919u + i : 0u);
    current_block() = &block;
    try {
      run_block(block, seed != nullptr ? &random : nullptr);
    } catch (...) {
      fibers().clear();  // they are in the middle of the kernel
      throw;
    }
  }
}

// Of the PTX in TK_EMULATION_PTX (files, with colons between them), what was compiled from the same function as this
// one here; null: that is not set. And its launch, with where the arguments lie and how large they are. See ptx.cpp.
class PtxKernel;
const PtxKernel* ptx_kernel_at(const void* function);
void launch_ptx(const PtxKernel& kernel, dim3 grid, dim3 size, size_t shared_bytes, void* const* arguments,
                const std::vector<size_t>& bytes);

template <typename... Parameters>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes,
                   std::type_identity_t<Parameters>... arguments) {
  if (const PtxKernel* compiled = ptx_kernel_at(reinterpret_cast<const void*>(kernel))) {
    void* const all[] = {&arguments...};
    launch_ptx(*compiled, grid, size, shared_bytes, all, {sizeof(arguments)...});
  } else {
    launch(grid, size, shared_bytes, [&] { kernel(arguments...); });
  }
}

// max.f16x2 and max.bf16x2: a NaN only where both are.
template <typename T>
uint32_t larger_pair(uint32_t a, uint32_t b) {
  T x[2], y[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  for (int i = 0; i < 2; ++i) {
    const float first = static_cast<float>(x[i]), second = static_cast<float>(y[i]);
    if (second > first || std::isnan(first)) x[i] = y[i];
  }
  std::memcpy(&a, x, sizeof a);
  return a;
}

}  // namespace emulation

#define threadIdx (dim3(emulation::current_thread()->index, 0, 0))
#define blockIdx (emulation::current_block()->index)
#define blockDim (emulation::current_block()->size)
#define gridDim (emulation::current_block()->grid)
#define __syncthreads() emulation::barrier(__LINE__)
inline void __syncwarp() {
  emulation::synchronise_warp(0xffffffffu);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
#define TK_SHARED(name) unsigned char* name = emulation::current_block()->shared.get()
#define TK_UNPAREN(...) __VA_ARGS__
#define TK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), emulation::launch_kernel(TK_UNPAREN kernel, grid, block, shared_bytes, __VA_ARGS__))

#define TK_LAUNCH_EARLY TK_LAUNCH

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::exchange(mask, value, (emulation::current_thread()->index % emulation::kWarpSize) ^ lanes);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::exchange(mask, value, static_cast<unsigned>(lane));
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  unsigned lanes = 0;
  emulation::exchange_all(mask, value, [&](unsigned lane, bool x) { lanes |= static_cast<unsigned>(x) << lane; });
  return lanes;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  unsigned lanes = 0;
  emulation::exchange_all(mask, value, [&](unsigned lane, T x) { lanes |= static_cast<unsigned>(x == value) << lane; });
  return lanes;
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline void __threadfence() {}
template <typename T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p += value;
  return before;
}
