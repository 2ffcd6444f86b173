// The native tests' few words. TEST runs in every build and must pass; PLANTED runs only when named, and is
// there to be reported by a sanitizer.
#pragma once

#include <cstdio>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
  bool planted;
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int failures = 0;

struct Registration {
  Registration(const char* name, void (*run)(), bool planted) { tests().push_back({name, run, planted}); }
};

inline void report(bool held, const char* text, const char* file, int line) {
  if (held) return;
  ++failures;
  std::printf("%s:%d: CHECK(%s) failed\n", file, line, text);
}

template <class A, class B>
void report_equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == static_cast<A>(b)) return;
  ++failures;
  std::printf("%s:%d: CHECK_EQUAL(%s) failed: got %.9g, expected %.9g\n", file, line, text,
              static_cast<double>(a), static_cast<double>(b));
}

}  // namespace check

#define CHECK_REGISTER(name, planted)                                              \
  static void test_##name();                                                       \
  static const check::Registration registered_##name(#name, test_##name, planted); \
  static void test_##name()
#define TEST(name) CHECK_REGISTER(name, false)
#define PLANTED(name) CHECK_REGISTER(name, true)
#define CHECK(...) check::report((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
#define CHECK_EQUAL(a, b) check::report_equal((a), (b), #a ", " #b, __FILE__, __LINE__)
