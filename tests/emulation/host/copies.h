// The asynchronous copies of a thread: they happen at the last moment that is allowed, when they are waited for.
#pragma once
#include <cstddef>
#include <cstring>
#include <vector>

namespace rk::host {

constexpr int kCopyBytes = 16;

struct Copy {
  void* to;
  const void* from;
  int bytes;  // the rest of kCopyBytes becomes zero

  void happen() const {
    if (bytes > 0) std::memcpy(to, from, bytes);
    std::memset(static_cast<unsigned char*>(to) + bytes, 0, kCopyBytes - bytes);
  }
};

class Copies {
 public:
  void clear() {
    copies_.clear();
    group_ends_.clear();
  }
  bool in_flight() const { return !copies_.empty(); }

  void add(const Copy& copy) { copies_.push_back(copy); }
  void commit() { group_ends_.push_back(copies_.size()); }

  // Until at most `allowed` groups are in flight, the oldest first.
  void wait(size_t allowed) {
    if (group_ends_.size() <= allowed) return;
    const size_t groups = group_ends_.size() - allowed, end = group_ends_[groups - 1];
    for (size_t i = 0; i < end; ++i) copies_[i].happen();
    copies_.erase(copies_.begin(), copies_.begin() + end);
    group_ends_.erase(group_ends_.begin(), group_ends_.begin() + groups);
    for (size_t& group_end : group_ends_) group_end -= end;
  }

 private:
  std::vector<Copy> copies_;
  std::vector<size_t> group_ends_;  // how many copies there were at each commit
};

}  // namespace rk::host
