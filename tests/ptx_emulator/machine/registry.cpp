// Gathers the instructions of all topics.
#include "registry.h"

#include <stdexcept>

namespace emulation {

void Registry::add(const std::string& name, Handler handler, Control control) {
  if (!entries_.emplace(name, Entry{handler, control}).second) throw std::logic_error("registered twice: " + name);
}

const Entry* Registry::find(const std::string& name) const {
  const auto found = entries_.find(name);
  return found == entries_.end() ? nullptr : &found->second;
}

const Registry& registry() {
  static const Registry all = [] {
    Registry r;
    for (const auto add :
         {add_integer, add_bits, add_floating, add_half, add_conversions, add_comparisons, add_moves, add_memory,
          add_atomics, add_copies, add_collectives, add_matrices, add_warpgroup_matrices, add_control}) {
      add(r);
    }
    return r;
  }();
  return all;
}

}  // namespace emulation
