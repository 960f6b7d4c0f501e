// The kernels room's part of `phalanx._native`. Tensors come as addresses: nothing here knows torch.
#include "bind_kernels.hpp"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "linear.hpp"
#include "memory.hpp"
#include "pool.hpp"
#include "program.hpp"
#include "quantised.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace phalanx {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Of so many rows by these outputs of a matrix, which are read once.
template <class Matrix>
Work product_of(const Matrix& matrix, size_t outputs, size_t num_rows) {
  const size_t inputs = matrix.num_inputs();
  const double read = double(matrix.num_bytes()) / matrix.num_outputs() * outputs;
  return {"linear", {num_rows, outputs, inputs}, read + num_rows * (outputs + inputs) * sizeof(uint16_t),
          2.0 * num_rows * outputs * inputs, uintptr_t(&matrix)};
}

// weight: a `PackedMatrix`, of which it multiplies by `outputs` rows, from the first of a block of 32 on. instructions: a
// place in `linear_sets`.
void multiply(uintptr_t y, uintptr_t x, size_t x_stride, uintptr_t weight, uintptr_t bias, size_t num_rows,
              size_t instructions, size_t first_block, size_t outputs) {
  const PackedMatrix& matrix = *at<PackedMatrix>(weight);
  perform([=, &matrix] { return product_of(matrix, outputs, num_rows); },
          [=, &matrix, &kernels = *usable_linears().at(instructions)] {
            linear(kernels, at<uint16_t>(y), at<uint16_t>(x), x_stride, matrix, {first_block, outputs}, at<uint16_t>(bias),
                   num_rows);
          });
}

// Of so many rows of a matrix, written out.
template <class Matrix>
Work taken_rows(const Matrix& matrix, size_t count) {
  const double held = double(matrix.num_bytes()) / matrix.num_outputs(), written = matrix.num_inputs() * sizeof(uint16_t);
  return {"embedding", {count, matrix.num_inputs()}, count * (held + written), 0, uintptr_t(&matrix)};
}

// weight: a `QuantisedMatrix`. The rest as above.
void multiply_quantised(uintptr_t y, uintptr_t x, size_t x_stride, uintptr_t weight, uintptr_t bias, size_t num_rows,
                        size_t instructions, size_t first_block, size_t outputs) {
  const QuantisedMatrix& matrix = *at<QuantisedMatrix>(weight);
  perform([=, &matrix] { return product_of(matrix, outputs, num_rows); },
          [=, &matrix] {
            quantised_linear(instructions, at<uint16_t>(y), at<uint16_t>(x), x_stride, matrix, {first_block, outputs},
                             at<uint16_t>(bias), num_rows);
          });
}

// bits, group_size, scales (a `ScaleType`), offsets, zeros, numbers (a `NumberType`), input_group
using FormatParts = std::tuple<size_t, size_t, int, bool, bool, int, size_t>;

QuantisedFormat format_of(const FormatParts& parts) {
  const auto [bits, group_size, scales, offsets, zeros, numbers, input_group] = parts;
  return {bits, group_size, ScaleType(scales), offsets, zeros, NumberType(numbers), input_group};
}

}  // namespace

