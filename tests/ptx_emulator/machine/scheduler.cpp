// Blocks, warps and divergence: which lanes execute which instruction next.
#include "scheduler.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "copies.h"
#include "fault.h"

namespace emulation {
namespace {

constexpr int kPoison = 0xff;  // NaN in every float format
constexpr int kLongestTurn = 200;

bool can_run(const Warp& warp) {
  return std::any_of(warp.groups.begin(), warp.groups.end(),
                     [](const Group& group) { return group.state == Group::State::ready; });
}

// The group that is furthest behind, so that the others can catch it up and join.
size_t furthest_behind(const Warp& warp) {
  size_t best = warp.groups.size();
  for (size_t i = 0; i < warp.groups.size(); ++i) {
    const Group& group = warp.groups[i];
    if (group.state == Group::State::ready && (best == warp.groups.size() || group.pc < warp.groups[best].pc)) best = i;
  }
  return best;
}

// Merges into a group those at the same instruction. Gives its index then.
size_t join(Warp& warp, size_t index) {
  std::vector<Group>& groups = warp.groups;
  for (size_t i = 0; i < groups.size();) {
    if (i == index || groups[i].pc != groups[index].pc || groups[i].state == Group::State::at_barrier) {
      ++i;
      continue;
    }
    groups[index].lanes |= groups[i].lanes;
    groups.erase(groups.begin() + i);
    if (i < index) --index;
  }
  return index;
}

std::vector<int> first_numbers(int count) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

std::vector<int> in_order(std::vector<int> numbers, Order order) {
  if (order == Order::backward) std::reverse(numbers.begin(), numbers.end());
  return numbers;
}

}  // namespace

Scheduler::Scheduler(const Program& program, const Launch& launch, Machine& machine)
    : program_(program),
      launch_(launch),
      machine_(machine),
      threads_(launch.threads[0] * launch.threads[1] * launch.threads[2]),
      warps_((threads_ + kLanes - 1) / kLanes),
      random_(launch.seed + 1) {
  registers_.resize(warps_.size() * program.register_bytes);
  for (size_t i = 0; i < warps_.size(); ++i) {
    warps_[i].id = static_cast<int>(i);
    warps_[i].registers = registers_.data() + i * program.register_bytes;
    for (const Constant& constant : program.constants) {
      for (int lane = 0; lane < kLanes; ++lane) write_bits(warps_[i], constant.at, lane, constant.value);
    }
  }
  machine_.counters.executed.assign(program.instructions.size(), 0);
}

void Scheduler::run() {
  const bool some = !launch_.blocks.empty();
  std::vector<int> numbers = in_order(
      some ? launch_.blocks : first_numbers(launch_.grid[0] * launch_.grid[1] * launch_.grid[2]), launch_.order);
  if (launch_.order == Order::random) std::shuffle(numbers.begin(), numbers.end(), random_);
  for (const int number : numbers) {
    try {
      run_block(number);
    } catch (Fault& fault) {
      std::copy(block_, block_ + 3, fault.block);
      throw;
    }
  }
}

void Scheduler::run_block(int number) {
  start_block(number);
  std::vector<int> order = in_order(first_numbers(static_cast<int>(warps_.size())), launch_.order);
  while (live_threads_ > 0) {
    if (launch_.order == Order::random) std::shuffle(order.begin(), order.end(), random_);
    bool progress = false;
    for (const int id : order) {
      if (!can_run(warps_[id])) continue;
      progress = true;
      const bool limited = launch_.order == Order::random;
      run_warp(warps_[id], limited ? 1 + static_cast<int>(random_() % kLongestTurn) : std::numeric_limits<int>::max());
    }
    if (!progress) report_deadlock();
  }
}

void Scheduler::start_block(int number) {
  machine_.block = number;
  block_[0] = number % launch_.grid[0];
  block_[1] = number / launch_.grid[0] % launch_.grid[1];
  block_[2] = number / (launch_.grid[0] * launch_.grid[1]);
  machine_.shared.start_block();
  live_threads_ = threads_;
  executed_ = 0;
  std::fill_n(barriers_, kBarriers, Barrier{});
  for (Warp& warp : warps_) {
    const int lanes = std::min(kLanes, threads_ - warp.id * kLanes);
    warp.live = kAllLanes >> (kLanes - lanes);
    warp.groups = {Group{0, warp.live}};
    for (CopyQueue& queue : warp.copies) queue = {};
    std::memset(warp.registers + program_.constant_bytes, kPoison, program_.register_bytes - program_.constant_bytes);
    set_special_registers(warp);
  }
}

void Scheduler::set_special_registers(Warp& warp) const {
  const int* threads = launch_.threads;
  const int* grid = launch_.grid;
  const int dynamic_bytes = launch_.dynamic_shared_bytes;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int thread = warp.thread(lane);
    const uint32_t self = 1u << lane;
    // In the order of kSpecialRegisters.
    const uint32_t values[] = {static_cast<uint32_t>(thread % threads[0]),
                               static_cast<uint32_t>(thread / threads[0] % threads[1]),
                               static_cast<uint32_t>(thread / (threads[0] * threads[1])),
                               static_cast<uint32_t>(threads[0]),
                               static_cast<uint32_t>(threads[1]),
                               static_cast<uint32_t>(threads[2]),
                               static_cast<uint32_t>(block_[0]),
                               static_cast<uint32_t>(block_[1]),
                               static_cast<uint32_t>(block_[2]),
                               static_cast<uint32_t>(grid[0]),
                               static_cast<uint32_t>(grid[1]),
                               static_cast<uint32_t>(grid[2]),
                               static_cast<uint32_t>(lane),
                               static_cast<uint32_t>(warp.id),
                               static_cast<uint32_t>(warps_.size()),
                               self,
                               self - 1,
                               self | (self - 1),
                               ~(self | (self - 1)),
                               ~(self - 1),
                               static_cast<uint32_t>(dynamic_bytes),
                               static_cast<uint32_t>(machine_.shared.size())};
    for (size_t i = 0; i < program_.special.size(); ++i) {
      if (program_.special[i] >= 0) write_bits(warp, Operand{program_.special[i], false}, lane, values[i]);
    }
  }
}

