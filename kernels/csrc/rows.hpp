// Norms, gates and rotations, row by row. Part of `operator_kernels.cpp`, compiled once for each instruction set.
#pragma once
#include "operators.hpp"
#include "pages.hpp"

namespace phalanx {
namespace {

constexpr size_t kStep = 2 * kWidth;

// to[i] = f(from[i]...) for i below count, two registers at a time; the last ones padded with zeros. `to` may be any of
// the inputs.
template <typename T, typename F, typename... From>
inline void map(T* to, size_t count, F&& f, const From*... from) {
  size_t i = 0;
  for (; i + kStep <= count; i += kStep) store_pair(to + i, f(load_pair(from + i)...));
  if (i == count) return;
  const size_t left = (count - i) * sizeof(T);
  auto rest = [&](const T* at) {
    T padded[kStep] = {};
    std::memcpy(padded, at + i, left);
    return load_pair(padded);
  };
  T padded[kStep];
  store_pair(padded, f(rest(from)...));
  std::memcpy(to + i, padded, left);
}

template <typename F>
inline Pair each(F&& f, Pair x, Pair y) {
  return {f(x.a, y.a), f(x.b, y.b)};
}

// Sums of squares are kept in a fixed number of lanes, so that all sets give the same bits.
constexpr size_t kLanes = 64;

class Squares {
 public:
  Squares() {
    for (Pair& pair : sums_) pair = {all(0), all(0)};
  }

  // kLanes numbers of T.
  template <typename T>
  void add_up(const T* x) {
    for (size_t pair = 0; pair < kPairs; pair++) {
      const Pair value = load_pair(x + pair * kStep);
      sums_[pair] = each([](V sum, V v) { return add(sum, multiply(v, v)); }, sums_[pair], value);
    }
  }

