// An op's schema and how torch calls it, both made of the records of arguments that its function takes.
#pragma once
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <type_traits>

#include "binding/tensors.h"

namespace rk::binding {

// The arguments of an op, one after the other: a record takes its members from here, in the order in which it declares
// them. With a stack they are those of a call; without one they are noted for the schema.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : stack_(stack) {}
  Arguments(const Arguments&) = delete;

  Tensor tensor(const char* name, bool written = false) {
    const char alias[] = {'T', 'e', 'n', 's', 'o', 'r', '(', alias_, '!', ')', '\0'};
    alias_ += written;
    return take<Tensor>(written ? alias : "Tensor", name);
  }
  OptionalTensor optional_tensor(const char* name) { return take<OptionalTensor>("Tensor?", name); }
  int64_t integer(const char* name) { return take<int64_t>("int", name); }
  std::vector<int64_t> integers(const char* name) { return take<std::vector<int64_t>>("int[]", name); }
  double number(const char* name) { return take<double>("float", name); }
  std::string word(const char* name) { return take<std::string>("str", name); }

  const std::string& schema() const { return schema_; }

  // When all are taken, of which torch has said how many there are.
  void check(uint64_t count) const {
    require(count_ == count, "an op takes ", count_, " arguments, and its schema has ", count);
    require(!stray_, stray_, " must be on ", kPlace, ", on one device with the other tensors");
  }

 private:
  template <class T>
  T take(const char* type, const char* name) {
    if (stack_) {
      T argument = torch::stable::detail::to<T>(stack_[count_++]);
      if constexpr (std::is_same_v<T, Tensor>) note_device(argument, name);
      if constexpr (std::is_same_v<T, OptionalTensor>)
        if (argument) note_device(*argument, name);
      return argument;
    }
    schema_ += (schema_.empty() ? "" : ", ") + std::string(type) + ' ' + name;
    return T();
  }

  // Raised by check, when the stack has no more that would be lost.
  void note_device(const Tensor& t, const char* name) {
    if (!device_) device_ = t.get_device_index();
    if (!is_here(t) || t.get_device_index() != *device_) stray_ = name;
  }

  StableIValue* stack_;
  uint64_t count_ = 0;
  std::optional<int> device_;  // of the first tensor
  const char* stray_ = nullptr;
  std::string schema_;
  char alias_ = 'a';
};

struct Op {
  const char* name;
  std::string (*schema)();
  void (*call)(StableIValue* stack, uint64_t n_inputs, uint64_t n_outputs);
};

template <class R>
constexpr const char* kResult = nullptr;
template <>
inline constexpr const char* kResult<void> = "()";
template <>
inline constexpr const char* kResult<int64_t> = "int";
template <>
inline constexpr const char* kResult<std::vector<int64_t>> = "int[]";
template <>
inline constexpr const char* kResult<std::string> = "str";

template <auto function>
struct OpOf;

template <class R, class... Records, R (*function)(const Records&...)>
struct OpOf<function> {
  static std::string schema() {
    static_assert(kResult<R>);
    Arguments next(nullptr);
    std::tuple<Records...>{Records{next}...};
    return '(' + next.schema() + ") -> " + kResult<R>;
  }

  static void call(StableIValue* stack, uint64_t n_inputs, uint64_t) {
    Arguments next(stack);
    const std::tuple<Records...> records{Records{next}...};  // the braces keep the order
    next.check(n_inputs);
    if constexpr (std::is_void_v<R>)
      std::apply(function, records);
    else
      stack[0] = torch::stable::detail::from(std::apply(function, records));
  }
};

// The op of a function that takes records, const Record&..., each of which is made by Record{Arguments&}.
template <auto function>
constexpr Op op(const char* name) {
  return {name, OpOf<function>::schema, OpOf<function>::call};
}

template <class Ops>
void define(torch::stable::detail::StableLibrary& library, const Ops& ops) {
  for (const Op& op : ops) library.def((op.name + op.schema()).c_str());
}

template <class Ops>
void implement(torch::stable::detail::StableLibrary& library, const Ops& ops) {
  for (const Op& op : ops) library.impl(op.name, op.call);
}

}  // namespace rk::binding