void Scheduler::run_warp(Warp& warp, int quantum) {
  for (int i = 0; i < quantum; ++i) {
    size_t group = furthest_behind(warp);
    if (group == warp.groups.size()) return;
    if (warp.groups.size() > 1) group = join(warp, group);
    const Instruction& instruction = program_.instructions[warp.groups[group].pc];
    const int first_thread = warp.thread(std::countr_zero(warp.groups[group].lanes));
    try {
      step(warp, group);
    } catch (Fault& fault) {
      if (fault.line < 0) fault.line = instruction.line;
      if (fault.thread < 0) fault.thread = first_thread;
      throw;
    }
  }
}

void Scheduler::step(Warp& warp, size_t index) {
  Group& group = warp.groups[index];
  const int32_t pc = group.pc;
  const Instruction& instruction = program_.instructions[pc];
  const uint32_t active = guarded(warp, instruction, group.lanes);
  Step result = Step::done;
  switch (instruction.control) {
    case Control::plain:
      if (active != 0) execute(warp, instruction, active);
      break;
    case Control::branch:
      return branch(warp, index, active);
    case Control::exit:
      return exit_lanes(warp, index, active);
    case Control::barrier:
      result = barrier(warp, index, active);
      break;
    case Control::collective:
    case Control::warp_barrier:
      result = collective(warp, instruction, group.lanes, active);
      break;
    case Control::whole_warp:
      result = whole_warp(warp, instruction, group.lanes, active);
      break;
  }
  if (result == Step::done) ++group.pc;
  if (result == Step::must_wait) group.state = Group::State::at_collective;
}

