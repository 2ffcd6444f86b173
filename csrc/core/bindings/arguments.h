// The arguments of an op are a struct that lists its fields once, in the order of the op's schema:
//   struct LstmCellForward {
//     Tensor input, hx;
//     Bias bias;        // a group, itself such a struct: its fields stand in its place
//     bool save_gates;
//     FUSEDNN_ARGUMENTS(input, hx, bias, save_gates)
//   };
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#define FUSEDNN_ARGUMENTS(...)                  \
  template <class Visitor>                      \
  void visit(Visitor& fusednn_visitor) {        \
    fusednn_visitor(#__VA_ARGS__, __VA_ARGS__); \
  }

namespace fusednn {

using OptionalTensor = std::optional<at::Tensor>;

template <class Field, class Visitor>
concept ArgumentGroup = requires(Field& field, Visitor& v) { field.visit(v); };

// The fields' names, those of groups in their place.
class ArgumentNames {
 public:
  template <class... Fields>
  void operator()(const char* listed, Fields&... fields) {
    const std::vector<std::string> names = split(listed);
    size_t i = 0;
    (add(names[i++], fields), ...);
  }
  const std::vector<std::string>& names() const { return names_; }

 private:
  static std::vector<std::string> split(const std::string& listed);
  template <class Field>
  void add(const std::string& name, Field& field) {
    if constexpr (ArgumentGroup<Field, ArgumentNames>)
      field.visit(*this);
    else
      names_.push_back(name);
  }

  std::vector<std::string> names_;
};

// What an argument should have been, in Python's words.
template <class T>
std::string expected(const T&) {
  return "something else";
}
inline std::string expected(const at::Tensor&) { return "Tensor"; }
inline std::string expected(const std::string&) { return "str"; }
inline std::string expected(bool) { return "bool"; }
inline std::string expected(int64_t) { return "int"; }
inline std::string expected(double) { return "float"; }
template <class T>
std::string expected(const std::optional<T>&) {
  return expected(T()) + " or None";
}
template <class T, size_t n>
std::string expected(const std::array<T, n>&) {
  return std::to_string(n) + " of " + expected(T());
}

}  // namespace fusednn
