// Calls of operators, kept to be made later, again and again, without whoever made them.
#pragma once
#include <functional>
#include <utility>
#include <vector>

#include "watch.hpp"

namespace phalanx {

/// Calls in their order, each with the addresses and sizes it was recorded with: memory that is read and written must
/// stay.
class Program {
 public:
  /// Whether the calls after it are to be made.
  using Step = std::function<bool()>;

  void add(Step step) { steps_.push_back(std::move(step)); }
  /// False where a step has ended the run.
  bool run() const {
    for (const Step& step : steps_) {
      if (!step()) return false;
    }
    return true;
  }

  /// What this thread's calls are added to instead of being made, or null.
  static Program*& recording() {
    thread_local Program* program = nullptr;
    return program;
  }

 private:
  std::vector<Step> steps_;
};

/// Makes a call, or adds it to the program that is being recorded, if one is. call: holds all that it needs. work: gives
/// what the call does, as `Work`, whenever it is made.
template <class W, class F>
void perform(W work, F call) {
  if (Program* const program = Program::recording()) {
    program->add([work = std::move(work), call = std::move(call)] {
      watched(work, call);
      return true;
    });
  } else {
    watched(work, call);
  }
}

}  // namespace phalanx
