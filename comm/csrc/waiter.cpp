#include "waiter.hpp"

#include <immintrin.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <utility>

namespace phalanx {
namespace {

constexpr int64_t kMicrosecond = 1000, kMillisecond = 1000 * kMicrosecond;

// A pause takes about 40 cycles. Spinning spares the 0.5 us that giving the core away takes, at each end of a wait.
constexpr int kMostSpins = 3000, kFewestSpins = 30;
// Falling asleep and being woken costs 20 to 50 us, so a core is given away for longer than that first.
constexpr int64_t kYieldNs = 200 * kMicrosecond;
// A core that comes back this late was wanted by somebody else.
constexpr int64_t kLateYieldNs = 15 * kMicrosecond;
// Bells can be missed: a rank without this library publishes without a fence. Then the first nap bounds the delay.
constexpr int64_t kFirstNapNs = kMillisecond, kLongestNapNs = 20 * kMillisecond;

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

// The kernel looks at the lower half of the word, which on x86-64 comes first. Not the private kind: the other side
// lives in another process.
long futex(const Word& word, int operation, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), operation, value, timeout, nullptr, 0);
}

}  // namespace

Waiter::Waiter(const Segment& segment, int rank, std::vector<int> pidfds, bool may_spin, Interrupted interrupted)
    : segment_(segment),
      rank_(rank),
      pidfds_(std::move(pidfds)),
      most_spins_(may_spin ? kMostSpins : kFewestSpins),
      num_spins_(most_spins_),
      interrupted_(interrupted) {}

void Waiter::raise_for(int rank, Word& word, int64_t value) {
  // Sequentially consistent, as is the sleeper's note of whom it awaits: one of the two sees what the other wrote.
  word.store(value, std::memory_order_seq_cst);
  ring_if_awaiting(rank);
}

void Waiter::raise_for_all(Word& word, int64_t value) {
  word.store(value, std::memory_order_seq_cst);
  for (int rank = 0; rank < segment_.at.size; rank++) ring_if_awaiting(rank);
}

void Waiter::ring_if_awaiting(int rank) {
  if (segment_.of_rank(rank, segment_.at.awaited).load(std::memory_order_seq_cst) != rank_ + 1) return;
  Word& bell = segment_.of_rank(rank, segment_.at.bell);
  bell.fetch_add(1, std::memory_order_seq_cst);
  futex(bell, FUTEX_WAKE, INT_MAX, nullptr);
}

Outcome Waiter::wait(const Word& word, int rank, int64_t target, Deadline& deadline) {
  auto reached = [&] { return word.load(std::memory_order_acquire) >= target; };
  for (int spin = 0; spin < num_spins_; spin++) {
    if (reached()) {
      num_spins_ = std::min(most_spins_, num_spins_ + num_spins_ / 8 + 1);
      return {};
    }
    _mm_pause();
  }
  int64_t started_ns = now_ns(), given_ns = started_ns;
  if (deadline.at_ns == 0) {
    deadline.at_ns = started_ns + int64_t(std::min(deadline.timeout_s, 1e9) * 1e9);
  }
  while (given_ns - started_ns < kYieldNs) {
    sched_yield();
    if (reached()) return {};
    int64_t back_ns = now_ns();
    // Spinning would keep the core from those who want it, among them perhaps the rank that is waited for.
    if (back_ns - given_ns > kLateYieldNs) num_spins_ = std::max(kFewestSpins, num_spins_ / 2);
    given_ns = back_ns;
  }
  return sleep(word, rank, target, deadline);
}

Outcome Waiter::sleep(const Word& word, int rank, int64_t target, Deadline& deadline) {
  Word& awaited = segment_.of_rank(rank_, segment_.at.awaited);
  Word& bell = segment_.of_rank(rank_, segment_.at.bell);
  int64_t nap_ns = kFirstNapNs;
  Outcome outcome;
  awaited.store(rank + 1, std::memory_order_seq_cst);
  for (;;) {
    uint32_t rung = uint32_t(bell.load(std::memory_order_seq_cst));
    if (word.load(std::memory_order_seq_cst) >= target) break;
    outcome = check(word, rank, target);
    if (!outcome) break;
    int64_t left_ns = deadline.at_ns - now_ns();
    if (left_ns <= 0) {
      outcome = {End::kLate, rank};
      break;
    }
    if (nap_ns == kLongestNapNs && interrupted_()) {
      outcome = {End::kInterrupted, rank};
      break;
    }
    timespec nap{0, long(std::min(nap_ns, left_ns))};
    futex(bell, FUTEX_WAIT, rung, &nap);
    nap_ns = std::min(2 * nap_ns, kLongestNapNs);
  }
  awaited.store(0, std::memory_order_seq_cst);
  return outcome;
}

Outcome Waiter::check(const Word& word, int rank, int64_t target) const {
  if (int64_t by = segment_.word(segment_.at.aborted).load(std::memory_order_acquire)) {
    return {End::kAborted, int(by) - 1};
  }
  pollfd end{pidfds_[size_t(rank)], POLLIN, 0};
  bool left = segment_.of_rank(rank, segment_.at.left).load(std::memory_order_acquire) != 0;
  bool ended = !left && poll(&end, 1, 0) > 0;
  // What it wrote before it went still counts.
  if ((left || ended) && word.load(std::memory_order_acquire) < target) {
    return {left ? End::kLeft : End::kEnded, rank};
  }
  return {};
}

}  // namespace phalanx
