// A bfloat16 matrix [N, K] as products read it: in 12 bits a weight, with no bit lost.
//
// Of a block of 32 outputs nearly all weights share sixteen exponents. So a weight is a byte (sign, seven bits of
// mantissa) and a code of four bits into the block's table of exponents; the few whose exponent is not there, outliers,
// are zero in their place and kept in a list. A block is a row of quads, of four inputs each:
//
//   [64 bytes: inputs 0, 1] [64 bytes: inputs 2, 3] [64 codes of inputs 0, 1 in the low halves, of 2, 3 in the high ones]
//
// of which the bytes stand in the order (see `place_of`) that leaves pairs of inputs side by side, 16 outputs in a
// register, once their two bytes are interleaved within 128 bits. A block with too many outliers, or of which some rows
// have not come yet, is held plain: [quads][2][32][2] bfloat16. Inputs and outputs are filled up with zeros.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace phalanx {

constexpr size_t kBlockColumns = 32;
constexpr size_t kQuadBytes = 192, kPlainQuadBytes = 256;

/// Of a quad's 64 bytes of two inputs, the first of output `lane`; its second input's follows.
constexpr size_t place_of(size_t lane) { return lane % 16 / 4 * 16 + lane / 16 * 8 + lane % 4 * 2; }

/// Outputs of a matrix that a product makes: `size`, from the first of a block on.
struct Outputs {
  size_t first_block, size;

  size_t num_blocks() const { return (size + kBlockColumns - 1) / kBlockColumns; }
};

struct Outlier {
  uint32_t input;
  uint16_t lane;
  uint16_t value;  // bfloat16
};

struct PackedBlock {
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  alignas(16) uint8_t high[16] = {};   // by code: what the exponent puts into a weight's high byte,
  uint8_t low[16] = {};                // and into its low one; code 0 is that of exponent 0
  uint8_t* codes = nullptr;            // [quads][kQuadBytes]
  std::unique_ptr<uint8_t, Free> plain;  // [quads][kPlainQuadBytes] where it is held so, else null
  std::vector<Outlier> outliers;       // by input, then by lane
  uint32_t missing = 0;                // lanes that have not been put
};

class PackedMatrix {
 public:
  static size_t room_bytes(size_t num_outputs, size_t num_inputs);

  /// To be filled by `put`. room: `room_bytes`, which are the caller's and are not written to before weights are.
  PackedMatrix(size_t num_outputs, size_t num_inputs, uint8_t* room);
  PackedMatrix(const PackedMatrix&) = delete;
  PackedMatrix& operator=(const PackedMatrix&) = delete;

  /// Rows [first, first + num_rows), row-major. Over the threads of the pool; one caller at a time for any block.
  void put(const uint16_t* rows, size_t first, size_t num_rows);

  /// out [count, num_inputs] = the rows that `indices` names. Throws std::out_of_range for one that there is not.
  void take_rows(uint16_t* out, const int64_t* indices, size_t count) const;

  /// The same of a matrix that begins with row `first` of a larger one; zeros for rows that it has not.
  void take_held_rows(uint16_t* out, const int64_t* indices, size_t count, int64_t first) const;

  size_t num_outputs() const { return num_outputs_; }
  size_t num_inputs() const { return num_inputs_; }
  size_t num_quads() const { return num_quads_; }
  size_t num_blocks() const { return blocks_.size(); }
  const PackedBlock& block(size_t index) const { return blocks_[index]; }

  size_t num_plain() const;  // blocks that are held so
  size_t num_bytes() const;  // held, in the room and beside it

 private:
  const size_t num_outputs_, num_inputs_, num_quads_;
  std::vector<PackedBlock> blocks_;

  void put_block(size_t index, const uint16_t* rows, size_t begin, size_t end);
  bool compress(PackedBlock& block, const uint16_t* plain) const;
  template <class CodeOf>
  void encode(PackedBlock& block, const uint16_t* plain, CodeOf code_of) const;
  void interleave(uint16_t* plain, const uint16_t* rows, size_t begin, size_t end) const;
  void take_row(uint16_t* out, const PackedBlock& block, size_t lane) const;
};

}  // namespace phalanx
