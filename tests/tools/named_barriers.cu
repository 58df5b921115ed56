// A small program whose answer is known, for tests/racecheck.py: warps that share voxels tell each other something at a
// barrier of their own, turn after turn, and at last the whole block does at one of all threads, as in the count pass.
//
//   named_barriers FORM TURNS   FORM: a number of enum class Form; TURNS: even, or uneven (0 of the first warps, 1 of
//                               the next ones, and so on)
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/platform.h"

namespace tversky_kernels {
namespace cuda {
namespace {

constexpr int kThreads = 256, kTurns = 4;  // where they are even

// How the warps' own barrier is written; the last one has no barrier of the block, which is a race.
enum class Form { kOurs, kWholeWarps, kConstant, kWholeBlock, kNoBarrierOfBlock };

#if defined(TK_CUDA_ON_HOST)
#define TK_BARRIER(number) emulation::barrier(__LINE__, number, 2 * kWarp)
#else
#define TK_BARRIER(number) asm volatile("bar.sync " #number ", 64;" : : : "memory")
#endif

__device__ __forceinline__ void synchronise_whole_warps(int number, int threads) {
#if defined(TK_CUDA_ON_HOST)
  emulation::barrier(__LINE__, number, threads);
#else
  asm volatile("bar.sync %0, %1;" : : "r"(number), "r"(threads) : "memory");
#endif
}

template <Form kForm>
__device__ __forceinline__ void synchronise(int group, int threads) {
  if constexpr (kForm == Form::kWholeBlock) {
    __syncthreads();
  } else if constexpr (kForm == Form::kWholeWarps) {
    synchronise_whole_warps(1 + group, threads);
  } else if constexpr (kForm == Form::kConstant) {
    if (group == 0) TK_BARRIER(1);
    if (group == 1) TK_BARRIER(2);
    if (group == 2) TK_BARRIER(3);
    if (group == 3) TK_BARRIER(4);
  } else {
    synchronise_warps(1 + group, threads);
  }
}

__host__ __device__ __forceinline__ int turns_of(int group, bool uneven) {
  return uneven ? group : kTurns;
}

// log_warps is not a constant, so that the barriers take their numbers from registers, as ours do.
template <Form kForm>
__global__ void exchange_kernel(int log_warps, bool uneven, int* out) {
  TK_SHARED(memory);
  int* const values = reinterpret_cast<int*>(memory);
  const int thread = static_cast<int>(threadIdx.x), group = thread / kWarp >> log_warps;
  int x = thread;
  for (int turn = 0; turn < turns_of(group, uneven); ++turn) {
    values[thread] = x;
    synchronise<kForm>(group, kWarp << log_warps);
    x = values[thread ^ kWarp] + 1;
    synchronise<kForm>(group, kWarp << log_warps);
  }
  values[thread] = x;
  if constexpr (kForm != Form::kNoBarrierOfBlock) __syncthreads();
  out[thread] = values[kThreads - 1 - thread];
}

template <Form kForm>
std::vector<int> exchanged(bool uneven) {
  std::vector<int> result(kThreads);
  int* out = result.data();
#if !defined(TK_CUDA_ON_HOST)
  if (cudaMalloc(&out, kThreads * sizeof(int)) != cudaSuccess) return {};
#endif
  TK_LAUNCH((exchange_kernel<kForm>), dim3(1), dim3(kThreads), kThreads * sizeof(int), nullptr, 1, uneven, out);
#if !defined(TK_CUDA_ON_HOST)
  if (cudaMemcpy(result.data(), out, kThreads * sizeof(int), cudaMemcpyDeviceToHost) != cudaSuccess) return {};
#endif
  return result;
}

std::vector<int> exchanged(Form form, bool uneven) {
  switch (form) {
    case Form::kOurs: return exchanged<Form::kOurs>(uneven);
    case Form::kWholeWarps: return exchanged<Form::kWholeWarps>(uneven);
    case Form::kConstant: return exchanged<Form::kConstant>(uneven);
    case Form::kWholeBlock: return exchanged<Form::kWholeBlock>(uneven);
    case Form::kNoBarrierOfBlock: return exchanged<Form::kNoBarrierOfBlock>(uneven);
  }
  return {};
}

bool is_right(const std::vector<int>& result, bool uneven) {
  if (result.size() != kThreads) return false;
  for (int i = 0; i < kThreads; ++i) {
    const int from = kThreads - 1 - i, turns = turns_of(from / (2 * kWarp), uneven);
    if (result[i] != (turns % 2 == 0 ? from : from ^ kWarp) + turns) return false;
  }
  return true;
}

}  // namespace
}  // namespace cuda
}  // namespace tversky_kernels

int main(int count, char** arguments) {
  using namespace tversky_kernels::cuda;
  if (count != 3) return std::fprintf(stderr, "named_barriers FORM even|uneven\n"), 2;
  const auto form = static_cast<Form>(std::atoi(arguments[1]));
  const bool uneven = std::strcmp(arguments[2], "uneven") == 0;
  try {
    const bool right = is_right(exchanged(form, uneven), uneven);
    std::puts(right ? "right" : "wrong");
    return right ? 0 : 1;
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
}
