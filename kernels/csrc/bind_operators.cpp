// The operators that are no matrix product, as Python calls them: addresses, shapes, then `DType`, and which of
// `instruction_sets` is to be used.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <vector>

#include "attention.hpp"
#include "bind_kernels.hpp"
#include "pool.hpp"
#include "program.hpp"
#include "rotations.hpp"
#include "select.hpp"
#include "widen.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace phalanx {
namespace {

// Numbers that are worked off in about the time that it takes to wake the threads.
constexpr size_t kSmallRows = 16384;

const Operators& operators_of(size_t instructions) { return *usable_operators().at(instructions); }

template <typename T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// body(first row, last row), over the threads of the pool where there is enough to do.
template <class F>
void over_rows(size_t num_rows, size_t width, F&& body) {
  const size_t threads = size_t(Pool::instance().size());
  if (threads == 1 || num_rows == 1 || num_rows * width <= kSmallRows) return body(size_t(0), num_rows);
  const size_t num_parts = std::min(num_rows, 4 * threads);
  parallel_for(int(num_parts), [&](int part) {
    body(num_rows * size_t(part) / num_parts, num_rows * size_t(part + 1) / num_parts);
  });
}

// Of an operator on rows of numbers that moves each of them, or as many as they are, so many times.
auto on_rows(const char* name, size_t num_rows, size_t width, double times, size_t item) {
  return [=] { return Work{name, {num_rows, width}, times * num_rows * width * item}; };
}

void rms_norm(uintptr_t normed, uintptr_t x, size_t x_stride, uintptr_t weight, float eps, size_t num_rows,
              size_t width, int dtype, size_t instructions) {
  const size_t item = item_bytes(dtype);
  perform(on_rows("rms_norm", num_rows, width, 2, item), [=, norm = operators_of(instructions).rms_norm[dtype]] {
    over_rows(num_rows, width, [&](size_t first, size_t last) {
      norm(at(normed + first * width * item), at(x + first * x_stride * item), x_stride, at(weight), eps, last - first,
           width);
    });
  });
}

void add_rms_norm(uintptr_t normed, uintptr_t sum, uintptr_t x, uintptr_t residual, uintptr_t weight, float eps,
                  size_t num_rows, size_t width, int dtype, size_t instructions) {
  const size_t item = item_bytes(dtype);
  perform(on_rows("add_rms_norm", num_rows, width, 4, item), [=, norm = operators_of(instructions).add_rms_norm[dtype]] {
    over_rows(num_rows, width, [&](size_t first, size_t last) {
      const size_t skipped = first * width * item;
      norm(at(normed + skipped), at(sum + skipped), at(x + skipped), at(residual + skipped), at(weight), eps,
           last - first, width);
    });
  });
}

void gated_mul(uintptr_t out, uintptr_t gate_up, size_t num_rows, size_t width, bool gelu, int dtype,
               size_t instructions) {
  const Operators& operators = operators_of(instructions);
  const size_t item = item_bytes(dtype);
  const char* const name = gelu ? "gelu_mul" : "silu_mul";
  perform(on_rows(name, num_rows, width, 3, item), [=, gated = (gelu ? operators.gelu_mul : operators.silu_mul)[dtype]] {
    over_rows(num_rows, 2 * width, [&](size_t first, size_t last) {
      const size_t skipped = first * width * item;
      gated(at(out + skipped), at(gate_up + 2 * skipped), last - first, width);
    });
  });
}

void rope_and_write_kv(uintptr_t heads, uintptr_t cos, uintptr_t sin, uintptr_t query_norm, uintptr_t key_norm,
                       float eps, uintptr_t keys, uintptr_t values, uintptr_t key_scales, uintptr_t value_scales,
                       uintptr_t slots, int64_t page_size, int64_t page_stride, int64_t slot_stride,
                       int64_t head_stride, size_t num_rows, size_t num_queries, size_t num_keys, size_t head_dim,
                       int dtype, int pages, size_t instructions) {
  const RopeWrite work{at(heads), at(cos), at(sin), at(query_norm), at(key_norm), eps, at(keys), at(values),
                       at<uint16_t>(key_scales), at<uint16_t>(value_scales), at<int64_t>(slots), page_size,
                       page_stride, slot_stride, head_stride, num_queries, num_keys, head_dim};
  const size_t width = (num_queries + 2 * num_keys) * head_dim;
  perform(on_rows("rope_and_write_kv", num_rows, width, 2, item_bytes(dtype)),
          [=, rows = operators_of(instructions).rope_and_write_kv[pages][dtype]] {
    over_rows(num_rows, width, [&](size_t first, size_t last) { rows(work, first, last); });
  });
}

void attend(const AttentionSteps& steps, const HeadLists& heads, uintptr_t out, uintptr_t query, uintptr_t keys,
            uintptr_t values, uintptr_t key_scales, uintptr_t value_scales, int64_t query_stride, int64_t out_stride,
            int64_t page_size, int64_t page_stride, int64_t slot_stride, int64_t head_stride, int64_t scales_stride,
            int head_dim, float scale, float softcap, int dtype, int pages, size_t instructions) {
  Attention attention{};
  attention.query = at(query);
  attention.keys = at(keys);
  attention.values = at(values);
  attention.key_scales = at<const uint16_t>(key_scales);
  attention.value_scales = at<const uint16_t>(value_scales);
  attention.out = at(out);
  attention.query_stride = query_stride;
  attention.out_stride = out_stride;
  attention.page_size = page_size;
  attention.page_stride = page_stride;
  attention.slot_stride = slot_stride;
  attention.head_stride = head_stride;
  attention.scales_stride = scales_stride;
  attention.head_dim = head_dim;
  attention.scale = scale;
  attention.softcap = softcap;
  perform([=, &steps, &heads] { return steps.work(heads, head_dim, dtype, pages); },
          [=, &steps, &heads, &operators = operators_of(instructions)] {
            steps.attend(attention, heads, dtype, pages, operators);
          });
}

}  // namespace

