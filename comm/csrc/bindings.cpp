// The comm room's part of `phalanx._native`. Tensors come as addresses, but for the two calls that stand between layers.
#include "bindings.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <deque>
#include <string>
#include <utility>

#include "group.hpp"
#include "program.hpp"
#include "tensors.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace phalanx {
namespace {

char* at(uintptr_t address) { return reinterpret_cast<char*>(address); }

// Whether Ctrl-C was pressed; the error stays set for Python to raise.
bool interrupted() {
  nb::gil_scoped_acquire held;
  return PyErr_CheckSignals() != 0;
}

// The transfers of a program, in their order, each with the times and the end of the last run.
class Transfers {
 public:
  struct Transfer {
    double started_s = 0, ended_s = 0;
    int last = -1;
    Outcome outcome;
  };

  Transfer& add() { return transfers_.emplace_back(); }
  void begin() { position_.store(0, std::memory_order_relaxed); }
  // Called at the beginning of each transfer of a run, and at its end.
  void advance() { position_.store(position() + 1, std::memory_order_relaxed); }
  // Odd within a transfer; half of it, how many have ended. May be read by any thread.
  int position() const { return position_.load(std::memory_order_relaxed); }
  const Transfer& operator[](size_t index) const { return transfers_.at(index); }

 private:
  std::deque<Transfer> transfers_;  // which the steps of the program refer to
  std::atomic<int> position_{0};
};

nb::object told(const Outcome& outcome) {
  return nb::make_tuple(int(outcome.end), outcome.rank, outcome.header, outcome.expected);
}

// A group as Python holds it. Each call waits without the interpreter's lock; it returns who arrived last, or of what
// went wrong (end, rank, header, expected).
class PyGroup {
 public:
  // owner: keeps the mapping alive. tensor_type: torch.Tensor.
  PyGroup(nb::object owner, uintptr_t address, const nb::dict& numbers, int rank, std::vector<int> pidfds,
          bool may_spin, int64_t window, nb::object tensor_type)
      : owner_(std::move(owner)),
        reader_(std::move(tensor_type)),
        group_(address, read(numbers), rank, std::move(pidfds), may_spin, window, interrupted) {}

  // None, and nothing is done, where the tensors are not what the group takes.
  nb::object all_reduce(nb::handle x, bool max, double timeout_s) {
    TensorView view;
    if (!reader_.read(x, view) || view.numel == 0) return nb::none();
    return run([&] { return group_.all_reduce(view.data, view.num_bytes(), view.dtype, max, timeout_s); });
  }
  nb::object all_reduce_rms_norm(nb::handle x, nb::handle sum, nb::handle residual, nb::handle weight, float eps,
                                 double timeout_s) {
    TensorView in, out, added, factors;
    if (!reader_.read(x, in) || !reader_.read(sum, out) || !reader_.read(residual, added) ||
        !reader_.read(weight, factors) || in.numel == 0 || in.num_dims == 0 || in.dtype > kF32 || !in.is_like(out) ||
        !in.is_like(added) || factors.dtype != in.dtype || factors.num_dims != 1 ||
        factors.shape[0] != in.shape[in.num_dims - 1]) {
      return nb::none();
    }
    return run([&] {
      return group_.all_reduce_rms_norm(in.data, out.data, added.data, factors.data, eps, in.numel / factors.numel,
                                        factors.numel, in.dtype, timeout_s);
    });
  }
  void record_all_reduce(Transfers& transfers, uintptr_t x, size_t num_bytes, int dtype, bool max, double timeout_s) {
    record(transfers, [=, this] { return group_.all_reduce(at(x), num_bytes, dtype, max, timeout_s); });
  }
  void record_all_reduce_rms_norm(Transfers& transfers, uintptr_t x, uintptr_t sum, uintptr_t residual,
                                  uintptr_t weight, float eps, size_t num_rows, size_t width, int dtype,
                                  double timeout_s) {
    record(transfers, [=, this] {
      return group_.all_reduce_rms_norm(at(x), at(sum), at(residual), at(weight), eps, num_rows, width, dtype,
                                        timeout_s);
    });
  }
  nb::object all_gather(uintptr_t output, uintptr_t x, const std::vector<size_t>& counts, int dtype,
                        double timeout_s) {
    return run([&] { return group_.all_gather(at(output), at(x), counts, dtype, timeout_s); });
  }
  nb::object reduce_scatter(uintptr_t output, uintptr_t x, const std::vector<size_t>& counts, int dtype,
                            double timeout_s) {
    return run([&] { return group_.reduce_scatter(at(output), at(x), counts, dtype, timeout_s); });
  }
  nb::object broadcast(uintptr_t x, size_t num_bytes, int dtype, int root, double timeout_s) {
    return run([&] { return group_.broadcast(at(x), num_bytes, dtype, root, timeout_s); });
  }
  nb::object barrier(double timeout_s) {
    return run([&] { return group_.barrier(timeout_s); });
  }
  nb::object send(uintptr_t x, size_t num_bytes, int dtype, int to, double timeout_s) {
    return run([&] { return group_.send(at(x), num_bytes, dtype, to, timeout_s); });
  }
  nb::object recv(uintptr_t x, size_t num_bytes, int dtype, int source, double timeout_s) {
    return run([&] { return group_.recv(at(x), num_bytes, dtype, source, timeout_s); });
  }

