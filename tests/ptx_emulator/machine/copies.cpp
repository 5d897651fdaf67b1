// cp.async: issued at once, landing as late as the waits allow, or at once too.
#include "copies.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "fault.h"
#include "registry.h"

namespace emulation {
namespace {

// f(bytes, offset) for the checked pieces of the source: aligned powers of two.
template <class F>
void each_piece(Machine& machine, const Copy& copy, int thread, F f) {
  const int piece = copy.source_bytes & -copy.source_bytes;
  for (int offset = 0; offset < copy.source_bytes; offset += piece) {
    f(machine.global.access(copy.global + offset, piece, Access::load, machine.block, thread), offset, piece);
  }
}

void check_source(Machine& machine, const Copy& copy, int thread) {
  each_piece(machine, copy, thread, [](const std::byte*, int, int) {});
}

void move_bytes(Machine& machine, const Copy& copy, int thread) {
  std::byte* to = machine.shared.raw(copy.shared);
  each_piece(machine, copy, thread,
             [&](const std::byte* from, int offset, int bytes) { std::memcpy(to + offset, from, bytes); });
  std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

void finish(Context& c, int lane, const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    const int thread = c.warp.thread(lane);
    if (!c.machine.early_copies) move_bytes(c.machine, copy, thread);
    c.machine.shared.finish_copy(copy.shared, copy.bytes, thread);
  }
}

// Sources: shared address, global address, and the bytes to read where they are not all. Immediates: the offsets of the
// addresses, the bytes.
void copy_async(Context& c) {
  const int bytes = static_cast<int>(c.immediate(2));
  uint64_t addresses[kLanes];
  uint32_t reading = 0;
  each_lane_in_order(c.lanes, [&](int lane) {
    const int thread = c.warp.thread(lane);
    Copy copy;
    copy.shared = static_cast<uint32_t>(c.source_bits(0, lane) + c.immediate(0));
    copy.global = c.source_bits(1, lane) + c.immediate(1);
    copy.bytes = bytes;
    copy.source_bytes = bytes;
    if (c.instruction.sources.size() > 2) {
      const uint64_t wanted = static_cast<uint32_t>(c.source_bits(2, lane));
      if (wanted > static_cast<uint64_t>(bytes)) {
        throw Fault("bad operand",
                    "cp.async of " + std::to_string(bytes) + " bytes is to read " + std::to_string(wanted), thread);
      }
      copy.source_bytes = static_cast<int>(wanted);
    }
    if (copy.global % bytes != 0) throw Fault("misaligned", "the global address of a cp.async", thread);
    addresses[lane] = copy.global;
    if (copy.source_bytes > 0) reading |= 1u << lane;
    c.machine.shared.start_copy(copy.shared, bytes, thread);
    check_source(c.machine, copy, thread);
    if (c.machine.early_copies) move_bytes(c.machine, copy, thread);
    c.warp.copies[lane].uncommitted.push_back(copy);
  });
  c.machine.counters.count_global(addresses, reading, bytes);
}

void commit(Context& c) {
  each_lane_in_order(c.lanes, [&](int lane) {
    CopyQueue& queue = c.warp.copies[lane];
    queue.groups.push_back(std::move(queue.uncommitted));
    queue.uncommitted.clear();
  });
}

// Immediate 0: how many of the newest groups may stay in flight.
void wait_group(Context& c) {
  const size_t pending = static_cast<size_t>(c.immediate(0));
  each_lane_in_order(c.lanes, [&](int lane) {
    CopyQueue& queue = c.warp.copies[lane];
    while (queue.groups.size() > pending) {
      finish(c, lane, queue.groups.front());
      queue.groups.pop_front();
    }
  });
}

void wait_all(Context& c) {
  commit(c);
  each_lane_in_order(c.lanes, [&](int lane) {
    CopyQueue& queue = c.warp.copies[lane];
    for (const std::vector<Copy>& group : queue.groups) finish(c, lane, group);
    queue.groups.clear();
  });
}

}  // namespace

bool copies_in_flight(const Warp& warp, int lane) {
  const CopyQueue& queue = warp.copies[lane];
  const auto has_copies = [](const std::vector<Copy>& group) { return !group.empty(); };
  return has_copies(queue.uncommitted) || std::any_of(queue.groups.begin(), queue.groups.end(), has_copies);
}

void add_copies(Registry& r) {
  r.add("cp.async", copy_async);
  r.add("cp.async.commit_group", commit);
  r.add("cp.async.wait_group", wait_group);
  r.add("cp.async.wait_all", wait_all);
}

}  // namespace emulation
