#include "scheduler.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>

#include "cuda_runtime_api.h"
#include "sanitizer.h"

uint3 threadIdx{}, blockIdx{};
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

Scheduler scheduler;

namespace {

using Threads = std::vector<std::unique_ptr<Thread>>;

// Passes over the resident threads in which no barrier, exit or changing atomic happened.
constexpr int patience = 100'000;

uint3 unflatten(size_t i, const dim3& extent) {
  const size_t plane = size_t{extent.x} * extent.y;
  return {static_cast<unsigned>(i % extent.x), static_cast<unsigned>(i % plane / extent.x),
          static_cast<unsigned>(i / plane)};
}

size_t volume(const dim3& extent) { return size_t{extent.x} * extent.y * extent.z; }

void run_kernel() {
  std::string thrown;
  try {
    scheduler.body(scheduler.context);
  } catch (const Abort&) {
  } catch (const std::exception& error) {
    thrown = std::string("exception in a kernel: ") + error.what();
  } catch (...) {
    thrown = "exception in a kernel";
  }
  if (!thrown.empty() && scheduler.fault.empty()) scheduler.fault = thrown;
}

// Holds nothing that would need destruction: finish() leaves this stack for good.
void thread_main() {
  Thread& self = *scheduler.current;
  self.fiber.entered();
  tsan_acquire(&scheduler.start_token);
  run_kernel();
  thread_exits(self);
  tsan_release(&scheduler.end_token);
  self.fiber.finish();
}

bool runnable(const Thread& thread) {
  return thread.state == State::ready || (thread.state == State::waiting && thread.meeting->complete);
}

void run_thread(Thread& thread) {
  scheduler.current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  if (!thread.started) {
    thread.started = true;
    thread.fiber.start(thread_main);
  }
  thread.fiber.resume();
  scheduler.current = nullptr;
}

// Until all resident threads have finished or the launch has failed.
void run_resident() {
  int stalled = 0;
  for (bool first = true; scheduler.live > 0; first = false) {
    arrange(scheduler.turns, first);
    scheduler.advanced = false;
    bool ran = false;
    for (Thread* thread : scheduler.turns) {
      if (!runnable(*thread)) continue;
      run_thread(*thread);
      ran = true;
      if (!scheduler.fault.empty()) return;
    }
    stalled = scheduler.advanced ? 0 : stalled + 1;
    if (!ran) scheduler.fault = describe_deadlock();
    if (stalled > patience) scheduler.fault = describe_spin();
    if (!scheduler.fault.empty()) return;
  }
}

// Lets every stack that is in use throw its way out, so that destructors run and no shadow state stays.
void unwind() {
  for (Thread* thread : scheduler.turns) {
    if (thread->started && thread->state != State::finished) run_thread(*thread);
    thread->fiber.forget_history();
  }
  tsan_acquire(&scheduler.end_token);
  for (Block& block : scheduler.blocks) {
    free(block.shared);
    block.shared = nullptr;
  }
  recycle_all_meetings();
}

bool prepare_block(Block& block, size_t number, Threads& threads, size_t first) {
  const size_t size = volume(scheduler.shape.block);
  block.index = unflatten(number, scheduler.shape.grid);
  block.size = block.live = static_cast<int>(size);
  block.barrier = nullptr;
  block.static_shared = false;
  block.warps.assign((size + 31) / 32, Warp());
  // Exactly as large as asked for, so that a step past its end is a step past a heap block.
  if (posix_memalign(&block.shared, 128, scheduler.shape.shared_bytes) != 0) return false;
  memset(block.shared, 0xff, scheduler.shape.shared_bytes);
  for (size_t i = 0; i < size; ++i) {
    if (threads.size() <= first + i) threads.push_back(std::make_unique<Thread>());
    Thread& thread = *threads[first + i];
    if (!thread.fiber.allocate()) return false;
    thread.state = State::ready;
    thread.started = false;
    thread.meeting = nullptr;
    thread.block = &block;
    thread.warp = &block.warps[i / 32];
    thread.index = unflatten(i, scheduler.shape.block);
    thread.lane = static_cast<unsigned>(i % 32);
    thread.warp->present |= 1u << thread.lane;
    scheduler.turns.push_back(&thread);
  }
  scheduler.live += block.live;
  return true;
}

// The race detector gets two sets of threads in turn: what two neighbouring blocks do is not ordered either.
Threads& thread_set(unsigned batch) {
  static Threads* sets = new Threads[2];  // never destroyed: a launch may still come from a late destructor
  return sets[tsan ? batch % 2 : 0];
}

// The blocks numbered by `order[begin, end)`, together.
int run_batch(const std::vector<uint32_t>& order, size_t begin, size_t end) {
  Threads& threads = thread_set(++scheduler.batch);
  scheduler.turns.clear();
  scheduler.live = 0;
  scheduler.blocks.resize(end - begin);
  const size_t size = volume(scheduler.shape.block);
  for (size_t i = begin; i < end; ++i) {
    if (!prepare_block(scheduler.blocks[i - begin], order[i], threads, (i - begin) * size)) {
      for (Block& block : scheduler.blocks) {
        free(block.shared);
        block.shared = nullptr;
      }
      return cudaErrorMemoryAllocation;
    }
  }
  tsan_release(&scheduler.start_token);
  run_resident();
  if (scheduler.fault.empty()) return cudaSuccess;
  unwind();
  return cudaErrorLaunchFailure;
}

int run_grid() {
  blockDim = scheduler.shape.block;
  gridDim = scheduler.shape.grid;
  scheduler.fault.clear();
  scheduler.grid_barrier = nullptr;
  const std::vector<uint32_t> order = block_order(volume(scheduler.shape.grid));
  const size_t together = scheduler.shape.cooperative ? order.size() : 1;
  int error = cudaSuccess;
  for (size_t i = 0; i < order.size() && error == cudaSuccess; i += together) {
    error = run_batch(order, i, i + together);
  }
  tsan_acquire(&scheduler.end_token);
  return error;
}

int check_shape(const LaunchShape& shape, const void* kernel) {
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  const size_t threads = volume(shape.block);
  if (threads == 0 || threads > 1024 || shape.block.z > 64) return cudaErrorInvalidConfiguration;
  const dim3& grid = shape.grid;
  if (volume(grid) == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (volume(grid) > 0xffffffffu) return cudaErrorNotSupported;
  if (shape.shared_bytes > dynamic_shared_limit(kernel)) return cudaErrorInvalidValue;
  const Device& on = device();
  const auto resident =
      static_cast<size_t>(on.multiprocessors) * static_cast<size_t>(on.blocks_per_multiprocessor);
  if (shape.cooperative && volume(grid) > resident) return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

}  // namespace

int launch(const LaunchShape& shape, const void* kernel, void (*body)(void*), void* context) {
  static std::mutex mutex;
  thread_local bool launching = false;
  if (launching) return cudaErrorNotSupported;
  const int refused = check_shape(shape, kernel);
  if (refused != cudaSuccess) return refused;
  const std::lock_guard<std::mutex> lock(mutex);
  launching = true;
  scheduler.shape = shape;
  scheduler.body = body;
  scheduler.context = context;
  const int error = run_grid();
  if (error == cudaErrorLaunchFailure) keep_fault(scheduler.fault);
  launching = false;
  return error;
}

}  // namespace cuda_on_cpu
