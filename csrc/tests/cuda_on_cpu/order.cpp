// The permutation in which threads and blocks take their turns.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

Schedule from_environment() {
  Schedule schedule;
  const char* text = getenv("CUDA_ON_CPU_ORDER");
  if (text == nullptr) return schedule;
  if (strcmp(text, "reverse") == 0) schedule.order = Order::reverse;
  if (strncmp(text, "random", 6) != 0) return schedule;
  schedule.order = Order::random;
  if (text[6] == ':') schedule.seed = strtoull(text + 7, nullptr, 10);
  return schedule;
}

// splitmix64
uint64_t draw() {
  uint64_t z = (schedule().seed += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

template <class T>
void permute(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[draw() % i]);
}

}  // namespace

Schedule& schedule() {
  static Schedule value = from_environment();
  return value;
}

void arrange(std::vector<Thread*>& turns, bool first_pass) {
  if (schedule().order == Order::random) permute(turns);
  if (schedule().order == Order::reverse && first_pass) std::reverse(turns.begin(), turns.end());
}

std::vector<uint32_t> block_order(size_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule().order == Order::reverse) std::reverse(order.begin(), order.end());
  if (schedule().order == Order::random) permute(order);
  return order;
}

}  // namespace cuda_on_cpu
