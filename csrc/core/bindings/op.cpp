#include "core/bindings/op.h"

#include <sstream>

namespace fusednn {

std::vector<std::string> ArgumentNames::split(const std::string& listed) {
  std::vector<std::string> names;
  std::istringstream in(listed);
  for (std::string name; std::getline(in >> std::ws, name, ',');) names.push_back(name);
  return names;
}

void Signature::refuse(const pybind11::args& given, const ArgumentReader& reader) const {
  const size_t i = reader.position();
  if (given.size() == names.size())
    throw pybind11::type_error(c10::str(op, ": ", names[i], ": got ", Py_TYPE(given[i].ptr())->tp_name,
                                        ", expected ", reader.wanted()));
  std::string listed;
  for (const std::string& name : names) listed += (listed.empty() ? "" : ", ") + name;
  throw pybind11::type_error(
      c10::str(op, ": got ", given.size(), " arguments, expected ", names.size(), ": ", listed));
}

void Signature::record(pybind11::module_& m) const {
  if (!pybind11::hasattr(m, "signatures")) m.attr("signatures") = pybind11::dict();
  m.attr("signatures")[op] = names;
}

}  // namespace fusednn
