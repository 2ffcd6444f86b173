// Barriers, warp collectives and what else a kernel calls on its fiber. The race detector takes each fiber
// for a thread, so nothing here may go through an intercepted function such as memcpy on shared state.
#include <bit>
#include <cstdlib>
#include <cstring>

#include "sanitizer.h"
#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

Meeting* all_meetings = nullptr;
Meeting* free_meetings = nullptr;

Meeting* new_meeting(const char* name, Site site, unsigned mask, int expected, bool ordered) {
  Meeting* meeting = free_meetings;
  if (meeting != nullptr) {
    free_meetings = meeting->next_free;
  } else {
    meeting = static_cast<Meeting*>(malloc(sizeof(Meeting)));
    meeting->next = all_meetings;
    meeting->token = nullptr;
    all_meetings = meeting;
  }
  meeting->name = name;
  meeting->site = site;
  meeting->mask = mask;
  meeting->expected = expected;
  meeting->arrived = meeting->left = meeting->votes = 0;
  meeting->complete = false;
  meeting->ordered = ordered;
  // Freed memory forgets its clock; a reused token would order threads that have nothing to do with it.
  if (tsan && ordered) meeting->token = malloc(1);
  return meeting;
}

void recycle(Meeting& meeting) {
  free(meeting.token);
  meeting.token = nullptr;
  meeting.next_free = free_meetings;
  free_meetings = &meeting;
}

bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }

void suspend(Thread& self) {
  self.fiber.suspend();
  if (!scheduler.fault.empty()) throw Abort{};
}

// True for the thread that completes the meeting; the others wait.
bool arrive(Meeting& meeting) {
  scheduler.advanced = true;
  if (meeting.ordered) tsan_release(meeting.token);
  return ++meeting.arrived == meeting.expected;
}

void wait(Thread& self, Meeting& meeting) {
  self.meeting = &meeting;
  self.state = State::waiting;
  suspend(self);
  self.meeting = nullptr;
  self.state = State::ready;
}

void leave(Meeting& meeting) {
  if (meeting.ordered) tsan_acquire(meeting.token);
  if (++meeting.left == meeting.arrived) recycle(meeting);
}

// Of the whole block or grid; `slot` holds the meeting while threads are missing.
int meet_all(Meeting*& slot, const char* name, int expected, bool predicate, Site site) {
  Thread& self = *scheduler.current;
  if (slot == nullptr) slot = new_meeting(name, site, 0, expected, true);
  Meeting& meeting = *slot;
  if (!same(meeting.name, name) || meeting.site.line != site.line || !same(meeting.site.file, site.file)) {
    Meeting other = {};
    other.name = name;
    other.site = site;
    self.meeting = &other;
    const std::string own = describe_wait(self);
    self.meeting = nullptr;
    for (Thread* thread : scheduler.turns) {
      if (thread->meeting != &meeting) continue;
      raise_fault("divergent barrier: " + describe_wait(*thread) + ", but " + own);
    }
  }
  if (predicate) ++meeting.votes;
  if (arrive(meeting)) {
    meeting.complete = true;
    slot = nullptr;
  } else {
    wait(self, meeting);
  }
  const int votes = meeting.votes;
  leave(meeting);
  return votes;
}

void close(Warp& warp, Meeting& meeting) {
  meeting.complete = true;
  for (int i = 0; i < warp.open_count; ++i) {
    if (warp.open[i] == &meeting) warp.open[i] = warp.open[--warp.open_count];
  }
}

Meeting& find_or_open(Warp& warp, const char* name, unsigned mask, bool ordered, Site site) {
  for (int i = 0; i < warp.open_count; ++i) {
    if (warp.open[i]->mask == mask && same(warp.open[i]->name, name)) return *warp.open[i];
  }
  const int expected = std::popcount(mask & warp.present & ~warp.exited);
  return *(warp.open[warp.open_count++] = new_meeting(name, site, mask, expected, ordered));
}

std::string who(const char* name, const Thread& self, Site site) {
  Meeting meeting = {};
  meeting.name = name;
  meeting.site = site;
  Thread shown;
  shown.block = self.block;
  shown.index = self.index;
  shown.meeting = &meeting;
  shown.state = State::waiting;
  return describe_wait(shown);
}

// CUDA leaves a lane's value undefined if the mask names it and it is not there.
void check_mask(const char* name, unsigned mask, bool values, const Thread& self, Site site) {
  if (((mask >> self.lane) & 1u) == 0) {
    raise_fault("bad mask: " + who(name, self, site) + " with a mask that does not name its own lane " +
                std::to_string(self.lane));
  }
  const unsigned missing = mask & ~self.warp->present;
  if (values && missing != 0) {
    raise_fault("bad mask: " + who(name, self, site) + " with a mask that names lane " +
                std::to_string(std::countr_zero(missing)) + ", which does not exist: the block has " +
                std::to_string(self.block->size) + " threads");
  }
  const unsigned gone = mask & self.warp->exited;
  if (values && gone != 0) {
    raise_fault("bad mask: " + who(name, self, site) + " with a mask that names lane " +
                std::to_string(std::countr_zero(gone)) + ", which has exited");
  }
}

}  // namespace