uint32_t Scheduler::guarded(const Warp& warp, const Instruction& instruction, uint32_t lanes) const {
  if (instruction.predicate < 0) return lanes;
  uint32_t passing = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool value = read_bits(warp, Operand{instruction.predicate, false}, lane) != 0;
    passing |= static_cast<uint32_t>(value != instruction.negated) << lane;
  }
  return lanes & passing;
}

void Scheduler::execute(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  if (++executed_ > launch_.instruction_limit) {
    throw Fault("no progress", "the block has executed " + std::to_string(executed_) + " warp instructions");
  }
  ++machine_.counters.warp_instructions;
  ++machine_.counters.executed[&instruction - program_.instructions.data()];
  Context context{instruction, warp, lanes, machine_};
  instruction.handler(context);
}

void Scheduler::branch(Warp& warp, size_t index, uint32_t taken) {
  Group& group = warp.groups[index];
  const Instruction& instruction = program_.instructions[group.pc];
  execute(warp, instruction, group.lanes);
  const uint32_t falling_through = group.lanes & ~taken;
  const int32_t next = group.pc + 1;
  if (taken == 0) {
    group.pc = next;
    return;
  }
  group.pc = instruction.target;
  group.lanes = taken;
  if (falling_through != 0) warp.groups.push_back(Group{next, falling_through});
}

void Scheduler::exit_lanes(Warp& warp, size_t index, uint32_t exiting) {
  Group& group = warp.groups[index];
  const Instruction& instruction = program_.instructions[group.pc];
  execute(warp, instruction, group.lanes);
  each_lane_in_order(exiting, [&](int lane) {
    if (copies_in_flight(warp, lane)) {
      throw Fault("copy in flight", "a thread exits without waiting for its cp.async", warp.thread(lane));
    }
  });
  warp.live &= ~exiting;
  live_threads_ -= std::popcount(exiting);
  group.lanes &= ~exiting;
  ++group.pc;
  if (group.lanes == 0) warp.groups.erase(warp.groups.begin() + index);
  // Those that wait for lanes which are gone now look again.
  for (Group& other : warp.groups) {
    if (other.state == Group::State::at_collective) other.state = Group::State::ready;
  }
  for (int id = 0; id < kBarriers; ++id) release_if_complete(id);
}

// Lanes of a warp may name different masks, each met in full by the lanes that name it.
Scheduler::Step Scheduler::collective(Warp& warp, const Instruction& instruction, uint32_t present, uint32_t active) {
  const Operand mask_source = instruction.sources.back();
  uint32_t parts[kLanes];
  int count = 0;
  for (uint32_t rest = active; rest != 0;) {
    const int first = std::countr_zero(rest);
    const uint32_t mask = static_cast<uint32_t>(read_bits(warp, mask_source, first));
    uint32_t naming = 0;
    each_lane_in_order(active, [&](int lane) {
      if (static_cast<uint32_t>(read_bits(warp, mask_source, lane)) == mask) naming |= 1u << lane;
    });
    const uint32_t members = mask & warp.live;
    if ((naming & ~mask) != 0) {
      throw Fault("divergent collective", "a lane is not in its own member mask",
                  warp.thread(std::countr_zero(naming & ~mask)));
    }
    if ((members & ~present) != 0) return Step::must_wait;
    if (naming != members) {
      throw Fault("divergent collective", "lanes of a member mask are predicated off or name another mask",
                  warp.thread(std::countr_zero(members & ~naming)));
    }
    parts[count++] = naming;
    rest &= ~naming;
  }
  for (int i = 0; i < count; ++i) execute(warp, instruction, parts[i]);
  if (count > 0 && instruction.control == Control::warp_barrier) machine_.shared.clocks().synchronize_warp(warp.id);
  return Step::done;
}

Scheduler::Step Scheduler::whole_warp(Warp& warp, const Instruction& instruction, uint32_t present, uint32_t active) {
  if (warp.live != kAllLanes) throw Fault("divergent collective", "a lane of the warp does not exist or has exited");
  if (present != warp.live) return Step::must_wait;
  if (active == 0) return Step::done;
  if (active != present) {
    throw Fault("divergent collective", "some lanes are predicated off",
                warp.thread(std::countr_zero(present & ~active)));
  }
  execute(warp, instruction, active);
  return Step::done;
}

