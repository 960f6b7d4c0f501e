#include "packed.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>

#include "pool.hpp"
#include "scratch.hpp"

namespace phalanx {
namespace {

constexpr size_t kCodes = 16, kExponents = 256;
// Of a block's weights, at most so many outliers: each takes a product of its own, of all rows.
constexpr size_t kWeightsAnOutlier = 1024, kOutliersAnyway = 8;
constexpr uint8_t kSign = 0x80, kMantissa = 0x7F, kNoCode = 0xFF;

size_t divide_up(size_t total, size_t by) { return (total + by - 1) / by; }

std::unique_ptr<uint8_t, PackedBlock::Free> make_plain(size_t num_bytes) {
  std::unique_ptr<uint8_t, PackedBlock::Free> plain(static_cast<uint8_t*>(std::aligned_alloc(64, num_bytes)));
  if (!plain) throw std::bad_alloc();
  return plain;
}

uint16_t* words(uint8_t* plain) { return reinterpret_cast<uint16_t*>(plain); }

uint32_t lanes(size_t begin, size_t end) {  // [begin, end), at most 32
  return uint32_t(((uint64_t(1) << (end - begin)) - 1) << begin);
}

// The sixteen exponents that most weights have: that of zero, then the most frequent, of equals the lowest.
// Returns how many weights have another.
size_t choose_exponents(const uint16_t* plain, size_t count, uint8_t (&chosen)[kCodes]) {
  uint32_t counts[4][kExponents] = {};  // four, so that equal exponents side by side do not wait for each other
  for (size_t i = 0; i < count; i += 4) {
    for (size_t j = 0; j < 4; j++) counts[j][plain[i + j] >> 7 & 0xFF]++;
  }
  for (size_t e = 0; e < kExponents; e++) counts[0][e] += counts[1][e] + counts[2][e] + counts[3][e];
  uint8_t order[kExponents];
  std::iota(order, order + kExponents, uint8_t(0));
  std::partial_sort(order + 1, order + kCodes, order + kExponents, [&](uint8_t a, uint8_t b) {
    return counts[0][a] != counts[0][b] ? counts[0][a] > counts[0][b] : a < b;
  });
  size_t covered = 0;
  for (size_t code = 0; code < kCodes; code++) {
    chosen[code] = order[code];
    covered += counts[0][order[code]];
  }
  return count - covered;
}

}  // namespace

size_t PackedMatrix::room_bytes(size_t num_outputs, size_t num_inputs) {
  return divide_up(num_outputs, kBlockColumns) * divide_up(num_inputs, 4) * kQuadBytes;
}

PackedMatrix::PackedMatrix(size_t num_outputs, size_t num_inputs, uint8_t* room)
    : num_outputs_(num_outputs),
      num_inputs_(num_inputs),
      num_quads_(divide_up(num_inputs, 4)),
      blocks_(divide_up(num_outputs, kBlockColumns)) {
  for (size_t index = 0; index < blocks_.size(); index++) {
    blocks_[index].codes = room + index * num_quads_ * kQuadBytes;
    blocks_[index].missing = lanes(0, std::min(kBlockColumns, num_outputs - index * kBlockColumns));
  }
}

void PackedMatrix::put(const uint16_t* rows, size_t first, size_t num_rows) {
  const size_t first_block = first / kBlockColumns, end_block = divide_up(first + num_rows, kBlockColumns);
  if (num_rows == 0) return;
  parallel_for(int(end_block - first_block), [&](int index) {
    const size_t block = first_block + size_t(index), lane0 = block * kBlockColumns;
    const size_t begin = std::max(first, lane0), end = std::min(first + num_rows, lane0 + kBlockColumns);
    put_block(block, rows + (begin - first) * num_inputs_, begin - lane0, end - lane0);
  });
}

// Lanes [begin, end) of a block.
void PackedMatrix::put_block(size_t index, const uint16_t* rows, size_t begin, size_t end) {
  PackedBlock& block = blocks_[index];
  const size_t plain_bytes = num_quads_ * kPlainQuadBytes;
  if (end - begin == std::min(kBlockColumns, num_outputs_ - index * kBlockColumns)) {
    uint16_t* const whole = scratch<uint16_t>(plain_bytes / sizeof(uint16_t));
    if (end < kBlockColumns) std::memset(whole, 0, plain_bytes);
    interleave(whole, rows, begin, end);
    block.missing = 0;
    if (compress(block, whole)) {
      block.plain.reset();
      return;
    }
    if (!block.plain) block.plain = make_plain(plain_bytes);
    std::memcpy(block.plain.get(), whole, plain_bytes);
    return;
  }
  if (!block.plain) {
    auto plain = make_plain(plain_bytes);
    std::memset(plain.get(), 0, plain_bytes);
    if (block.missing == 0) {  // it was whole already
      std::vector<uint16_t> row(num_inputs_);
      for (size_t lane = 0; lane < std::min(kBlockColumns, num_outputs_ - index * kBlockColumns); lane++) {
        take_row(row.data(), block, lane);
        interleave(words(plain.get()), row.data(), lane, lane + 1);
      }
    }
    block.plain = std::move(plain);
  }
  interleave(words(block.plain.get()), rows, begin, end);
  block.missing &= ~lanes(begin, end);
  if (block.missing == 0 && compress(block, words(block.plain.get()))) block.plain.reset();
}

// Whether there are few enough outliers. The highest exponents of the block nearly always do, and are found and coded
// without a table; else it is the most frequent ones.
bool PackedMatrix::compress(PackedBlock& block, const uint16_t* plain) const {
  const size_t count = num_quads_ * kPlainQuadBytes / sizeof(uint16_t), most = kOutliersAnyway + count / kWeightsAnOutlier;
  uint16_t highest = 0;
  for (size_t i = 0; i < count; i++) highest = std::max<uint16_t>(highest, plain[i] >> 7 & 0xFF);
  const uint16_t lowest = highest > kCodes - 2 ? uint16_t(highest - (kCodes - 2)) : 1;
  size_t outside = 0;
  for (size_t first = 0; first < count; first += kPlainQuadBytes) {  // few enough to be counted in 16 bits
    uint16_t found = 0;
    for (size_t i = first; i < std::min(count, first + kPlainQuadBytes); i++) {
      const uint16_t exponent = plain[i] >> 7 & 0xFF;
      found = uint16_t(found + (exponent < lowest) - (exponent == 0));
    }
    outside += found;
  }
  block.outliers = std::vector<Outlier>();  // without the room of former ones
  uint8_t exponents[kCodes] = {};
  const bool window = outside <= most;
  if (window) {
    for (size_t code = 1; code < kCodes; code++) exponents[code] = uint8_t(lowest + code - 1);
  } else if ((outside = choose_exponents(plain, count, exponents)) > most) {
    return false;
  }
  for (size_t code = 0; code < kCodes; code++) {
    block.high[code] = exponents[code] >> 1;
    block.low[code] = uint8_t(exponents[code] << 7);
  }
  block.outliers.reserve(outside);
  if (window) {
    const int before = lowest - 1;
    encode(block, plain, [=](int exponent) {
      const int code = exponent - before;
      return uint8_t(exponent == 0 ? 0 : code > 0 ? code : kNoCode);
    });
  } else {
    uint8_t code_of[kExponents];
    std::memset(code_of, kNoCode, sizeof code_of);
    for (size_t code = 0; code < kCodes; code++) code_of[exponents[code]] = uint8_t(code);
    encode(block, plain, [&](int exponent) { return code_of[exponent]; });
  }
  std::sort(block.outliers.begin(), block.outliers.end(), [](const Outlier& a, const Outlier& b) {
    return a.input != b.input ? a.input < b.input : a.lane < b.lane;
  });
  return true;
}

// code_of: an exponent's, kNoCode for none.
template <class CodeOf>
void PackedMatrix::encode(PackedBlock& block, const uint16_t* plain, CodeOf code_of) const {
  constexpr size_t kRun = sizeof(uint64_t);  // of a pair's 64 numbers, those that stay side by side
  for (size_t pair = 0; pair < 2 * num_quads_; pair++) {
    uint8_t* const bytes = block.codes + pair / 2 * kQuadBytes + pair % 2 * 64;
    uint8_t* const codes = block.codes + pair / 2 * kQuadBytes + 128;
    const uint16_t* const from = plain + pair * 64;
    uint8_t byte[64], code[64];
    for (size_t i = 0; i < 64; i++) byte[i] = uint8_t((from[i] >> 8 & kSign) | (from[i] & kMantissa));
    for (size_t i = 0; i < 64; i++) code[i] = code_of(from[i] >> 7 & 0xFF);
    uint8_t found = 0;
    for (size_t i = 0; i < 64; i++) found |= code[i];
    for (size_t i = 0; found >= kCodes && i < 64; i++) {
      if (code[i] != kNoCode) continue;
      block.outliers.push_back({uint32_t(2 * pair + i % 2), uint16_t(i / 2), from[i]});
      byte[i] = code[i] = 0;
    }
    for (size_t first = 0; first < 64; first += kRun) {
      const size_t place = place_of(first / 2);
      uint64_t all, before = 0;
      std::memcpy(&all, code + first, kRun);
      if (pair % 2 == 1) std::memcpy(&before, codes + place, kRun);
      all = before | all << (pair % 2 * 4);
      std::memcpy(bytes + place, byte + first, kRun);
      std::memcpy(codes + place, &all, kRun);
    }
  }
}

// Rows into the lanes [begin, end) of a plain block; the others keep theirs.
void PackedMatrix::interleave(uint16_t* plain, const uint16_t* rows, size_t begin, size_t end) const {
  constexpr size_t kAtOnce = 16;  // pairs: of each row a line of the cache, read once
  const size_t pairs = 2 * num_quads_;
  for (size_t pair = 0; pair < pairs; pair += kAtOnce) {
    const size_t count = std::min(kAtOnce, pairs - pair);
    const size_t inputs = std::min(2 * count, num_inputs_ - std::min(num_inputs_, 2 * pair));
    uint16_t lines[kBlockColumns][2 * kAtOnce] = {};
    for (size_t lane = begin; lane < end; lane++) {
      std::memcpy(lines[lane], rows + (lane - begin) * num_inputs_ + 2 * pair, inputs * sizeof(uint16_t));
    }
    uint16_t* const out = plain + pair * kBlockColumns * 2;
    for (size_t k = 0; k < count; k++) {
      for (size_t lane = begin; lane < end; lane++) {
        std::memcpy(out + (k * kBlockColumns + lane) * 2, &lines[lane][2 * k], 2 * sizeof(uint16_t));
      }
    }
  }
}

void PackedMatrix::take_rows(uint16_t* out, const int64_t* indices, size_t count) const {
  for (size_t i = 0; i < count; i++) {
    if (indices[i] < 0 || size_t(indices[i]) >= num_outputs_) {
      throw std::out_of_range("row " + std::to_string(indices[i]) + " of a weight of " + std::to_string(num_outputs_) + " rows");
    }
    const size_t row = size_t(indices[i]);
    take_row(out + i * num_inputs_, blocks_[row / kBlockColumns], row % kBlockColumns);
  }
}

void PackedMatrix::take_held_rows(uint16_t* out, const int64_t* indices, size_t count, int64_t first) const {
  for (size_t i = 0; i < count; i++) {
    const int64_t index = indices[i] - first;
    uint16_t* const row = out + i * num_inputs_;
    if (index < 0 || size_t(index) >= num_outputs_) {
      std::memset(row, 0, num_inputs_ * sizeof(uint16_t));
    } else {
      take_row(row, blocks_[size_t(index) / kBlockColumns], size_t(index) % kBlockColumns);
    }
  }
}

void PackedMatrix::take_row(uint16_t* out, const PackedBlock& block, size_t lane) const {
  uint16_t exponents[kCodes];
  for (size_t code = 0; code < kCodes; code++) exponents[code] = uint16_t(block.high[code] << 8 | block.low[code]);
  for (size_t quad = 0; quad < num_quads_; quad++) {
    uint16_t values[4];
    if (block.plain) {
      const uint8_t* const from = block.plain.get() + quad * kPlainQuadBytes + lane * 4;
      std::memcpy(values, from, 4);
      std::memcpy(values + 2, from + kPlainQuadBytes / 2, 4);
    } else {
      const uint8_t* const from = block.codes + quad * kQuadBytes + place_of(lane);
      for (size_t i = 0; i < 4; i++) {
        const uint8_t byte = from[i / 2 * 64 + i % 2], code = from[128 + i % 2] >> (i / 2 * 4) & 0xF;
        values[i] = uint16_t((byte & kSign) << 8 | (byte & kMantissa) | exponents[code]);
      }
    }
    std::memcpy(out + 4 * quad, values, std::min<size_t>(4, num_inputs_ - 4 * quad) * sizeof(uint16_t));
  }
  if (block.plain) return;
  for (const Outlier& each : block.outliers) {
    if (each.lane == lane) out[each.input] = each.value;
  }
}

size_t PackedMatrix::num_plain() const {
  return size_t(std::count_if(blocks_.begin(), blocks_.end(), [](const PackedBlock& block) { return bool(block.plain); }));
}

size_t PackedMatrix::num_bytes() const {
  size_t total = blocks_.size() * sizeof(PackedBlock);
  for (const PackedBlock& block : blocks_) {
    total += num_quads_ * (block.plain ? kPlainQuadBytes : kQuadBytes) + block.outliers.capacity() * sizeof(Outlier);
  }
  return total;
}

}  // namespace phalanx