void bind_operators(nb::module_& module) {
  const nb::call_guard<nb::gil_scoped_release> unlocked;
  module.def("rms_norm", &rms_norm, "normed"_a, "x"_a, "x_stride"_a, "weight"_a, "eps"_a, "num_rows"_a, "width"_a,
             "dtype"_a, "instructions"_a = 0, unlocked);
  module.def("add_rms_norm", &add_rms_norm, "normed"_a, "total"_a, "x"_a, "residual"_a, "weight"_a, "eps"_a,
             "num_rows"_a, "width"_a, "dtype"_a, "instructions"_a = 0, unlocked);
  module.def("gated_mul", &gated_mul, "out"_a, "gate_up"_a, "num_rows"_a, "width"_a, "gelu"_a, "dtype"_a,
             "instructions"_a = 0, unlocked);
  module.def("rope_and_write_kv", &rope_and_write_kv, "heads"_a, "cos"_a, "sin"_a, "query_norm"_a, "key_norm"_a,
             "eps"_a, "keys"_a, "values"_a, "key_scales"_a, "value_scales"_a, "slots"_a, "page_size"_a, "page_stride"_a,
             "slot_stride"_a, "head_stride"_a, "num_rows"_a, "num_queries"_a, "num_keys"_a, "head_dim"_a, "dtype"_a,
             "pages"_a, "instructions"_a = 0, unlocked);
  module.def(
      "argmax",
      [](uintptr_t columns, uintptr_t x, size_t num_rows, size_t width, int dtype, size_t instructions) {
        perform(on_rows("argmax", num_rows, width, 1, item_bytes(dtype)), [=, &operators = operators_of(instructions)] {
          argmax_rows(at<int64_t>(columns), {at(x), num_rows, width, dtype}, operators);
        });
      },
      "columns"_a, "x"_a, "num_rows"_a, "width"_a, "dtype"_a, "instructions"_a = 0, unlocked);
  module.def(
      "argmax_keys",
      [](uintptr_t keys, uintptr_t x, size_t num_rows, size_t width, int64_t first, int dtype, size_t instructions) {
        perform(on_rows("argmax_keys", num_rows, width, 1, item_bytes(dtype)), [=, &operators = operators_of(instructions)] {
          argmax_keys(at<int64_t>(keys), {at(x), num_rows, width, dtype}, first, operators);
        });
      },
      "keys"_a, "x"_a, "num_rows"_a, "width"_a, "first"_a, "dtype"_a, "instructions"_a = 0, unlocked);
  module.def(
      "top",
      [](uintptr_t values, uintptr_t columns, uintptr_t x, size_t num_rows, size_t width, size_t count, size_t instructions) {
        perform(on_rows("top", num_rows, width, 1, sizeof(float)), [=, &operators = operators_of(instructions)] {
          top_rows(at<float>(values), at<int64_t>(columns), at<const float>(x), num_rows, width, count, operators);
        });
      },
      "values"_a, "columns"_a, "x"_a, "num_rows"_a, "width"_a, "count"_a, "instructions"_a = 0, unlocked);
  module.def(
      "rope_table",
      [](uintptr_t cos, uintptr_t sin, uintptr_t positions, uintptr_t frequencies, size_t num_rows, size_t half, int dtype) {
        perform(on_rows("rope_table", num_rows, 2 * half, 2, item_bytes(dtype)), [=] {
          rope_table(at(cos), at(sin), at<const int64_t>(positions), at<const float>(frequencies), num_rows, half, dtype);
        });
      },
      "cos"_a, "sin"_a, "positions"_a, "frequencies"_a, "num_rows"_a, "half"_a, "dtype"_a, unlocked);
  module.def(
      "token_places",
      [](uintptr_t places, uintptr_t tables, int64_t table_stride, const std::vector<int64_t>& table,
         const std::vector<int64_t>& num_new, const std::vector<int64_t>& lengths, int64_t page_size) {
        token_places(at<int64_t>(places), at<const int64_t>(tables), table_stride, table, num_new, lengths, page_size);
      },
      "places"_a, "tables"_a, "table_stride"_a, "table"_a, "num_new"_a, "lengths"_a, "page_size"_a);
  module.def(
      "widen",
      [](uintptr_t out, uintptr_t x, size_t count) {
        perform(on_rows("widen", 1, count, 1, sizeof(float) + sizeof(uint16_t)),
                [=] { widen(at<float>(out), at<const uint16_t>(x), count); });
      },
      "out"_a, "x"_a, "count"_a, unlocked);
  nb::class_<HeadLists>(module, "HeadLists").def(nb::init<const std::vector<int>&, int>());
  nb::class_<AttentionSteps>(module, "AttentionSteps")
      .def("__init__",
           [](AttentionSteps* self, uintptr_t tables, int64_t table_stride, const std::vector<int64_t>& table,
              const std::vector<int64_t>& num_new, const std::vector<int64_t>& lengths, int64_t window) {
             new (self) AttentionSteps(at<const int64_t>(tables), table_stride, table, num_new, lengths, window);
           })
      .def("move",
           [](AttentionSteps& self, uintptr_t tables, int64_t table_stride, const std::vector<int64_t>& table,
              const std::vector<int64_t>& num_new, const std::vector<int64_t>& lengths, int64_t window) {
             self = AttentionSteps(at<const int64_t>(tables), table_stride, table, num_new, lengths, window);
           })
      .def("copy", [](const AttentionSteps& self) { return self; })
      .def("become", [](AttentionSteps& self, const AttentionSteps& other) { self = other; }, "other"_a)
      .def("attend", &attend, "heads"_a, "out"_a, "query"_a, "keys"_a, "values"_a, "key_scales"_a, "value_scales"_a,
           "query_stride"_a, "out_stride"_a, "page_size"_a, "page_stride"_a, "slot_stride"_a, "head_stride"_a,
           "scales_stride"_a, "head_dim"_a, "scale"_a, "softcap"_a, "dtype"_a, "pages"_a, "instructions"_a = 0,
           unlocked);
}

}  // namespace phalanx
