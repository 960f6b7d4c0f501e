// When operators were called and what they had to do, of a thread that is watched.
#pragma once
#include <time.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace phalanx {

/// What a call does. sizes: as many as say something, then zeros. num_bytes, num_flops: the least to be read and
/// written, and to be calculated. weight: the address of the matrix that it multiplies by, or 0.
struct Work {
  const char* name;
  std::array<size_t, 3> sizes{};
  double num_bytes = 0, num_flops = 0;
  uintptr_t weight = 0;
};

/// Seconds on the monotonic clock, which is Python's `time.perf_counter` too.
inline double now_s() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

/// The calls of one thread between `begin` and `end`.
class CallWatch {
 public:
  struct Call {
    Work work;
    double started_s, ended_s;
  };

  void add(const Work& work, double started_s, double ended_s) { calls_.push_back({work, started_s, ended_s}); }
  /// Those since the last time.
  std::vector<Call> take() { return std::exchange(calls_, {}); }

  /// That this thread's calls are told to, or null.
  static CallWatch*& current() {
    thread_local CallWatch* watch = nullptr;
    return watch;
  }

 private:
  std::vector<Call> calls_;
};

/// call(), told to the watch of this thread, if there is one, with the Work that work() gives.
template <class W, class F>
void watched(const W& work, const F& call) {
  CallWatch* const watch = CallWatch::current();
  if (watch == nullptr) return call();
  const double started_s = now_s();
  call();
  watch->add(work(), started_s, now_s());
}

}  // namespace phalanx