// Sources: the number of the barrier, and the number of threads where it is not all. Immediates: whether the warp
// arrives as one, whether it waits.
Scheduler::Step Scheduler::barrier(Warp& warp, size_t index, uint32_t active) {
  Group& group = warp.groups[index];
  const Instruction& instruction = program_.instructions[group.pc];
  const bool aligned = instruction.immediates[0] != 0, waits = instruction.immediates[1] != 0;
  if (aligned && group.lanes != warp.live) return Step::must_wait;
  if (active == 0) return Step::done;
  if (active != group.lanes) {
    throw Fault("divergent barrier", "some lanes are predicated off",
                warp.thread(std::countr_zero(group.lanes & ~active)));
  }
  const int first = std::countr_zero(active);
  const uint64_t id = read_bits(warp, instruction.sources[0], first);
  if (id >= kBarriers) throw Fault("bad operand", "there is no barrier " + std::to_string(id));
  const bool counted = instruction.sources.size() > 1;
  const int expected = counted ? static_cast<int>(read_bits(warp, instruction.sources[1], first)) : 0;
  if (expected % kLanes != 0) throw Fault("bad operand", "a barrier for a part of a warp");
  Barrier& barrier = barriers_[id];
  if (barrier.arrived > 0 && barrier.expected != expected) {
    throw Fault("divergent barrier", "threads disagree on how many the barrier is for");
  }
  execute(warp, instruction, active);
  barrier.expected = expected;
  barrier.arrived += counted && aligned ? kLanes : std::popcount(active);
  machine_.shared.clocks().arrive(static_cast<int>(id), warp.id);
  if (waits) {
    group.state = Group::State::at_barrier;
    group.barrier = static_cast<int>(id);
  } else {
    ++group.pc;
  }
  release_if_complete(static_cast<int>(id));
  return Step::handled;
}

void Scheduler::release_if_complete(int id) {
  Barrier& barrier = barriers_[id];
  const int expected = barrier.expected == 0 ? live_threads_ : barrier.expected;
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  for (Warp& warp : warps_) {
    for (Group& group : warp.groups) {
      if (group.state != Group::State::at_barrier || group.barrier != id) continue;
      group.state = Group::State::ready;
      ++group.pc;
      machine_.shared.clocks().leave(id, warp.id);
    }
  }
  machine_.shared.clocks().reset(id);
  barrier = Barrier{};
}

void Scheduler::report_deadlock() {
  Fault fault("deadlock", "");
  for (const Warp& warp : warps_) {
    for (const Group& group : warp.groups) {
      const Instruction& instruction = program_.instructions[group.pc];
      const bool collective = group.state == Group::State::at_collective;
      const bool at_barrier = instruction.control == Control::barrier;
      std::string kind = "deadlock", detail;
      if (collective) {
        kind = at_barrier ? "divergent barrier" : "divergent collective";
        detail = std::to_string(std::popcount(group.lanes)) + " of " + std::to_string(std::popcount(warp.live)) +
                 " live lanes of warp " + std::to_string(warp.id) + " wait for others that never come";
      } else {
        const Barrier& barrier = barriers_[group.barrier];
        const int expected = barrier.expected == 0 ? live_threads_ : barrier.expected;
        detail = std::to_string(barrier.arrived) + " of " + std::to_string(expected) + " threads wait at barrier " +
                 std::to_string(group.barrier) + " for others that never come";
      }
      // Diverged lanes are the likelier cause, a barrier that is not complete the consequence.
      if (fault.line >= 0 && !collective) continue;
      fault = Fault(kind, detail, warp.thread(std::countr_zero(group.lanes)));
      fault.line = instruction.line;
      if (collective) throw fault;
    }
  }
  throw fault;
}

}  // namespace emulation
