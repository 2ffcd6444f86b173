// Faults in words: block, thread, and what each side waits at.
#include <algorithm>
#include <cstring>

#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

std::string hex(unsigned value) {
  static const char digits[] = "0123456789abcdef";
  std::string text = "0x";
  for (int shift = 28; shift >= 0; shift -= 4) text += digits[(value >> shift) & 15u];
  return text;
}

bool expects(const Thread& waiting, const Thread& other) {
  const Meeting& meeting = *waiting.meeting;
  if (&waiting == &other || other.meeting == &meeting) return false;
  if (&meeting == scheduler.grid_barrier) return true;
  if (&meeting == waiting.block->barrier) return other.block == waiting.block;
  return other.warp == waiting.warp && ((meeting.mask >> other.lane) & 1u) != 0;
}

}  // namespace

std::string describe(const uint3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string describe(const Thread& thread) {
  return "thread " + describe(thread.index) + " of block " + describe(thread.block->index);
}

std::string describe(const Site& site) {
  const char* slash = strrchr(site.file, '/');
  return std::string(" (") + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

std::string describe_wait(const Thread& thread) {
  if (thread.state == State::finished) return describe(thread) + " has exited";
  if (thread.meeting == nullptr) return describe(thread) + " spins";
  const Meeting& meeting = *thread.meeting;
  return describe(thread) + " waits at " + meeting.name +
         (meeting.mask != 0 ? " of lanes " + hex(meeting.mask) : "") + describe(meeting.site);
}

// In the natural order of threads, whatever the order of turns was.
std::string describe_deadlock() {
  std::vector<Thread*> threads = scheduler.turns;
  auto place = [](const Thread* thread) {
    const uint3 &b = thread->block->index, &t = thread->index;
    return std::make_tuple(b.z, b.y, b.x, t.z, t.y, t.x);
  };
  std::sort(threads.begin(), threads.end(), [&](auto* a, auto* b) { return place(a) < place(b); });
  for (const Thread* waiting : threads) {
    if (waiting->state != State::waiting) continue;
    const Thread* first = nullptr;
    int missing = 0;
    for (const Thread* other : threads) {
      if (!expects(*waiting, *other)) continue;
      if (first == nullptr) first = other;
      ++missing;
    }
    if (first == nullptr) continue;
    return "divergent barrier: " + describe_wait(*waiting) + ", but " + describe_wait(*first) + " (" +
           std::to_string(missing) + " of " + std::to_string(waiting->meeting->expected) + " never came)";
  }
  return "deadlock";
}

std::string describe_spin() {
  std::string text = "no thread advances";
  for (const Thread* thread : scheduler.turns) {
    if (thread->state != State::ready) continue;
    text += ": " + describe_wait(*thread);
    break;
  }
  for (const Thread* thread : scheduler.turns) {
    if (thread->state != State::waiting) continue;
    text += ", " + describe_wait(*thread);
    break;
  }
  if (!scheduler.shape.cooperative) text += " (the blocks of a plain launch run one after another)";
  return text;
}

void raise_fault(const std::string& message) {
  if (scheduler.fault.empty()) scheduler.fault = message;
  throw Abort{};
}

}  // namespace cuda_on_cpu
