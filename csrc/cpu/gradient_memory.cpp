// Memory for fresh gradients on the CPU. A page that the system hands out costs more than the arithmetic on it, and a C
// library asks the system for every large block anew. So the memory is touched in huge pages. Where the user asks for
// it (TVERSKY_KERNELS_KEEP_GRADIENT=1), the memory of a large gradient that dies stays here for the next step.
// Meanwhile the system may take it (MADV_FREE). The storage of such a gradient cannot be resized, so nobody gets one
// unasked.
#include "gradient_memory.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#include "../torch/volume.h"

namespace tversky_kernels {
namespace cpu {
namespace {

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)
constexpr bool kSystemCan = true;
#else
constexpr bool kSystemCan = false;
#endif

bool is_set_to(const char* variable, const char* value) {
  const char* const found = std::getenv(variable);
  return found != nullptr && std::string(found) == value;
}

// Touches fresh memory first in pages of 2 MB, where the system leaves the choice to its programs (madvise). Such a
// page costs about as much as 80 pages of 4 KB and replaces 512. They can be slow: a virtual machine may have given its
// large free blocks back to its host, or memory must be compacted first. Then the rest is left alone, and so are the
// next calls.
void touch_in_huge_pages([[maybe_unused]] char* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = int64_t{2} << 20;
  constexpr int kCallsToSkip = 64;
  constexpr auto kSlow = std::chrono::microseconds(1000);  // small pages cost about 700
  static const bool is_wanted = kSystemCan && !is_set_to("TVERSKY_KERNELS_HUGE_PAGES", "0");
  static std::atomic<int> calls_to_skip{0};
  const int64_t before_first = -reinterpret_cast<intptr_t>(data) & (kPage - 1);
  const int64_t pages = (bytes - before_first) / kPage;
  if (!is_wanted || pages < 2) return;
  const int skip = calls_to_skip.load(std::memory_order_relaxed);
  if (skip > 0) return calls_to_skip.store(skip - 1, std::memory_order_relaxed);
  std::atomic<bool> slow{false};
  torch::stable::parallel_for(0, pages, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last && !slow.load(std::memory_order_relaxed); ++i) {
      char* const page = data + before_first + i * kPage;
      const auto started = std::chrono::steady_clock::now();
      if (madvise(page, kPage, MADV_HUGEPAGE) != 0) return;
      *static_cast<volatile char*>(page) = 0;
      if (std::chrono::steady_clock::now() - started > kSlow) slow.store(true, std::memory_order_relaxed);
    }
  });
  if (slow.load()) calls_to_skip.store(kCallsToSkip, std::memory_order_relaxed);
#endif
}

struct Block {
  char* data;
  int64_t bytes;
};

void* map([[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
#else
  return nullptr;
#endif
}

void unmap([[maybe_unused]] const Block& block) {
#if defined(__linux__)
  munmap(block.data, block.bytes);
#endif
}

// Lets the system take the memory when it needs it. False where the system does not know how.
bool lend_to_system([[maybe_unused]] const Block& block) {
#if defined(__linux__) && defined(MADV_FREE)
  return madvise(block.data, block.bytes, MADV_FREE) == 0;
#else
  return false;
#endif
}

// Blocks in use and waiting ones together are never more than were once in use at the same time.
class GradientMemory {
 public:
  // Never destroyed: a gradient may die after everything else.
  static GradientMemory& instance() {
    static GradientMemory* const memory = new GradientMemory;
    return *memory;
  }

  // Null where nothing is kept or there is no memory.
  char* take(int64_t bytes) {
    Block block{nullptr, bytes};
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      if (!keeps_) return nullptr;
      auto best = waiting_.end();
      for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
        const bool fits = it->bytes >= bytes && it->bytes / 2 <= bytes;
        if (fits && (best == waiting_.end() || it->bytes < best->bytes)) best = it;
      }
      if (best != waiting_.end()) {
        block = *best;
        waiting_.erase(best);
        start_using(block);
        return block.data;
      }
      const int64_t most = std::max(most_used_, total(used_) + bytes);
      while (!waiting_.empty() && total(used_) + bytes + total(waiting_) > most) drop_oldest();
      block.data = static_cast<char*>(map(bytes));
      if (block.data == nullptr) return nullptr;
      start_using(block);
    }
    touch_in_huge_pages(block.data, bytes);
    return block.data;
  }

  void give_back(void* data) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto it = std::find_if(used_.begin(), used_.end(), [&](const Block& block) { return block.data == data; });
    const Block block = *it;
    used_.erase(it);
    if (keeps_ && lend_to_system(block)) {
      waiting_.push_back(block);
    } else {
      unmap(block);
    }
  }

  std::tuple<bool, int64_t, int64_t> state(std::optional<bool> keep) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (keep.has_value()) keeps_ = *keep && can_keep_;
    while (!keeps_ && !waiting_.empty()) drop_oldest();
    return {keeps_, total(used_), total(waiting_)};
  }

 private:
  // A process that forks while another thread is in here would leave the child a locked mutex that nobody unlocks.
  GradientMemory() {
#if defined(__linux__)
    const auto unlock = [] { instance().mutex_.unlock(); };
    pthread_atfork([] { instance().mutex_.lock(); }, unlock, unlock);
#endif
  }

  static int64_t total(const std::vector<Block>& blocks) {
    int64_t bytes = 0;
    for (const Block& block : blocks) bytes += block.bytes;
    return bytes;
  }

  void start_using(const Block& block) {
    used_.push_back(block);
    most_used_ = std::max(most_used_, total(used_));
  }

  void drop_oldest() {
    unmap(waiting_.front());
    waiting_.erase(waiting_.begin());
  }

  std::mutex mutex_;
  std::vector<Block> used_, waiting_;  // waiting: the longest first
  int64_t most_used_ = 0;
  static constexpr const char* kVariable = "TVERSKY_KERNELS_KEEP_GRADIENT";
  const bool can_keep_ = kSystemCan && !is_set_to(kVariable, "0");
  bool keeps_ = can_keep_ && is_set_to(kVariable, "1");
};

}  // namespace

Tensor new_gradient(const Tensor& logits) {
  constexpr int64_t kLeastBytes = int64_t{32} << 20;  // from which glibc keeps nothing itself
  const int64_t bytes = logits.numel() * static_cast<int64_t>(logits.element_size());
  if (bytes >= kLeastBytes && is_dense(logits)) {
    char* const data = GradientMemory::instance().take(bytes);
    if (data != nullptr) {
      return torch::stable::from_blob(data, logits.sizes(), logits.strides(), logits.device(), logits.scalar_type(),
                                      [](void* p) { GradientMemory::instance().give_back(p); });
    }
  }
  const Tensor gradient = walkable(torch::stable::empty_like(logits), 2);
  touch_in_huge_pages(static_cast<char*>(gradient.mutable_data_ptr()), bytes);
  return gradient;
}

std::tuple<bool, int64_t, int64_t> gradient_memory(std::optional<bool> keep) {
  return GradientMemory::instance().state(keep);
}

}  // namespace cpu
}  // namespace tversky_kernels
