// Instructions that the scheduler executes itself, and those that do nothing here.
#include "fault.h"
#include "registry.h"

namespace emulation {
namespace {

void nothing(Context&) {}

void trap(Context& c) { throw Fault("trap", "the kernel trapped", c.warp.thread(std::countr_zero(c.lanes))); }

}  // namespace

void add_control(Registry& r) {
  r.add("bra", nothing, Control::branch);
  r.add("exit", nothing, Control::exit);
  r.add("bar.sync", nothing, Control::barrier);
  r.add("bar.warp.sync", nothing, Control::warp_barrier);
  r.add("nop", nothing);
  r.add("nop.whole_warp", nothing, Control::whole_warp);
  r.add("trap", trap);
}

}  // namespace emulation
