#include "quantised.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dealer.hpp"
#include "scratch.hpp"

namespace phalanx {
namespace {

float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

float from_half(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, size = bits & 0x7FFF;
  // As if its exponent were that of a float, then 2^112 times that: subnormal numbers come out right too.
  uint32_t wide = size << 13;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  value *= 0x1p112f;
  std::memcpy(&wide, &value, sizeof wide);
  if (size >= 0x7C00) wide = 0x7F800000 | (size & 0x3FF) << 13;
  wide |= sign;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

float from_e4m3(uint8_t bits) {
  if ((bits & 0x7F) == 0x7F) return from_bf16(0x7FC0);
  // As if its exponent were that of a bfloat16, then 2^120 times that.
  return from_bf16(uint16_t((bits & 0x80) << 8 | (bits & 0x7F) << 4)) * 0x1p120f;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float scale_at(const uint8_t* scales, size_t lane, ScaleType type) {
  if (type == kFloatScales) {
    float value;
    std::memcpy(&value, scales + lane * 4, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, scales + lane * 2, sizeof bits);
  return type == kHalfScales ? from_half(bits) : from_bf16(bits);
}

// Where an input of an octet lies: its byte, and of 4 bits how far from the lowest bit.
size_t byte_of(size_t lane, size_t input) { return input / 2 * 64 + place_of(lane) + input % 2; }
size_t nibble_byte_of(size_t lane, size_t input) { return lane * 4 + input % 2 * 2 + input / 4; }
size_t nibble_shift_of(size_t input) { return input / 2 % 2 * 4; }
size_t integer_byte_of(size_t lane, size_t input) { return input / 2 % 2 * 128 + lane * 4 + input % 2 * 2 + input / 4; }
constexpr uint8_t kSign = 0x80;  // turned round in those

// Of a row, those of each group, `stride` apart.
void add_up(float* sums, size_t stride, const uint16_t* x, size_t num_inputs, size_t group_size) {
  for (size_t first = 0; first < num_inputs; first += group_size, sums += stride) {
    const size_t end = std::min(num_inputs, first + group_size);
    float parts[8] = {};
    size_t i = first;
    for (; i + 8 <= end; i += 8) {
      for (size_t j = 0; j < 8; j++) parts[j] += from_bf16(x[i + j]);
    }
    for (; i < end; i++) parts[i % 8] += from_bf16(x[i]);
    *sums = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
  }
}

}  // namespace

size_t QuantisedMatrix::room_bytes(size_t num_outputs, size_t num_inputs, const QuantisedFormat& format) {
  const size_t groups = divide_up(num_inputs, format.group_size), octets = divide_up(num_inputs, 8);
  return divide_up(num_outputs, kBlockColumns) * (groups * format.group_head() + octets * format.octet_bytes());
}

QuantisedMatrix::QuantisedMatrix(size_t num_outputs, size_t num_inputs, const QuantisedFormat& format, uint8_t* room,
                                 size_t x_inputs, std::vector<int32_t> order)
    : num_outputs_(num_outputs),
      num_inputs_(num_inputs),
      format_(format),
      room_(room),
      block_bytes_(room_bytes(kBlockColumns, num_inputs, format)),
      x_inputs_(x_inputs),
      order_(std::move(order)) {
  if (format.group_size == 0 || format.group_size % 8 != 0) {
    throw std::invalid_argument("groups of " + std::to_string(format.group_size) + " inputs are no multiple of 8");
  }
  if (order_.empty() ? num_inputs != x_inputs : order_.size() != num_inputs) {
    throw std::invalid_argument("an order of " + std::to_string(order_.size()) + " inputs is not that of " +
                                std::to_string(num_inputs));
  }
  if (format.input_group > 0 && (format.numbers != kIntegers || format.input_group % 8 != 0 || format.input_group > kMostInputs)) {
    throw std::invalid_argument("of integers, groups of 8 to " + std::to_string(kMostInputs) + " inputs are quantised");
  }
  for (const int32_t input : order_) {
    if (input >= int64_t(x_inputs)) throw std::invalid_argument("x has no input " + std::to_string(input));
  }
}

size_t QuantisedMatrix::group_start(size_t group) const {
  return group * (format_.group_head() + format_.group_size / 8 * format_.octet_bytes());
}

void QuantisedMatrix::put(const int8_t* q, const void* scales, const void* offsets, const uint8_t* zeros, size_t first,
                          size_t num_rows) {
  const size_t groups = num_groups(), item = format_.scale_bytes() / kBlockColumns;
  const int bias = format_.unsigned_nibbles() ? 0 : 8;
  // By blocks, so that a byte is written by one thread only.
  const size_t first_block = first / kBlockColumns, end_block = divide_up(first + num_rows, kBlockColumns);
  if (num_rows == 0) return;
  parallel_for(int(end_block - first_block), [&](int index) {
    const size_t block = first_block + size_t(index);
    uint8_t* const to = room_ + block * block_bytes_;
    const size_t begin = std::max(first, block * kBlockColumns), end = std::min(first + num_rows, (block + 1) * kBlockColumns);
    for (size_t row = begin; row < end; row++) {
      const size_t lane = row % kBlockColumns, from = row - first;
      for (size_t group = 0; group < groups; group++) {
        uint8_t* const head = to + group_start(group);
        std::memcpy(head + lane * item, static_cast<const uint8_t*>(scales) + (from * groups + group) * item, item);
        if (format_.offsets) {
          std::memcpy(head + format_.scale_bytes() + lane * item,
                      static_cast<const uint8_t*>(offsets) + (from * groups + group) * item, item);
        }
        if (format_.zeros) head[format_.zeros_at() + lane] = zeros[from * groups + group];
        const size_t stop = std::min(num_inputs_, (group + 1) * format_.group_size);
        uint8_t* octet = head + format_.group_head();
        for (size_t k = group * format_.group_size; k < stop; k += 8, octet += format_.octet_bytes()) {
          for (size_t input = 0; input < std::min<size_t>(8, stop - k); input++) {
            const int8_t value = q[from * num_inputs_ + k + input];
            if (format_.input_group > 0 && format_.bits == 8) {
              octet[integer_byte_of(lane, input)] = uint8_t(value) ^ kSign;
            } else if (format_.bits == 8) {
              octet[byte_of(lane, input)] = uint8_t(value);
            } else {
              uint8_t& byte = octet[nibble_byte_of(lane, input)];
              const size_t shift = nibble_shift_of(input);
              byte = uint8_t((byte & ~(0xF << shift)) | ((value + bias) & 0xF) << shift);
            }
          }
        }
      }
    }
  });
}

void QuantisedMatrix::take_row(uint16_t* out, size_t row) const {
  const uint8_t* const from = block(row / kBlockColumns);
  const size_t lane = row % kBlockColumns;
  const int bias = format_.unsigned_nibbles() ? 0 : 8;
  for (size_t k = 0; k < num_inputs_; k++) {
    const int64_t to = order_.empty() ? int64_t(k) : order_[k];
    if (to < 0) continue;
    const size_t group = k / format_.group_size, input = k % 8;
    const uint8_t* const head = from + group_start(group);
    const uint8_t* const octet = head + format_.group_head() + k % format_.group_size / 8 * format_.octet_bytes();
    const uint8_t byte = format_.bits == 4           ? octet[nibble_byte_of(lane, input)]
                         : format_.input_group > 0 ? octet[integer_byte_of(lane, input)] ^ kSign
                                                  : octet[byte_of(lane, input)];
    const int integer = format_.bits == 8 ? int8_t(byte) : (byte >> nibble_shift_of(input) & 0xF) - bias;
    const int zero = format_.zeros ? head[format_.zeros_at() + lane] - (format_.bits == 8 ? 128 : 0) : 0;
    const float value = format_.numbers == kE4M3 ? from_e4m3(byte) : float(integer - zero);
    const float offset = format_.offsets ? scale_at(head + format_.scale_bytes(), lane, format_.scales) : 0;
    out[to] = to_bf16(value * scale_at(head, lane, format_.scales) + offset);
  }
}

void QuantisedMatrix::take_held_rows(uint16_t* out, const int64_t* indices, size_t count, int64_t first) const {
  for (size_t i = 0; i < count; i++) {
    const int64_t index = indices[i] - first;
    uint16_t* const row = out + i * x_inputs_;
    if (index < 0 || size_t(index) >= num_outputs_) {
      std::memset(row, 0, x_inputs_ * sizeof(uint16_t));
    } else {
      take_row(row, size_t(index));
    }
  }
}

namespace {

// Rows of x as the weight has its inputs.
void put_in_order(uint16_t* to, const uint16_t* x, size_t x_stride, const std::vector<int32_t>& order, size_t num_rows) {
  const size_t num_inputs = order.size();
  const auto put = [&](size_t row) {
    for (size_t k = 0; k < num_inputs; k++) to[row * num_inputs + k] = order[k] < 0 ? 0 : x[row * x_stride + order[k]];
  };
  if (num_rows * num_inputs <= kPackedAlone) {
    for (size_t row = 0; row < num_rows; row++) put(row);
  } else {
    parallel_for(int(num_rows), [&](int row) { put(size_t(row)); });
  }
}

void multiply_some(const LinearKernels& kernels, uint16_t* y, const uint16_t* x, size_t x_stride,
                   const QuantisedMatrix& weight, const Outputs& outputs, const uint16_t* bias, size_t num_rows) {
  const QuantisedFormat& format = weight.format();
  const size_t num_pairs = 4 * weight.num_octets(), row_bytes = num_pairs * kernels.item_bytes;
  const size_t num_groups = divide_up(num_rows, kernels.most_rows), num_inputs = weight.num_inputs();
  const size_t sums_a_row = format.needs_sums() ? weight.num_groups() : 0;
  char* const rows = scratch<char>(num_rows * row_bytes);
  float* const sums = scratch<float>(num_rows * sums_a_row);
  const auto first_row = [=](size_t group) { return share(num_rows, group, num_groups); };
  const auto pack = [&](size_t group) {
    const size_t row = first_row(group), size = first_row(group + 1) - row;
    kernels.pack_rows(rows + row * row_bytes, x + row * x_stride, x_stride, size, num_inputs, num_pairs);
    for (size_t i = 0; sums_a_row > 0 && i < size; i++) {
      add_up(sums + row * sums_a_row + i, size, x + (row + i) * x_stride, num_inputs, format.group_size);
    }
  };
  if (num_rows * num_inputs <= kPackedAlone) {
    for (size_t group = 0; group < num_groups; group++) pack(group);
  } else {
    parallel_for(int(num_groups), [&](int group) { pack(size_t(group)); });
  }
  const QuantisedKernels& functions = *kernels.quantised;
  const bool e4m3 = format.numbers == kE4M3;
  const bool can_keep = format.bits == 8 && functions.multiply_kept_bytes[1] != nullptr;
  deal_blocks(outputs.num_blocks(), num_groups, [&](size_t index, size_t first_group, size_t end_group, bool) {
    const size_t column = index * kBlockColumns;
    QuantisedTile tile{};
    tile.w = weight.block(outputs.first_block + index);
    tile.format = &format;
    tile.num_octets = weight.num_octets();
    tile.y_stride = outputs.size;
    tile.num_columns = std::min(kBlockColumns, outputs.size - column);
    tile.bias = bias == nullptr ? nullptr : bias + column;
    const bool keeps = can_keep && end_group - first_group > 1;
    if (keeps) tile.decoded = scratch<uint8_t>(weight.num_octets() * kDecodedOctetBytes);
    for (size_t group = first_group; group < end_group; group++) {
      const size_t row = first_row(group), size = first_row(group + 1) - row;
      tile.x = rows + row * row_bytes;
      tile.x_sums = sums + row * sums_a_row;
      tile.ahead_bytes = group > first_group ? kNearBytes : kAheadBytes;
      tile.y = y + row * outputs.size + column;
      const auto& by_rows = format.bits == 4       ? functions.multiply_nibbles
                            : !keeps               ? e4m3 ? functions.multiply_e4m3 : functions.multiply_bytes
                            : group == first_group ? e4m3 ? functions.multiply_kept_e4m3 : functions.multiply_kept_bytes
                                                   : functions.multiply_decoded;
      by_rows[size](tile);
    }
  });
}

}  // namespace

void quantised_linear(size_t instructions, uint16_t* y, const uint16_t* x, size_t x_stride,
                      const QuantisedMatrix& weight, const Outputs& outputs, const uint16_t* bias, size_t num_rows) {
  const LinearKernels& kernels = *usable_linears().at(instructions);
  const size_t passes = divide_up(num_rows, kMostRowsAtOnce);
  for (size_t pass = 0; pass < passes; pass++) {
    const size_t row = share(num_rows, pass, passes), size = share(num_rows, pass + 1, passes) - row;
    const uint16_t* from = x + row * x_stride;
    size_t stride = x_stride;
    if (!weight.order().empty()) {
      stride = weight.num_inputs();
      uint16_t* const ordered = scratch<uint16_t>(size * stride);
      put_in_order(ordered, from, x_stride, weight.order(), size);
      from = ordered;
    }
    const auto multiply = weight.format().input_group > 0 ? integer_linear : multiply_some;
    multiply(kernels, y + row * outputs.size, from, stride, weight, outputs, bias, size);
  }
}

}  // namespace phalanx