  template <typename T>
  float total() const {
    float lanes[kLanes];
    for (size_t pair = 0; pair < kPairs; pair++) spread<T>(lanes + pair * kStep, sums_[pair]);
    for (size_t half = kLanes / 2; half > 0; half /= 2) {
      for (size_t lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }

 private:
  static constexpr size_t kPairs = kLanes / kStep;
  Pair sums_[kPairs];
};

template <typename T>
inline void scale_row(T* to, const T* from, const T* weight, float squares, float eps, size_t width) {
  const V scale = all(1.0f / __builtin_sqrtf(squares / float(width) + eps));
  auto scaled = [&](V x, V by) { return multiply(multiply(x, scale), by); };
  map(to, width, [&](Pair x, Pair by) { return each(scaled, x, by); }, from, weight);
}

template <typename T>
inline void norm_row(T* to, const T* from, const T* weight, float eps, size_t width) {
  Squares squares;
  size_t i = 0;
  for (; i + kLanes <= width; i += kLanes) squares.add_up(from + i);
  if (i < width) {
    T rest[kLanes] = {};
    std::memcpy(rest, from + i, (width - i) * sizeof(T));
    squares.add_up(rest);
  }
  scale_row(to, from, weight, squares.total<T>(), eps, width);
}

template <typename T>
void rms_norm(void* normed, const void* x, size_t x_stride, const void* weight, float eps, size_t num_rows,
              size_t width) {
  for (size_t row = 0; row < num_rows; row++) {
    norm_row(static_cast<T*>(normed) + row * width, static_cast<const T*>(x) + row * x_stride,
             static_cast<const T*>(weight), eps, width);
  }
}

template <typename T>
void add_rms_norm(void* normed, void* sum, const void* x, const void* residual, const void* weight, float eps,
                  size_t num_rows, size_t width) {
  auto add_all = [](T* to, const T* a, const T* b, size_t count) {
    map(to, count, [](Pair one, Pair other) { return each([](V p, V q) { return add(p, q); }, one, other); }, a, b);
  };
  for (size_t row = 0; row < num_rows; row++) {
    const T *x_row = static_cast<const T*>(x) + row * width, *residual_row = static_cast<const T*>(residual) + row * width;
    T *sum_row = static_cast<T*>(sum) + row * width, *normed_row = static_cast<T*>(normed) + row * width;
    Squares squares;
    size_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      add_all(sum_row + i, x_row + i, residual_row + i, kLanes);
      squares.add_up(sum_row + i);
    }
    if (i < width) {
      T rest[kLanes] = {};
      add_all(sum_row + i, x_row + i, residual_row + i, width - i);
      std::memcpy(rest, sum_row + i, (width - i) * sizeof(T));
      squares.add_up(rest);
    }
    scale_row(normed_row, sum_row, static_cast<const T*>(weight), squares.total<T>(), eps, width);
  }
}

inline V silu_times(V gate, V up) { return multiply(sigmoid_times(gate, gate), up); }

// GELU by its approximation with tanh: x / 2 (1 + tanh(y)) = x / (1 + e^(-2 y)).
inline V gelu_times(V gate, V up) {
  const V y2 = multiply(multiply(gate, all(1.5957691216f)), madd(multiply(gate, gate), all(0.044715f), all(1.0f)));
  return multiply(sigmoid_times(y2, gate), up);
}

template <typename T, V (*kGate)(V, V)>
void gated(void* out, const void* gate_up, size_t num_rows, size_t width) {
  for (size_t row = 0; row < num_rows; row++) {
    const T* gate = static_cast<const T*>(gate_up) + row * 2 * width;
    map(static_cast<T*>(out) + row * width, width, [](Pair g, Pair u) { return each(kGate, g, u); }, gate, gate + width);
  }
}

// Turns (low, high) by the angles of (cos, sin): low cos - high sin, high cos + low sin.
template <typename T>
inline void turn(T* head, const T* cos, const T* sin, size_t half) {
  auto turned = [&](T* low, T* high, const T* cos_low, const T* cos_high, const T* sin_low, const T* sin_high) {
    const Pair l = load_pair(low), h = load_pair(high);
    const Pair cl = load_pair(cos_low), ch = load_pair(cos_high), sl = load_pair(sin_low), sh = load_pair(sin_high);
    store_pair(low, {nmadd(h.a, sl.a, multiply(l.a, cl.a)), nmadd(h.b, sl.b, multiply(l.b, cl.b))});
    store_pair(high, {madd(l.a, sh.a, multiply(h.a, ch.a)), madd(l.b, sh.b, multiply(h.b, ch.b))});
  };
  size_t i = 0;
  for (; i + kStep <= half; i += kStep) {
    turned(head + i, head + half + i, cos + i, cos + half + i, sin + i, sin + half + i);
  }
  if (i == half) return;
  T padded[6][kStep] = {};
  const T* const from[6] = {head + i, head + half + i, cos + i, cos + half + i, sin + i, sin + half + i};
  for (size_t each = 0; each < 6; each++) std::memcpy(padded[each], from[each], (half - i) * sizeof(T));
  turned(padded[0], padded[1], padded[2], padded[3], padded[4], padded[5]);
  std::memcpy(head + i, padded[0], (half - i) * sizeof(T));
  std::memcpy(head + half + i, padded[1], (half - i) * sizeof(T));
}

// C: what the pages hold.
template <typename T, typename C>
void rope_and_write_kv(const RopeWrite& work, size_t first_row, size_t last_row) {
  const size_t dim = work.head_dim, num_turned = work.num_queries + work.num_keys;
  for (size_t row = first_row; row < last_row; row++) {
    T* heads = static_cast<T*>(work.heads) + row * (num_turned + work.num_keys) * dim;
    const T *cos = static_cast<const T*>(work.cos) + row * dim, *sin = static_cast<const T*>(work.sin) + row * dim;
    for (size_t head = 0; head < num_turned; head++) {
      const T* norm = static_cast<const T*>(head < work.num_queries ? work.query_norm : work.key_norm);
      if (norm != nullptr) norm_row(heads + head * dim, heads + head * dim, norm, work.eps, dim);
      turn(heads + head * dim, cos, sin, dim / 2);
    }
    const int64_t slot = work.slots[row];
    const int64_t place = slot / work.page_size * work.page_stride + slot % work.page_size * work.slot_stride;
    for (size_t head = 0; head < work.num_keys; head++) {
      const int64_t at = place + int64_t(head) * work.head_stride;
      const T* key = heads + (work.num_queries + head) * dim;
      const T* value = key + work.num_keys * dim;
      if constexpr (std::is_same<T, C>::value) {
        std::memcpy(static_cast<T*>(work.keys) + at, key, dim * sizeof(T));
        std::memcpy(static_cast<T*>(work.values) + at, value, dim * sizeof(T));
      } else {
        const int64_t page_head = slot / work.page_size * int64_t(work.num_keys) + int64_t(head);
        const int64_t scale = page_head * work.page_size + slot % work.page_size;
        quantise_head(static_cast<C*>(work.keys) + at, work.key_scales + scale, key, dim);
        quantise_head(static_cast<C*>(work.values) + at, work.value_scales + scale, value, dim);
      }
    }
  }
}

}  // namespace
}  // namespace phalanx
