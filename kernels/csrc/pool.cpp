#include "pool.hpp"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <thread>
#include <vector>

namespace phalanx {
namespace {

// Being woken takes 20 to 50 us, and the operators of a step follow each other faster than that.
constexpr int64_t kSpinNs = 50'000;
constexpr int kPausesBetweenLooks = 16;  // at the clock

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

// Whether `reached` became true while spinning.
template <class Reached>
bool spin(Reached&& reached) {
  const int64_t until_ns = now_ns() + kSpinNs;
  do {
    for (int pause = 0; pause < kPausesBetweenLooks; pause++) {
      if (reached()) return true;
      _mm_pause();
    }
  } while (now_ns() < until_ns);
  return false;
}

void futex_wait(const void* word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void futex_wake(const void* word, int count) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

}  // namespace

// The threads beside the caller. A piece of work is open from its announcement until the caller finds nothing left of
// it; who comes later than that, because he slept, has missed it and is not waited for.
class Team {
 public:
  explicit Team(int num_threads) {
    // Signals are for the threads of Python.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (int i = 0; i < num_threads; i++) threads_.emplace_back([this] { serve(); });
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      dismiss();
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  ~Team() { dismiss(); }

  void run(int count, void (*work)(void*, int), void* context) {
    work_ = work;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    announce(kOpen);
    take_part();
    const uint64_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    await_finished(uint32_t((state & ~kOpen) >> kJoinedShift));
  }

 private:
  // Of a state: the generation below, on which threads sleep; above, how many have joined it, and whether one may still.
  static constexpr int kJoinedShift = 32;
  static constexpr uint64_t kJoined = uint64_t(1) << kJoinedShift, kOpen = uint64_t(1) << 63;
  static uint32_t generation(uint64_t state) { return uint32_t(state); }

  std::vector<std::thread> threads_;
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int count_ = 0;
  std::atomic<bool> dismissed_{false};
  alignas(64) std::atomic<uint64_t> state_{0};
  std::atomic<int> num_asleep_{0};
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<uint32_t> finished_{0};
  std::atomic<bool> awaited_{false};

  // A new generation, which the threads see with all that was written before.
  void announce(uint64_t flags) {
    const uint32_t next = generation(state_.load(std::memory_order_relaxed)) + 1;
    // Sequentially consistent, as is a sleeper's count of itself: one of the two sees what the other wrote.
    state_.store(next | flags, std::memory_order_seq_cst);
    if (num_asleep_.load(std::memory_order_seq_cst) > 0) futex_wake(&state_, INT_MAX);
  }

  void dismiss() {
    dismissed_.store(true, std::memory_order_relaxed);
    announce(0);
    for (std::thread& thread : threads_) thread.join();
  }

  void take_part() {
    for (int index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) work_(context_, index);
  }

  void serve() {
    pthread_setname_np(pthread_self(), "phalanx-pool");
    uint32_t seen = 0;
    for (;;) {
      uint64_t state = state_.load(std::memory_order_acquire);
      if (generation(state) == seen) {
        await_other_than(seen);
      } else if (!(state & kOpen)) {
        if (dismissed_.load(std::memory_order_relaxed)) return;
        seen = generation(state);
      } else if (state_.compare_exchange_weak(state, state + kJoined, std::memory_order_acq_rel)) {
        seen = generation(state);
        take_part();
        finished_.fetch_add(1, std::memory_order_seq_cst);
        if (awaited_.load(std::memory_order_seq_cst)) futex_wake(&finished_, 1);
      }
    }
  }

  void await_other_than(uint32_t seen) {
    auto other = [&] { return generation(state_.load(std::memory_order_acquire)) != seen; };
    if (spin(other)) return;
    num_asleep_.fetch_add(1, std::memory_order_seq_cst);
    while (!other()) futex_wait(&state_, seen);
    num_asleep_.fetch_sub(1, std::memory_order_relaxed);
  }

  void await_finished(uint32_t joined) {
    if (spin([&] { return finished_.load(std::memory_order_acquire) == joined; })) return;
    awaited_.store(true, std::memory_order_seq_cst);
    for (uint32_t finished; (finished = finished_.load(std::memory_order_seq_cst)) != joined;) {
      futex_wait(&finished_, finished);
    }
    awaited_.store(false, std::memory_order_relaxed);
  }
};

namespace {

// Holds the pool; to be asked whether it was free.
class Turn {
 public:
  explicit Turn(std::atomic<bool>& busy) : busy_(busy), free_(!busy.exchange(true, std::memory_order_acquire)) {}
  ~Turn() {
    if (free_) busy_.store(false, std::memory_order_release);
  }
  explicit operator bool() const { return free_; }

 private:
  std::atomic<bool>& busy_;
  const bool free_;
};

}  // namespace

Pool::Pool() { pthread_atfork(nullptr, nullptr, &Pool::forget); }

Pool& Pool::instance() {
  static Pool* const pool = new Pool;  // never destroyed: its threads may work until the process ends
  return *pool;
}

void Pool::forget() {
  Pool& pool = instance();
  static_cast<void>(pool.team_.release());  // a child has none of its parent's threads
  pool.busy_.store(false, std::memory_order_relaxed);
}

void Pool::resize(int num_threads) {
  for (;;) {
    if (Turn turn{busy_}) {
      if (num_threads == size()) return;
      team_.reset();
      size_.store(std::max(num_threads, 1), std::memory_order_relaxed);
      return;
    }
    sched_yield();
  }
}

void Pool::run(int count, void (*work)(void*, int), void* context) {
  if (count > 1 && size() > 1) {
    if (Turn turn{busy_}) {
      if (!team_) team_ = std::make_unique<Team>(size() - 1);
      team_->run(count, work, context);
      return;
    }
  }
  for (int index = 0; index < count; index++) work(context, index);
}

}  // namespace phalanx
