// native_tests [--list | name...]: runs the named tests, or all that must pass.
#include <cstdio>
#include <cstring>

#include "check.h"

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#endif

#if defined(UNDER_TSAN) && defined(__linux__)
#include <sys/personality.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// ThreadSanitizer's run time dies of "unexpected memory mapping" where addresses are randomised by more bits
// than it knows. This comes before it starts: once more, without randomisation, if the system allows that.
__attribute__((no_sanitize("thread"))) void without_randomisation(int, char** argv, char** envp) {
  const long persona = syscall(SYS_personality, 0xffffffff);
  if (persona < 0 || (persona & ADDR_NO_RANDOMIZE) != 0) return;
  if (syscall(SYS_personality, persona | ADDR_NO_RANDOMIZE) < 0) return;
  syscall(SYS_execve, "/proc/self/exe", argv, envp);
}

using Initializer = void (*)(int, char**, char**);
__attribute__((section(".preinit_array"), used)) Initializer before_everything = without_randomisation;

}  // namespace
#endif

namespace {

bool named(const check::Test& test, int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], test.name) == 0) return true;
  }
  return argc == 1 && !test.planted;
}

}  // namespace

PLANTED(failing_check) { CHECK(1 + 1 == 3); }

int main(int argc, char** argv) {
  const bool list = argc == 2 && std::strcmp(argv[1], "--list") == 0;
  int ran = 0;
  for (const check::Test& test : check::tests()) {
    if (list) std::printf("%s%s\n", test.planted ? "planted " : "", test.name);
    if (list || !named(test, argc, argv)) continue;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    test.run();
    ++ran;
  }
  if (list) return 0;
  std::printf("%d tests, %d failures\n", ran, check::failures);
  return check::failures == 0 && ran > 0 ? 0 : 1;
}
