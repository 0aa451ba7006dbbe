// Runs CUDA kernels on the CPU, thread by thread, so that tests can check them without a GPU.
//
// Included before kd_loss.cu by a C++ compiler. A block's threads are fibers; each runs until it
// reaches a barrier or a warp exchange, then the next one runs. So every index, ragged edge,
// reduction and reuse of shared memory is the kernel's own. What it cannot show: the GPU's own
// rounding (its exp2 is approximate), memory order between real threads, and speed.
//
// `salt_fiber_order` turns the order of the threads round: where a barrier is missing, the two
// orders give two results.

#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another
#define SALT_LAUNCH(kernel, grid, block, stream, ...) \
  cuda_on_cpu::launch(grid, block, [&] { (kernel)(__VA_ARGS__); })

struct Index {
  unsigned x;
};
static Index blockIdx, blockDim, threadIdx;

typedef int cudaError_t;
static inline int cudaGetLastError() { return 0; }
struct cudaFuncAttributes {};
template <class Kernel>
static int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return 0;
}
static inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }

namespace cuda_on_cpu {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kWarpSize = 32;

// A fiber starts with ucontext and goes on with _longjmp: swapcontext asks the system for the
// signals at every switch, and a block switches thousands of times. It serves block after block.
struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::vector<char> stack;
  bool started, finished;
};

static std::deque<Fiber> fibers;  // they stay where they are
static ucontext_t unused;         // where a new fiber would say what it came from
static jmp_buf scheduler;
static std::function<void()> body;
static std::vector<float> exchanged[2];  // two, so that one barrier per exchange is enough
static std::vector<unsigned> exchanges;  // by thread
static bool backwards = false;

static void barrier() {
  if (!_setjmp(fibers[threadIdx.x].here)) _longjmp(scheduler, 1);
}

static void run_fiber() {
  for (;;) {
    body();
    fibers[threadIdx.x].finished = true;
    barrier();
  }
}

static void add_fiber() {
  fibers.emplace_back();
  Fiber& fiber = fibers.back();
  fiber.stack.resize(kStack);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  fiber.started = false;
}

// Until its next barrier, or its end.
static void run(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  swapcontext(&unused, &fiber.start);
}

static void run_block(unsigned num_threads) {
  while (fibers.size() < num_threads) add_fiber();
  for (unsigned i = 0; i < num_threads; ++i) fibers[i].finished = false;
  for (auto& values : exchanged) values.assign(num_threads, 0.0f);
  exchanges.assign(num_threads, 0);
  for (unsigned running = num_threads; running;) {
    unsigned stopped = 0;
    for (unsigned n = 0; n < num_threads; ++n) {
      threadIdx.x = backwards ? num_threads - 1 - n : n;
      Fiber& fiber = fibers[threadIdx.x];
      if (fiber.finished) continue;
      run(fiber);
      stopped += fiber.finished;
    }
    running -= stopped;
  }
}

static void launch(unsigned grid, unsigned block, std::function<void()> kernel) {
  body = kernel;
  blockDim.x = block;
  for (unsigned b = 0; b < grid; ++b) {
    blockIdx.x = b;
    run_block(block);
  }
}

}  // namespace cuda_on_cpu

static inline void __syncthreads() { cuda_on_cpu::barrier(); }

static inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  using namespace cuda_on_cpu;
  std::vector<float>& values = exchanged[exchanges[threadIdx.x]++ % 2];
  values[threadIdx.x] = value;
  barrier();
  const unsigned lane = threadIdx.x % kWarpSize;
  return values[threadIdx.x - lane + (lane ^ unsigned(lane_mask))];
}

// A fiber is not interrupted.
static inline void atomicOr(uint32_t* target, uint32_t bits) { *target |= bits; }
static inline void atomicMax(int* target, int value) { *target = value > *target ? value : *target; }

extern "C" void salt_fiber_order(int backwards) { cuda_on_cpu::backwards = backwards != 0; }