 private:
  nb::object owner_;
  TensorReader reader_;
  Group group_;

  static Layout read(const nb::dict& numbers) {
    Layout layout;
    layout.size = nb::cast<int>(numbers["size"]);
    for (auto [name, field] : std::initializer_list<std::pair<const char*, size_t Layout::*>>{
             {"rank_words", &Layout::rank_words},     {"rank_stride", &Layout::rank_stride},
             {"epoch", &Layout::epoch},               {"left", &Layout::left},
             {"awaited", &Layout::awaited},           {"bell", &Layout::bell},
             {"cursor", &Layout::cursor},             {"ends", &Layout::ends},
             {"aborted", &Layout::aborted},           {"pair_words", &Layout::pair_words},
             {"pair_stride", &Layout::pair_stride},   {"consumed", &Layout::consumed},
             {"arena_at", &Layout::arena_at},         {"block_bytes", &Layout::block_bytes},
             {"num_blocks", &Layout::num_blocks},     {"round_bytes", &Layout::round_bytes},
             {"small_bytes", &Layout::small_bytes},   {"ring_at", &Layout::ring_at},
             {"ring_bytes", &Layout::ring_bytes},     {"ring_stride", &Layout::ring_stride},
             {"num_ring", &Layout::num_ring},         {"header_bytes", &Layout::header_bytes},
         }) {
      layout.*field = nb::cast<size_t>(numbers[name]);
    }
    return layout;
  }

  template <typename Call>
  Outcome run_unlocked(Call call) {
    const Outcome outcome = group_.aborted();
    group_.forget_last();
    return outcome ? call() : outcome;
  }

  // Adds a transfer to the program that is recorded. Where it fails the program ends.
  template <typename Call>
  void record(Transfers& transfers, Call call) {
    Program* const program = Program::recording();
    if (program == nullptr) throw std::logic_error("no program is being recorded");
    program->add([=, this, &transfers, &transfer = transfers.add()] {
      transfers.advance();
      transfer.started_s = now_s();
      transfer.outcome = run_unlocked(call);
      transfer.ended_s = now_s();
      transfer.last = group_.last();
      if (transfer.outcome) transfers.advance();
      return bool(transfer.outcome);
    });
  }

  template <typename Call>
  nb::object run(Call call) {
    Outcome outcome;
    {
      nb::gil_scoped_release released;
      outcome = run_unlocked(call);
    }
    if (outcome) return nb::int_(group_.last());
    if (outcome.end == End::kInterrupted) throw nb::python_error();
    return told(outcome);
  }
};

// instructions: a place in `instruction_sets`.
const Kernels& kernels_of(size_t instructions) { return *usable_kernels().at(instructions); }

// out: may be one of the parts.
void combine(uintptr_t out, const std::vector<uintptr_t>& parts, size_t count, int dtype, bool max, size_t instructions) {
  std::vector<const void*> inputs;
  for (uintptr_t part : parts) inputs.push_back(at(part));
  const Kernels& kernels = kernels_of(instructions);
  (max ? kernels.max : kernels.sum)[dtype](at(out), inputs.data(), int(inputs.size()), count);
}

}  // namespace

void bind_comm(nb::module_& module) {
  nb::class_<PyGroup>(module, "Group")
      .def(nb::init<nb::object, uintptr_t, const nb::dict&, int, std::vector<int>, bool, int64_t, nb::object>())
      .def("all_reduce", &PyGroup::all_reduce)
      .def("all_reduce_rms_norm", &PyGroup::all_reduce_rms_norm)
      .def("record_all_reduce", &PyGroup::record_all_reduce)
      .def("record_all_reduce_rms_norm", &PyGroup::record_all_reduce_rms_norm)
      .def("all_gather", &PyGroup::all_gather)
      .def("reduce_scatter", &PyGroup::reduce_scatter)
      .def("broadcast", &PyGroup::broadcast)
      .def("barrier", &PyGroup::barrier)
      .def("send", &PyGroup::send)
      .def("recv", &PyGroup::recv);
  nb::class_<Transfers>(module, "Transfers")
      .def(nb::init<>())
      .def("begin", &Transfers::begin)
      .def_prop_ro("position", &Transfers::position)
      .def("times",
           [](const Transfers& self, int count) {
             nb::list times;
             for (int i = 0; i < count; i++) {
               const Transfers::Transfer& each = self[size_t(i)];
               times.append(nb::make_tuple(each.started_s, each.ended_s, each.last));
             }
             return times;
           })
      .def("outcome", [](const Transfers& self, size_t index) { return told(self[index].outcome); });
  const nb::call_guard<nb::gil_scoped_release> unlocked;
  module.def("combine", &combine, "out"_a, "parts"_a, "count"_a, "dtype"_a, "maximum"_a,
             "instructions"_a = 0, unlocked);
  nb::list sets;
  for (const Kernels* each : usable_kernels()) sets.append(each->name);
  module.attr("instruction_sets") = nb::tuple(sets);
}

}  // namespace phalanx