int sync_block(const char* name, bool predicate, Site site) {
  Block& block = *scheduler.current->block;
  return meet_all(block.barrier, name, block.size, predicate, site);
}

void sync_grid(Site site) {
  if (!scheduler.shape.cooperative) raise_fault("grid sync in a launch that is not cooperative");
  int threads = 0;
  for (const Block& block : scheduler.blocks) threads += block.size;
  meet_all(scheduler.grid_barrier, "grid sync", threads, false, site);
}

void sync_warp(unsigned mask, Site site) {
  Thread& self = *scheduler.current;
  check_mask("__syncwarp", mask, false, self, site);
  Meeting& meeting = find_or_open(*self.warp, "__syncwarp", mask, true, site);
  if (arrive(meeting)) {
    close(*self.warp, meeting);
  } else {
    wait(self, meeting);
  }
  leave(meeting);
}

void exchange(const char* name, unsigned mask, const void* mine, void* all, size_t bytes, Site site) {
  Thread& self = *scheduler.current;
  check_mask(name, mask, true, self, site);
  Meeting& meeting = find_or_open(*self.warp, name, mask, false, site);
  const size_t words = bytes / 8;
  // volatile: the compiler must not make a call of memcpy of these loops.
  const volatile uint64_t* from = static_cast<const uint64_t*>(mine);
  volatile uint64_t* payload = meeting.payload;
  for (size_t i = 0; i < words; ++i) payload[self.lane * words + i] = from[i];
  if (arrive(meeting)) {
    close(*self.warp, meeting);
  } else {
    wait(self, meeting);
  }
  volatile uint64_t* to = static_cast<uint64_t*>(all);
  for (size_t i = 0; i < 32 * words; ++i) to[i] = payload[i];
  leave(meeting);
}

void thread_exits(Thread& self) {
  Warp& warp = *self.warp;
  Block& block = *self.block;
  self.state = State::finished;
  scheduler.advanced = true;
  --scheduler.live;
  warp.exited |= 1u << self.lane;
  // __syncwarp waits for the lanes that have not exited. The others' wait is over, and reported, as a
  // deadlock.
  for (int i = warp.open_count - 1; i >= 0; --i) {
    Meeting& meeting = *warp.open[i];
    if (!meeting.ordered) continue;
    meeting.expected = std::popcount(meeting.mask & warp.present & ~warp.exited);
    if (meeting.arrived == meeting.expected) close(warp, meeting);
  }
  if (block.static_shared) tsan_release(&scheduler.static_tokens[scheduler.batch % 2]);
  tsan_release(&block.exit_token);
  if (--block.live > 0 || !scheduler.fault.empty()) return;
  tsan_acquire(&block.exit_token);
  free(block.shared);
  block.shared = nullptr;
}

void recycle_all_meetings() {
  free_meetings = nullptr;
  for (Meeting* meeting = all_meetings; meeting != nullptr; meeting = meeting->next) recycle(*meeting);
}

void* dynamic_shared_memory() { return scheduler.current->block->shared; }

void note_static_shared(Site site) {
  Thread& self = *scheduler.current;
  if (scheduler.blocks.size() > 1) {
    raise_fault("static __shared__ (" + std::string(site.file) + ":" + std::to_string(site.line) +
                ") in a cooperative launch of several blocks: take it from dynamic_shared");
  }
  self.block->static_shared = true;
  tsan_acquire(&scheduler.static_tokens[(scheduler.batch + 1) % 2]);
}

void expect_global(const char* name, const void* address, Site site) {
  const Block& block = *scheduler.current->block;
  const size_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(block.shared);
  if (block.shared == nullptr || offset >= scheduler.shape.shared_bytes) return;
  raise_fault("bad address: " + describe(*scheduler.current) + " gives shared memory to " + name +
              describe(site) + ", which takes global memory alone");
}

unsigned lane() { return scheduler.current->lane; }

unsigned live_lanes() { return scheduler.current->warp->present & ~scheduler.current->warp->exited; }

void yield(bool progress) {
  if (progress) scheduler.advanced = true;
  suspend(*scheduler.current);
}

void fence() {
  tsan_acquire(&scheduler.fence_token);
  tsan_release(&scheduler.fence_token);
  yield(false);
}

void fail(const char* message) { raise_fault(message); }

}  // namespace cuda_on_cpu
