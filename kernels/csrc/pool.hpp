// The threads that the operators share: a few hundred nanoseconds to start and to end a piece of work.
#pragma once
#include <atomic>
#include <memory>

namespace phalanx {

class Team;

/// Threads that work for one caller at a time, who takes part himself. They spin for a moment after each piece of work,
/// then sleep. A caller who comes while another is served, or from within a piece of work, works alone.
class Pool {
 public:
  static Pool& instance();

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  /// The caller included: 1 for none beside him, which it is at first. Waits for the piece of work under way.
  void resize(int num_threads);
  int size() const { return size_.load(std::memory_order_relaxed); }

  /// Calls work(context, index) for each index in [0, count), dealt out over the threads as they come; returns when all
  /// are done. `work` throws nothing. Throws std::system_error where no thread can be started.
  void run(int count, void (*work)(void*, int), void* context);

 private:
  Pool();
  static void forget();

  std::atomic<bool> busy_{false};
  std::atomic<int> size_{1};
  std::unique_ptr<Team> team_;  // started by the first piece of work; after a fork anew
};

/// body(int index) for each index in [0, count), over the threads of the pool.
template <class F>
void parallel_for(int count, F&& body) {
  Pool::instance().run(
      count, [](void* context, int index) { (*static_cast<F*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace phalanx
