// Compiled once for each instruction set, PHALANX_SET; see `vectors.hpp`.
#include "attend.hpp"
#include "columns.hpp"
#include "operators.hpp"
#include "rows.hpp"

namespace phalanx {

#define PHALANX_JOINED(a, b) a##b
#define PHALANX_TABLE(set) PHALANX_JOINED(operators_, set)
#define PHALANX_FLOATS(function) {function<BF16>, function<F16>, function<float>}
#define PHALANX_PAGES(function)                                       \
  {{function<BF16, BF16>, function<F16, F16>, function<float, float>}, \
   {function<BF16, I8>, function<F16, I8>, function<float, I8>},       \
   {function<BF16, E4M3>, function<F16, E4M3>, function<float, E4M3>}}

const Operators PHALANX_TABLE(PHALANX_SET) = {
    PHALANX_FLOATS(rms_norm),
    PHALANX_FLOATS(add_rms_norm),
    {gated<BF16, silu_times>, gated<F16, silu_times>, gated<float, silu_times>},
    {gated<BF16, gelu_times>, gated<F16, gelu_times>, gated<float, gelu_times>},
    PHALANX_PAGES(rope_and_write_kv),
    PHALANX_PAGES(attend),
    PHALANX_PAGES(join_splits),
    PHALANX_FLOATS(attention_scratch),
    partial_floats,
    PHALANX_FLOATS(argmax),
    above,
};

}  // namespace phalanx
