// Relaxed atomics, as CUDA's are, and fences. A race detector sees them as atomics.
// Each lets other threads run, so that loops waiting on another thread end, and order dependence shows.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "cuda_on_cpu/core.h"

namespace cuda_on_cpu {

template <class T>
using Bits =
    std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

// Floating-point and integer alike: the loop compares bits, so NaN ends it.
template <class T, class Operation>
T atomic_update(T* address, Operation operation) {
  auto* bits = reinterpret_cast<Bits<T>*>(address);
  Bits<T> old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  Bits<T> next;
  do {
    next = std::bit_cast<Bits<T>>(operation(std::bit_cast<T>(old)));
  } while (!__atomic_compare_exchange_n(bits, &old, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  yield(old != next);
  return std::bit_cast<T>(old);
}

// Keeps a template's second argument from taking part in deduction.
template <class T>
using Value = std::type_identity_t<T>;

}  // namespace cuda_on_cpu

template <class T>
T atomicAdd(T* address, cuda_on_cpu::Value<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* address, cuda_on_cpu::Value<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMax(T* address, cuda_on_cpu::Value<T> value) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMax of floating-point values");
  return cuda_on_cpu::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, cuda_on_cpu::Value<T> value) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMin of floating-point values");
  return cuda_on_cpu::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* address, cuda_on_cpu::Value<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, cuda_on_cpu::Value<T> compare, cuda_on_cpu::Value<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T old) { return old == compare ? value : old; });
}
template <class T>
T atomicAnd(T* address, cuda_on_cpu::Value<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T old) { return old & value; });
}
template <class T>
T atomicOr(T* address, cuda_on_cpu::Value<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T old) { return old | value; });
}
template <class T>
T atomicXor(T* address, cuda_on_cpu::Value<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T old) { return old ^ value; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return cuda_on_cpu::atomic_update(address, [=](unsigned old) { return old >= limit ? 0u : old + 1u; });
}
inline unsigned atomicDec(unsigned* address, unsigned limit) {
  return cuda_on_cpu::atomic_update(address,
                                    [=](unsigned old) { return old == 0 || old > limit ? limit : old - 1u; });
}

inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_block() { cuda_on_cpu::fence(); }
inline void __threadfence_system() { cuda_on_cpu::fence(); }
inline void __nanosleep(unsigned) { cuda_on_cpu::yield(false); }
[[noreturn]] inline void __trap() { cuda_on_cpu::fail("__trap"); }
