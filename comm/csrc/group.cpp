#include "group.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "operators.hpp"

namespace phalanx {

Group::Group(uintptr_t address, const Layout& layout, int rank, std::vector<int> pidfds, bool may_spin, int64_t window,
             Interrupted interrupted)
    : segment_(address, layout),
      waiter_(segment_, rank, std::move(pidfds), may_spin, interrupted),
      rank_(rank),
      size_(layout.size),
      window_(window),
      epoch_(segment_.of_rank(rank, layout.epoch)),
      cursor_(segment_.of_rank(rank, layout.cursor)),
      slots_(size_t(layout.size)),
      inputs_(size_t(layout.size)) {}

Outcome Group::aborted() const {
  int64_t by = segment_.word(segment_.at.aborted).load(std::memory_order_acquire);
  return by ? Outcome{End::kAborted, int(by) - 1} : Outcome{};
}

// ---- rounds ----

Outcome Group::until_all(int64_t target, Deadline& deadline) {
  for (int rank = 0; rank < size_; rank++) {
    if (rank == rank_) continue;
    Outcome outcome = waiter_.until(segment_.of_rank(rank, segment_.at.epoch), rank, target, deadline);
    if (!outcome) return outcome;
  }
  return {};
}

Outcome Group::next(size_t num_bytes, Deadline& deadline) {
  const Layout& at = segment_.at;
  auto end_of = [&](size_t block) -> Word& { return segment_.of_rank(rank_, at.ends + block % at.num_blocks); };
  const size_t taken = at.header_bytes + (num_bytes + 63) / 64 * 64;
  size_t place = size_t(cursor_.load(std::memory_order_relaxed));
  const size_t block = place ? (place - 1) / at.block_bytes : 0, border = (block + 1) * at.block_bytes;
  int64_t needed = 0;
  if (place + taken > border) {
    place = border;
    end_of(block).store(epoch(), std::memory_order_relaxed);
    if (int64_t end = end_of(block + 1).load(std::memory_order_relaxed)) needed = end + window_;
  }
  cursor_.store(int64_t(place + taken), std::memory_order_relaxed);
  for (int rank = 0; rank < size_; rank++) slots_[size_t(rank)] = segment_.in_arena(rank, place);
  return until_all(needed, deadline);
}

void Group::publish(int64_t call) {
  *slots_[size_t(rank_)].header = call;
  waiter_.raise_for_all(epoch_, epoch() + 1);
}

Outcome Group::confirm(int rank, int64_t call) const {
  int64_t header = *slots_[size_t(rank)].header;
  return header == call ? Outcome{} : Outcome{End::kUnlike, rank, header, call};
}

Outcome Group::meet(int64_t call, Deadline& deadline) {
  publish(call);
  // Whoever is still missing when those before it are all here comes after them; where nobody is, this rank does.
  int last = rank_;
  Outcome outcome;
  for (int rank = 0; outcome && rank < size_; rank++) {
    if (rank == rank_) continue;
    const Word& theirs = segment_.of_rank(rank, segment_.at.epoch);
    if (theirs.load(std::memory_order_acquire) >= epoch()) continue;
    last = rank;
    outcome = waiter_.until(theirs, rank, epoch(), deadline);
  }
  if (last_ < 0) last_ = last;  // later rounds tell who is slow to copy
  for (int rank = 0; outcome && rank < size_; rank++) {
    if (rank != rank_) outcome = confirm(rank, call);
  }
  return outcome;
}

// ---- collectives ----

Outcome Group::all_reduce(char* x, size_t num_bytes, int dtype, bool max, double timeout_s) {
  const int64_t call = signature(kAllReduce, num_bytes, dtype);
  const Combine combine = (max ? kernels().max : kernels().sum)[dtype];
  const size_t item = item_bytes(dtype), count = num_bytes / item;
  Deadline deadline{timeout_s};
  const size_t step = segment_.at.round_bytes / item;
  const bool whole = size_ == 2 || num_bytes <= segment_.at.small_bytes;
  for (size_t done = 0; done < count; done += step) {
    size_t part = std::min(step, count - done);
    Outcome outcome = whole ? reduce_whole(x + done * item, part, dtype, combine, call, deadline)
                            : reduce_shared(x + done * item, part, dtype, combine, call, deadline);
    if (!outcome) return outcome;
  }
  return {};
}

Outcome Group::reduce_whole(char* x, size_t count, int dtype, Combine combine, int64_t call, Deadline& deadline) {
  const size_t num_bytes = count * item_bytes(dtype);
  Outcome outcome = next(num_bytes, deadline);
  if (!outcome) return outcome;
  std::memcpy(slots_[size_t(rank_)].data, x, num_bytes);
  outcome = meet(call, deadline);
  if (!outcome) return outcome;
  for (int rank = 0; rank < size_; rank++) inputs_[size_t(rank)] = rank == rank_ ? x : slots_[size_t(rank)].data;
  combine(x, inputs_.data(), size_, count);
  return {};
}

Outcome Group::reduce_shared(char* x, size_t count, int dtype, Combine combine, int64_t call, Deadline& deadline) {
  const size_t item = item_bytes(dtype);
  auto bound = [&](int rank) { return count * size_t(rank) / size_t(size_) * item; };
  Outcome outcome = next(count * item, deadline);
  if (!outcome) return outcome;
  const size_t start = bound(rank_), stop = bound(rank_ + 1);
  char* own = slots_[size_t(rank_)].data;
  std::memcpy(own, x, start);
  std::memcpy(own + stop, x + stop, count * item - stop);
  outcome = meet(call, deadline);
  if (!outcome) return outcome;
  for (int rank = 0; rank < size_; rank++) {
    inputs_[size_t(rank)] = (rank == rank_ ? x : slots_[size_t(rank)].data) + start;
  }
  combine(x + start, inputs_.data(), size_, (stop - start) / item);
  // The sum takes the place, in the rank's own slot, of the one share there that no other rank reads.
  std::memcpy(own + start, x + start, stop - start);
  outcome = meet(call, deadline);
  if (!outcome) return outcome;
  for (int rank = 0; rank < size_; rank++) {
    if (rank == rank_) continue;
    std::memcpy(x + bound(rank), slots_[size_t(rank)].data + bound(rank), bound(rank + 1) - bound(rank));
  }
  return {};
}

Outcome Group::all_reduce_rms_norm(char* x, char* sum, const char* residual, const char* weight, float eps,
                                   size_t num_rows, size_t width, int dtype, double timeout_s) {
  Outcome outcome = all_reduce(x, num_rows * width * item_bytes(dtype), dtype, false, timeout_s);
  if (outcome) operators().add_rms_norm[dtype](x, sum, x, residual, weight, eps, num_rows, width);
  return outcome;
}

Outcome Group::all_gather(char* output, const char* x, const std::vector<size_t>& counts, int dtype, double timeout_s) {
  Deadline deadline{timeout_s};
  std::vector<size_t> starts(counts.size() + 1, 0);
  for (size_t rank = 0; rank < counts.size(); rank++) starts[rank + 1] = starts[rank] + counts[rank];
  const int64_t call = signature(kAllGather, starts.back(), dtype);
  const size_t own = size_t(rank_), longest = *std::max_element(counts.begin(), counts.end());
  std::memcpy(output + starts[own], x, counts[own]);
  const size_t step = segment_.at.round_bytes;
  for (size_t done = 0; done < longest; done += step) {
    auto held = [&](size_t rank) { return counts[rank] > done ? std::min(step, counts[rank] - done) : 0; };
    Outcome outcome = next(std::min(step, longest - done), deadline);
    if (!outcome) return outcome;
    std::memcpy(slots_[own].data, x + std::min(done, counts[own]), held(own));
    outcome = meet(call, deadline);
    if (!outcome) return outcome;
    for (size_t rank = 0; rank < counts.size(); rank++) {
      if (rank != own) std::memcpy(output + starts[rank] + done, slots_[rank].data, held(rank));
    }
  }
  return {};
}

Outcome Group::reduce_scatter(char* output, const char* x, const std::vector<size_t>& counts, int dtype, double timeout_s) {
  Deadline deadline{timeout_s};
  const size_t item = item_bytes(dtype), ranks = counts.size(), own = size_t(rank_);
  std::vector<size_t> starts(ranks + 1, 0);
  for (size_t rank = 0; rank < ranks; rank++) starts[rank + 1] = starts[rank] + counts[rank];
  const int64_t call = signature(kReduceScatter, starts.back() * item, dtype);
  const size_t longest = *std::max_element(counts.begin(), counts.end());
  const size_t step = std::min(longest, segment_.at.round_bytes / (item * ranks));  // a slot has a section for each rank
  for (size_t done = 0; done < longest; done += step) {
    auto held = [&](size_t rank) { return counts[rank] > done ? std::min(step, counts[rank] - done) : 0; };
    Outcome outcome = next(step * item * ranks, deadline);
    if (!outcome) return outcome;
    for (size_t rank = 0; rank < ranks; rank++) {
      if (rank == own || held(rank) == 0) continue;
      std::memcpy(slots_[own].data + rank * step * item, x + (starts[rank] + done) * item, held(rank) * item);
    }
    outcome = meet(call, deadline);
    if (!outcome) return outcome;
    if (held(own) == 0) continue;
    for (size_t rank = 0; rank < ranks; rank++) {
      inputs_[rank] = rank == own ? x + (starts[own] + done) * item : slots_[rank].data + own * step * item;
    }
    kernels().sum[dtype](output + done * item, inputs_.data(), size_, held(own));
  }
  return {};
}

Outcome Group::broadcast(char* x, size_t num_bytes, int dtype, int root, double timeout_s) {
  const int64_t call = signature(kBroadcast, num_bytes, dtype, root);
  Deadline deadline{timeout_s};
  const size_t step = segment_.at.round_bytes;
  const Word& root_epoch = segment_.of_rank(root, segment_.at.epoch);
  for (size_t done = 0; done < num_bytes; done += step) {
    const size_t part = std::min(step, num_bytes - done);
    Outcome outcome = next(part, deadline);
    if (!outcome) return outcome;
    char* data = slots_[size_t(root)].data;
    if (root == rank_) std::memcpy(data, x + done, part);
    publish(call);
    if (root == rank_) continue;
    outcome = waiter_.until(root_epoch, root, epoch(), deadline);
    if (outcome) outcome = confirm(root, call);
    if (!outcome) return outcome;
    std::memcpy(x + done, data, part);
  }
  return {};
}

Outcome Group::barrier(double timeout_s) {
  const int64_t call = kBarrier;
  Deadline deadline{timeout_s};
  Outcome outcome = next(0, deadline);
  return outcome ? meet(call, deadline) : outcome;
}

// ---- between two ranks ----

Outcome Group::send(const char* x, size_t num_bytes, int dtype, int to, double timeout_s) {
  const int64_t call = signature(kSend, num_bytes, dtype);
  Deadline deadline{timeout_s};
  Word& produced = segment_.produced(rank_, to);
  const Word& consumed = segment_.consumed(rank_, to);
  const size_t step = segment_.at.ring_bytes;
  for (size_t done = 0; done < num_bytes; done += step) {
    const int64_t count = produced.load(std::memory_order_relaxed);
    Outcome outcome = waiter_.until(consumed, to, count + 1 - int64_t(segment_.at.num_ring), deadline);
    if (!outcome) return outcome;
    Slot slot = segment_.ring(rank_, to, size_t(count) % segment_.at.num_ring);
    std::memcpy(slot.data, x + done, std::min(step, num_bytes - done));
    *slot.header = call;
    waiter_.raise_for(to, produced, count + 1);
  }
  return {};
}

Outcome Group::recv(char* x, size_t num_bytes, int dtype, int source, double timeout_s) {
  const int64_t call = signature(kSend, num_bytes, dtype);
  Deadline deadline{timeout_s};
  const Word& produced = segment_.produced(source, rank_);
  Word& consumed = segment_.consumed(source, rank_);
  const size_t step = segment_.at.ring_bytes;
  for (size_t done = 0; done < num_bytes; done += step) {
    const int64_t count = consumed.load(std::memory_order_relaxed);
    Outcome outcome = waiter_.until(produced, source, count + 1, deadline);
    if (!outcome) return outcome;
    Slot slot = segment_.ring(source, rank_, size_t(count) % segment_.at.num_ring);
    if (*slot.header != call) return {End::kUnlike, source, *slot.header, call};
    std::memcpy(x + done, slot.data, std::min(step, num_bytes - done));
    waiter_.raise_for(source, consumed, count + 1);
  }
  return {};
}

}  // namespace phalanx
