// The permutation in which threads and blocks take their turns.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

struct Setting {
  Order order = Order::forward;
  uint64_t state = 0;

  Setting() {
    const char* text = getenv("CUDA_ON_CPU_ORDER");
    if (text == nullptr) return;
    if (strcmp(text, "reverse") == 0) order = Order::reverse;
    if (strncmp(text, "random", 6) != 0) return;
    order = Order::random;
    if (text[6] == ':') state = strtoull(text + 7, nullptr, 10);
  }
};

Setting& setting() {
  static Setting value;
  return value;
}

// splitmix64
uint64_t draw() {
  uint64_t z = (setting().state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

template <class T>
void permute(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[draw() % i]);
}

}  // namespace

void set_order(Order order, uint64_t seed) {
  setting().order = order;
  setting().state = seed;
}

void arrange(std::vector<Thread*>& turns, bool first_pass) {
  if (setting().order == Order::random) permute(turns);
  if (setting().order == Order::reverse && first_pass) std::reverse(turns.begin(), turns.end());
}

std::vector<uint32_t> block_order(size_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (setting().order == Order::reverse) std::reverse(order.begin(), order.end());
  if (setting().order == Order::random) permute(order);
  return order;
}

}  // namespace cuda_on_cpu
