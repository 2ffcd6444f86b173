// The state of the one launch that may run at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../cuda_on_cpu.h"
#include "cuda_on_cpu/core.h"
#include "fiber.h"

namespace cuda_on_cpu {

struct Block;
struct Warp;

// A meeting of threads at a barrier or collective. Each meeting is a new one, and so is its token for the
// race detector: a thread already past it can't lend its later writes to one that is still leaving.
struct Meeting {
  Meeting* next_free;
  Meeting* next;  // of all that were ever made
  const char* name;
  Site site;
  unsigned mask;
  int expected, arrived, left;
  int votes;
  bool complete;
  bool ordered;  // accesses before it happen before those after it
  void* token;
  uint64_t payload[32 * max_payload / 8];
};

enum class State { idle, ready, waiting, finished };

struct Thread {
  Fiber fiber;
  State state = State::idle;
  bool started = false;
  Meeting* meeting = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 index{};
  unsigned lane = 0;
};

struct Warp {
  unsigned present = 0;  // lanes that exist
  unsigned exited = 0;
  Meeting* open[32];  // no container: its moves would look like accesses of the kernel
  int open_count = 0;
};

struct Block {
  uint3 index{};
  void* shared = nullptr;
  Thread* threads = nullptr;
  int size = 0, live = 0;
  Meeting* barrier = nullptr;
  bool static_shared = false;
  char exit_token = 0;
  std::vector<Warp> warps;
};

// Unwinds a fiber's kernel once the launch has failed.
struct Abort {};

struct Scheduler {
  LaunchShape shape{};
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::vector<Block> blocks;   // resident at once: one, or the whole grid
  std::vector<Thread*> turns;  // resident threads, in the order of their turns
  Thread* current = nullptr;
  Meeting* grid_barrier = nullptr;
  std::string fault;
  int live = 0;
  bool advanced = false;  // some thread got anywhere in this pass
  unsigned batch = 0;     // counts sets of resident blocks
  char start_token = 0, end_token = 0, fence_token = 0;
  char static_tokens[2] = {};  // of the batches before and now, in turn
};

extern Scheduler scheduler;

// meetings.cpp
void thread_exits(Thread& thread);
void recycle_all_meetings();

// order.cpp
void arrange(std::vector<Thread*>& turns, bool first_pass);
std::vector<uint32_t> block_order(size_t count);

// diagnose.cpp
std::string describe(const uint3& index);
std::string describe(const Thread& thread);
std::string describe(const Site& site);  // with a space before it
std::string describe_wait(const Thread& thread);
std::string describe_deadlock();
std::string describe_spin();
// From a fiber: fails the launch and unwinds the kernel.
[[noreturn]] void raise_fault(const std::string& message);

// runtime.cpp
size_t dynamic_shared_limit(const void* kernel);
void keep_fault(const std::string& message);

}  // namespace cuda_on_cpu
