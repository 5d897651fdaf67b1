// The interpreter for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <tuple>

#include "fault.h"
#include "registry.h"
#include "scheduler.h"

namespace py = pybind11;

namespace emulation {
namespace {

using Operands = std::vector<std::tuple<int, bool>>;  // offset, wide

std::vector<Operand> operands(const Operands& given) {
  std::vector<Operand> result;
  for (const auto& [offset, wide] : given) result.push_back(Operand{offset, wide});
  return result;
}

void add_instruction(Program& program, const std::string& name, const Operands& destinations, const Operands& sources,
                     const std::vector<int64_t>& immediates, std::optional<int> predicate, bool negated, int target,
                     int line) {
  const Entry* entry = registry().find(name);
  if (entry == nullptr) throw std::invalid_argument("unknown instruction: " + name);
  program.instructions.push_back(Instruction{name, entry->handler, entry->control, operands(destinations),
                                             operands(sources), immediates, predicate.value_or(-1), negated, target,
                                             line});
}

void add_constant(Program& program, int offset, bool wide, uint64_t value) {
  program.constants.push_back(Constant{{offset, wide}, value});
}

// Real memory: base, bytes, writable. Sparse memory with whether it is writable.
using RealRegion = std::tuple<uint64_t, uint64_t, bool>;
using SparseRegion = std::tuple<SparseMemory*, bool>;

std::optional<Fault> run(const Program& program, const Launch& launch, const std::vector<RealRegion>& real,
                         const std::vector<SparseRegion>& sparse, const std::string& parameters, bool early_copies,
                         bool check_uninitialised, bool check_block_races, Counters& counters) {
  std::vector<Region> regions;
  for (const auto& [base, size, writable] : real) regions.push_back(Region{base, size, writable, nullptr});
  for (const auto& [memory, writable] : sparse) {
    regions.push_back(Region{memory->base(), memory->size(), writable, memory});
  }
  const py::gil_scoped_release release;
  GlobalMemory global(std::move(regions), program.global_granule, check_block_races);
  const int threads = launch.threads[0] * launch.threads[1] * launch.threads[2];
  SharedMemory shared(program.static_shared_bytes + launch.dynamic_shared_bytes, program.shared_granule,
                      (threads + kLanes - 1) / kLanes, check_uninitialised);
  const auto* bytes = reinterpret_cast<const std::byte*>(parameters.data());
  Machine machine{global, shared, counters, {bytes, bytes + parameters.size()}, early_copies};
  try {
    Scheduler(program, launch, machine).run();
  } catch (const Fault& fault) {
    return fault;
  }
  return std::nullopt;
}

Launch make_launch(std::array<int, 3> grid, std::array<int, 3> threads, int dynamic_shared_bytes, Order order,
                   int64_t instruction_limit, uint32_t seed, const std::vector<int>& blocks) {
  Launch launch{{}, {}, dynamic_shared_bytes, order, instruction_limit, seed, blocks};
  std::copy(grid.begin(), grid.end(), launch.grid);
  std::copy(threads.begin(), threads.end(), launch.threads);
  return launch;
}

}  // namespace
}  // namespace emulation

PYBIND11_MODULE(ptx_machine, m) {
  using namespace emulation;
  m.attr("SPECIAL_REGISTERS") = kSpecialRegisters;
  m.attr("LANES") = kLanes;

  py::enum_<Order>(m, "Order", py::module_local())
      .value("forward", Order::forward)
      .value("backward", Order::backward)
      .value("random", Order::random);

  py::class_<Program>(m, "Program", py::module_local())
      .def(py::init<>())
      .def("add_instruction", &add_instruction)
      .def("add_constant", &add_constant)
      .def_readwrite("special", &Program::special)
      .def_readwrite("constant_bytes", &Program::constant_bytes)
      .def_readwrite("register_bytes", &Program::register_bytes)
      .def_readwrite("shared_granule", &Program::shared_granule)
      .def_readwrite("global_granule", &Program::global_granule)
      .def_readwrite("static_shared_bytes", &Program::static_shared_bytes);

  py::class_<Launch>(m, "Launch", py::module_local()).def(py::init(&make_launch));

  py::class_<Fault>(m, "Fault", py::module_local())
      .def_readonly("kind", &Fault::kind)
      .def_property_readonly("detail", [](const Fault& fault) { return std::string(fault.what()); })
      .def_readonly("thread", &Fault::thread)
      .def_readonly("line", &Fault::line)
      .def_property_readonly("block",
                             [](const Fault& f) { return py::make_tuple(f.block[0], f.block[1], f.block[2]); });

  py::class_<Counters>(m, "Counters", py::module_local())
      .def(py::init<>())
      .def_readonly("warp_instructions", &Counters::warp_instructions)
      .def_readonly("mma", &Counters::mma)
      .def_readonly("global_requests", &Counters::global_requests)
      .def_readonly("global_sectors", &Counters::global_sectors)
      .def_readonly("ideal_sectors", &Counters::ideal_sectors)
      .def_readonly("global_bytes", &Counters::global_bytes)
      .def_readonly("shared_wavefronts", &Counters::shared_wavefronts)
      .def_readonly("ideal_wavefronts", &Counters::ideal_wavefronts)
      .def_readonly("executed", &Counters::executed);

  py::class_<SparseMemory>(m, "SparseMemory", py::module_local())
      .def(py::init([](uint64_t base, uint64_t size, const py::bytes& fill) {
        return std::make_unique<SparseMemory>(base, size, std::string(fill));
      }))
      .def("read",
           [](SparseMemory& memory, uint64_t offset, uint64_t size) { return py::bytes(memory.read(offset, size)); })
      .def("write", [](SparseMemory& memory, uint64_t offset, const py::bytes& data) { memory.write(offset, data); })
      .def_property_readonly("base", &SparseMemory::base)
      .def_property_readonly("size", &SparseMemory::size)
      .def_property_readonly("touched_bytes", &SparseMemory::touched_bytes);

  m.def("run", &run);
}
