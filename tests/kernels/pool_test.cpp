// The pool on its own: `test_pool.py` builds this with the thread sanitizer and without, and runs each case by its name.
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "pool.hpp"

using phalanx::parallel_for;
using phalanx::Pool;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::_Exit(1);
}

// Plain memory: of two threads at one index, or of one that is not waited for, the sanitizer tells.
bool each_index_once(int count) {
  std::vector<int> times(size_t(count), 0);
  parallel_for(count, [&](int index) { times[size_t(index)]++; });
  for (int each : times) {
    if (each != 1) return false;
  }
  return true;
}

void every_index() {
  for (int num_threads : {1, 2, 3, 8, 2, 1, 5}) {
    Pool::instance().resize(num_threads);
    require(Pool::instance().size() == num_threads, "the size is what was asked for");
    for (int count : {0, 1, 2, 7, 64, 1000}) {
      for (int round = 0; round < 20; round++) require(each_index_once(count), "each index is worked on once");
    }
  }
}

void several_threads() {
  Pool::instance().resize(2);
  std::atomic<int> arrived{0};
  // Nobody leaves before both are there: one thread alone would never come out.
  parallel_for(2, [&](int) {
    arrived++;
    while (arrived < 2) std::this_thread::yield();
  });
}

void nested() {
  Pool::instance().resize(3);
  std::atomic<int> sum{0};
  parallel_for(10, [&](int) { parallel_for(10, [&](int inner) { sum += inner; }); });
  require(sum == 450, "work within work is done");
}

void two_callers() {
  Pool::instance().resize(2);
  auto call = [] {
    for (int round = 0; round < 500; round++) require(each_index_once(50), "each index is worked on once");
  };
  std::thread other(call);
  call();
  other.join();
}

void resized_meanwhile() {
  std::atomic<bool> stop{false};
  std::thread other([&] {
    for (int size = 1; !stop; size = size % 4 + 1) Pool::instance().resize(size);
  });
  for (int round = 0; round < 300; round++) require(each_index_once(20), "each index is worked on once");
  stop = true;
  other.join();
}

void after_fork() {
  Pool::instance().resize(3);
  require(each_index_once(100), "each index is worked on once");
  const pid_t child = fork();
  if (child == 0) {
    several_threads();
    require(each_index_once(100), "each index is worked on once in a child");
    std::_Exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  require(status == 0, "a child has threads of its own");
  require(each_index_once(100), "the parent keeps its threads");
}

double cpu_s() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return double(time.tv_sec) + double(time.tv_nsec) * 1e-9;
}

void idle() {
  Pool::instance().resize(4);
  require(each_index_once(100), "each index is worked on once");
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const double before_s = cpu_s();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  require(cpu_s() - before_s < 0.03, "idle threads take no processor time to speak of");
  require(each_index_once(100), "sleeping threads wake");
}

// Work comes after every kind of pause: while the others spin, as they fall asleep, when they sleep.
void after_pauses() {
  Pool::instance().resize(3);
  for (int round = 0; round < 300; round++) {
    require(each_index_once(30), "each index is worked on once");
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(round % 100);
    while (std::chrono::steady_clock::now() < until) continue;
  }
}

struct Case {
  const char* name;
  void (*run)();
};
constexpr Case kCases[] = {
    {"every_index", every_index}, {"several_threads", several_threads},     {"nested", nested},
    {"two_callers", two_callers}, {"resized_meanwhile", resized_meanwhile}, {"after_fork", after_fork},
    {"idle", idle},               {"after_pauses", after_pauses},
};

}  // namespace

int main(int, char** arguments) {
  for (const Case& each : kCases) {
    if (std::strcmp(each.name, arguments[1]) == 0) {
      each.run();
      return 0;
    }
  }
  std::fprintf(stderr, "no case %s\n", arguments[1]);
  return 2;
}
