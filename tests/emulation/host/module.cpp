// The extension module "host": how launches are treated, what was recorded, and the topics.
#include "module.h"

#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "settings.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace rk::host;

template <class T>
T chosen(const char* what, const std::map<std::string, T>& choices, const std::string& name) {
  const auto found = choices.find(name);
  if (found != choices.end()) return found->second;
  std::string names;
  for (const auto& [choice, value] : choices) names += (names.empty() ? "" : ", ") + choice;
  throw std::invalid_argument(std::string(what) + " must be one of " + names + ", got " + name);
}

void set_mode(const std::string& mode) {
  settings().mode = chosen<Mode>("mode", {{"run", Mode::kRun}, {"record", Mode::kRecord}}, mode);
}

void set_schedule(const std::string& order, uint32_t seed, const std::string& copies) {
  Settings changed = settings();
  changed.order = chosen<Order>(
      "order", {{"fifo", Order::kFifo}, {"lifo", Order::kLifo}, {"rev", Order::kReverse}, {"rand", Order::kRandom}},
      order);
  changed.seed = seed;
  changed.late_copies = chosen<bool>("copies", {{"late", true}, {"early", false}}, copies);
  settings() = changed;
}

void set_shared_limit(int bytes) { settings().shared_limit = bytes; }

py::list recorded_launches() {
  py::list launches;
  for (const Recorded& r : take_recorded()) {
    const py::bytes params(reinterpret_cast<const char*>(r.params.data()), r.params.size());
    launches.append(py::dict("name"_a = r.name, "grid"_a = py::make_tuple(r.grid[0], r.grid[1], r.grid[2]),
                             "threads"_a = r.threads, "shared_bytes"_a = r.shared_bytes, "params"_a = params));
  }
  return launches;
}

}  // namespace

PYBIND11_MODULE(host, m) {
  m.doc() = "CUDA kernels compiled for a CPU. Settings belong to the calling thread.";
  // Of this module only: another build of it may be loaded beside it.
  py::register_local_exception<KernelError>(m, "KernelError", PyExc_RuntimeError);
  m.def("set_mode", &set_mode, "mode"_a, "'run' executes launches, 'record' keeps them for take_recorded().");
  m.def("set_schedule", &set_schedule, "order"_a = "fifo", "seed"_a = 1, "copies"_a = "late",
        "Which thread goes on next: fifo, lifo, rev or rand; when asynchronous copies happen: late or early.");
  m.def("set_shared_limit", &set_shared_limit, "bytes"_a, "Dynamic shared memory that a block may have.");
  m.def("take_recorded", &recorded_launches,
        "The launches recorded since the last call: dicts of name, grid, threads, shared_bytes, params.");
  if (bind_samples) bind_samples(m);
  if (bind_kernels) bind_kernels(m);
}