void bind_kernels(nb::module_& module) {
  const nb::call_guard<nb::gil_scoped_release> unlocked;
  module.def("resize_pool", [](int num_threads) { Pool::instance().resize(num_threads); }, "num_threads"_a, unlocked);
  module.def("pool_size", [] { return Pool::instance().size(); });
  bind_operators(module);
  nb::class_<Program>(module, "Program")
      .def(nb::init<>())
      .def("begin", [](Program& self) { Program::recording() = &self; })
      .def("end", [](Program&) { Program::recording() = nullptr; })
      .def("run", [](const Program& self) {
        bool done;
        {
          nb::gil_scoped_release released;
          done = self.run();
        }
        if (!done && PyErr_Occurred()) throw nb::python_error();  // an interrupt, seen while a step waited
        return done;
      });
  nb::class_<CallWatch>(module, "CallWatch")
      .def(nb::init<>())
      .def("begin", [](CallWatch& self) { CallWatch::current() = &self; })
      .def("end", [](CallWatch&) { CallWatch::current() = nullptr; })
      .def("take", [](CallWatch& self) {
        nb::list calls;
        for (const auto& [work, started_s, ended_s] : self.take()) {
          nb::list sizes;
          for (size_t size : work.sizes) {
            if (size != 0) sizes.append(size);
          }
          calls.append(nb::make_tuple(work.name, nb::tuple(sizes), work.num_bytes, work.num_flops, work.weight, started_s,
                                      ended_s));
        }
        return calls;
      });
  module.def("linear", &multiply, "y"_a, "x"_a, "x_stride"_a, "weight"_a, "bias"_a, "num_rows"_a, "instructions"_a,
             "first_block"_a, "outputs"_a, unlocked);
  nb::class_<PackedMatrix>(module, "PackedMatrix")
      .def_static("room_bytes", &PackedMatrix::room_bytes, "num_outputs"_a, "num_inputs"_a)
      .def("__init__",
           [](PackedMatrix* self, size_t num_outputs, size_t num_inputs, uintptr_t room) {
             new (self) PackedMatrix(num_outputs, num_inputs, at<uint8_t>(room));
           },
           "num_outputs"_a, "num_inputs"_a, "room"_a)
      .def("put",
           [](PackedMatrix& self, uintptr_t rows, size_t first, size_t num_rows) {
             self.put(at<uint16_t>(rows), first, num_rows);
           },
           "rows"_a, "first"_a, "num_rows"_a, unlocked)
      .def("take_rows",
           [](const PackedMatrix& self, uintptr_t out, uintptr_t indices, size_t count) {
             perform([=, &self] { return taken_rows(self, count); },
                     [=, &self] { self.take_rows(at<uint16_t>(out), at<int64_t>(indices), count); });
           },
           "out"_a, "indices"_a, "count"_a, unlocked)
      .def("take_held_rows",
           [](const PackedMatrix& self, uintptr_t out, uintptr_t indices, size_t count, int64_t first) {
             perform([=, &self] { return taken_rows(self, count); },
                     [=, &self] { self.take_held_rows(at<uint16_t>(out), at<int64_t>(indices), count, first); });
           },
           "out"_a, "indices"_a, "count"_a, "first"_a, unlocked)
      .def_prop_ro("address", [](const PackedMatrix& self) { return reinterpret_cast<uintptr_t>(&self); })
      .def_prop_ro("num_bytes", &PackedMatrix::num_bytes)
      .def_prop_ro("num_blocks", &PackedMatrix::num_blocks)
      .def_prop_ro("num_plain", &PackedMatrix::num_plain);
  module.def("quantised_linear", &multiply_quantised, "y"_a, "x"_a, "x_stride"_a, "weight"_a, "bias"_a, "num_rows"_a,
             "instructions"_a, "first_block"_a, "outputs"_a, unlocked);
  nb::class_<QuantisedMatrix>(module, "QuantisedMatrix")
      .def_static(
          "room_bytes",
          [](size_t num_outputs, size_t num_inputs, const FormatParts& format) {
            return QuantisedMatrix::room_bytes(num_outputs, num_inputs, format_of(format));
          },
          "num_outputs"_a, "num_inputs"_a, "held"_a)
      .def("__init__",
           [](QuantisedMatrix* self, size_t num_outputs, size_t num_inputs, const FormatParts& format, uintptr_t room,
              size_t x_inputs, std::vector<int32_t> order) {
             new (self) QuantisedMatrix(num_outputs, num_inputs, format_of(format), at<uint8_t>(room), x_inputs,
                                        std::move(order));
           },
           "num_outputs"_a, "num_inputs"_a, "held"_a, "room"_a, "x_inputs"_a, "order"_a)
      .def("put",
           [](QuantisedMatrix& self, uintptr_t q, uintptr_t scales, uintptr_t offsets, uintptr_t zeros, size_t first,
              size_t num_rows) {
             self.put(at<int8_t>(q), at<void>(scales), at<void>(offsets), at<uint8_t>(zeros), first, num_rows);
           },
           "q"_a, "scales"_a, "offsets"_a, "zeros"_a, "first"_a, "num_rows"_a, unlocked)
      .def("take_held_rows",
           [](const QuantisedMatrix& self, uintptr_t out, uintptr_t indices, size_t count, int64_t first) {
             perform([=, &self] { return taken_rows(self, count); },
                     [=, &self] { self.take_held_rows(at<uint16_t>(out), at<int64_t>(indices), count, first); });
           },
           "out"_a, "indices"_a, "count"_a, "first"_a, unlocked)
      .def_prop_ro("address", [](const QuantisedMatrix& self) { return reinterpret_cast<uintptr_t>(&self); });
  module.def(
      "advise_huge_pages",
      [](uintptr_t memory, size_t num_bytes) { return advise_huge_pages(at<char>(memory), num_bytes); }, "memory"_a,
      "num_bytes"_a, unlocked);
  module.def(
      "read_memory", [](uintptr_t memory, size_t num_bytes) { return read_memory(at<char>(memory), num_bytes); },
      "memory"_a, "num_bytes"_a, unlocked);
  nb::list sets;
  for (const LinearKernels* each : usable_linears()) sets.append(each->name);
  module.attr("linear_sets") = nb::tuple(sets);
}

}  // namespace phalanx
