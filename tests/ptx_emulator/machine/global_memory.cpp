// Bounds, alignment and races between blocks of global memory.
#include "global_memory.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "fault.h"

namespace emulation {
namespace {

constexpr int32_t kSeveral = -1;

std::string hexadecimal(uint64_t address) {
  std::ostringstream text;
  text << "0x" << std::hex << address;
  return text.str();
}

std::string other_block(int32_t id) { return id == kSeveral ? "other blocks" : "block " + std::to_string(id - 1); }

}  // namespace

SparseMemory::SparseMemory(uint64_t base, uint64_t size, std::string fill)
    : base_(base), size_(size), fill_(std::move(fill)) {
  if (base % kPageBytes != 0) throw std::invalid_argument("a virtual region starts at a multiple of 64 KB");
  if (fill_.empty() || kPageBytes % fill_.size() != 0) throw std::invalid_argument("the fill must divide 64 KB");
}

std::byte* SparseMemory::at(uint64_t offset) {
  std::unique_ptr<std::byte[]>& page = pages_[offset / kPageBytes];
  if (!page) {
    page = std::make_unique<std::byte[]>(kPageBytes);
    for (uint64_t i = 0; i < kPageBytes; i += fill_.size()) std::memcpy(page.get() + i, fill_.data(), fill_.size());
  }
  return page.get() + offset % kPageBytes;
}

std::string SparseMemory::read(uint64_t offset, uint64_t bytes) {
  if (offset > size_ || bytes > size_ - offset) throw std::out_of_range("outside of the virtual region");
  std::string result(bytes, '\0');
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t step = std::min(bytes - done, kPageBytes - (offset + done) % kPageBytes);
    std::memcpy(result.data() + done, at(offset + done), step);
    done += step;
  }
  return result;
}

void SparseMemory::write(uint64_t offset, const std::string& bytes) {
  if (offset > size_ || bytes.size() > size_ - offset) throw std::out_of_range("outside of the virtual region");
  for (uint64_t done = 0; done < bytes.size();) {
    const uint64_t step = std::min(bytes.size() - done, kPageBytes - (offset + done) % kPageBytes);
    std::memcpy(at(offset + done), bytes.data() + done, step);
    done += step;
  }
}

GlobalMemory::GlobalMemory(std::vector<Region> regions, int granule, bool check_races)
    : granule_(granule), granule_bits_(std::countr_zero(static_cast<uint32_t>(granule))), check_races_(check_races) {
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.base < b.base; });
  for (size_t i = 1; i < regions.size(); ++i) {
    if (regions[i - 1].base + regions[i - 1].size > regions[i].base) {
      throw std::invalid_argument("two arrays of the launch overlap");
    }
  }
  for (const Region& region : regions) regions_.push_back(Tracked{region});
}

std::byte* GlobalMemory::access(uint64_t address, int bytes, Access access, int block, int thread) {
  if ((address & (bytes - 1)) != 0) {
    throw Fault("misaligned", std::to_string(bytes) + " bytes of global memory at " + hexadecimal(address), thread);
  }
  Tracked& region = find(address, bytes, thread);
  if (access != Access::load && !region.writable) {
    throw Fault("read-only", "writes a read-only array at byte " + std::to_string(address - region.base), thread);
  }
  if (check_races_) {
    const uint64_t start =
        region.base & ~static_cast<uint64_t>(granule_ - 1);  // shadow pages count from a granule's boundary
    const uint64_t per_page = kPageBytes >> granule_bits_, last = (address - start + bytes - 1) >> granule_bits_;
    for (uint64_t i = (address - start) >> granule_bits_; i <= last; ++i) {
      check_race(touches(region, i * granule_ / kPageBytes)[i & (per_page - 1)], access, block, thread);
    }
  }
  const uint64_t offset = address - region.base;
  return region.sparse ? region.sparse->at(offset) : reinterpret_cast<std::byte*>(address);
}

GlobalMemory::Touches* GlobalMemory::touches(Tracked& region, uint64_t page) const {
  if (page != region.last_number) {
    std::vector<Touches>& all = region.pages[page];
    if (all.empty()) all.resize(kPageBytes / granule_);
    region.last_number = page;
    region.last_page = all.data();
  }
  return region.last_page;
}

GlobalMemory::Tracked& GlobalMemory::find(uint64_t address, int bytes, int thread) {
  const auto holds = [&](const Tracked& region) {
    return address >= region.base && address - region.base <= region.size &&
           region.size - (address - region.base) >= static_cast<uint64_t>(bytes);
  };
  if (last_ != nullptr && holds(*last_)) return *last_;
  const auto after = std::upper_bound(regions_.begin(), regions_.end(), address,
                                      [](uint64_t value, const Tracked& region) { return value < region.base; });
  std::string nearest;
  if (after != regions_.begin()) {
    Tracked& region = *std::prev(after);
    if (holds(region)) return *(last_ = &region);
    nearest = ", byte " + std::to_string(address - region.base) + " of an array of " + std::to_string(region.size);
  }
  throw Fault("out of bounds", std::to_string(bytes) + " bytes of global memory at " + hexadecimal(address) + nearest,
              thread);
}

void GlobalMemory::check_race(Touches& touches, Access access, int block, int thread) const {
  const int32_t self = block + 1;
  const auto refuse_other = [&](int32_t id, const char* now, const char* then) {
    if (id == 0 || id == self) return;
    throw Fault("global race", std::string(now) + " what " + other_block(id) + " " + then, thread);
  };
  const auto add = [&](int32_t& id) { id = id == 0 || id == self ? self : kSeveral; };
  switch (access) {
    case Access::load:
      refuse_other(touches.writer, "reads", "wrote");
      refuse_other(touches.atomic, "reads", "changed atomically");
      return add(touches.reader);
    case Access::store:
      refuse_other(touches.writer, "writes", "wrote");
      refuse_other(touches.atomic, "writes", "changed atomically");
      refuse_other(touches.reader, "writes", "read");
      return add(touches.writer);
    case Access::atomic:
      refuse_other(touches.writer, "changes atomically", "wrote");
      refuse_other(touches.reader, "changes atomically", "read");
      return add(touches.atomic);
  }
}

}  // namespace emulation
