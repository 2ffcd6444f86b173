// An op as Python calls it: op(m, "lstm_cell_forward", &lstm_cell_forward) takes the schema's arguments by
// position into the function's struct and runs it without the GIL. m.signatures["lstm_cell_forward"] has the
// arguments' names. A shortcut is called the same way, but answers None to arguments of other types.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "core/bindings/arguments.h"
#include "core/bindings/registry.h"

namespace fusednn {

// Reads Python's arguments into a struct, up to the first that doesn't fit.
class ArgumentReader {
 public:
  explicit ArgumentReader(const pybind11::args& given) : given_(given) {}

  template <class... Fields>
  void operator()(const char*, Fields&... fields) {
    (void)(read(fields) && ...);
  }
  bool complete() const { return fits_ && next_ == given_.size(); }
  size_t position() const { return next_; }  // of the first that doesn't fit
  const std::string& wanted() const { return wanted_; }

 private:
  template <class Field>
  bool read(Field& field) {
    if constexpr (ArgumentGroup<Field, ArgumentReader>) {
      field.visit(*this);
    } else if (next_ < given_.size()) {
      pybind11::detail::make_caster<Field> caster;
      fits_ = caster.load(PyTuple_GET_ITEM(given_.ptr(), next_), true);
      if (fits_) {
        field = pybind11::detail::cast_op<Field>(std::move(caster));
        ++next_;
      } else {
        wanted_ = expected(field);
      }
    } else {
      fits_ = false;
    }
    return fits_;
  }

  const pybind11::args& given_;
  size_t next_ = 0;
  bool fits_ = true;
  std::string wanted_;
};

// The arguments as Python has them.
class ArgumentWriter {
 public:
  template <class... Fields>
  void operator()(const char*, Fields&... fields) {
    (write(fields), ...);
  }
  const pybind11::list& written() const { return written_; }

 private:
  template <class Field>
  void write(Field& field) {
    if constexpr (ArgumentGroup<Field, ArgumentWriter>)
      field.visit(*this);
    else
      written_.append(pybind11::cast(field));
  }

  pybind11::list written_;
};

template <class Arguments>
pybind11::tuple argument_tuple(Arguments arguments) {
  ArgumentWriter writer;
  arguments.visit(writer);
  return writer.written();
}

struct Signature {
  const char* op;
  std::vector<std::string> names;

  void record(pybind11::module_& m) const;
  [[noreturn]] void refuse(const pybind11::args& given, const ArgumentReader& reader) const;
};

template <class Arguments, class Result>
pybind11::object unlocked(Result (*function)(const Arguments&), const Arguments& arguments) {
  const auto run = [&] {
    const pybind11::gil_scoped_release unlocked;
    return function(arguments);
  };
  return pybind11::cast(run());
}

template <class Arguments, class Result>
void op(pybind11::module_& m, const char* name, Result (*function)(const Arguments&)) {
  Arguments fields{};
  ArgumentNames names;
  fields.visit(names);
  const Signature signature{name, names.names()};
  signature.record(m);
  m.def(name, [signature, function](const pybind11::args& given) -> pybind11::object {
    HANDLE_TH_ERRORS
    Arguments arguments{};
    ArgumentReader reader(given);
    arguments.visit(reader);
    if (!reader.complete()) signature.refuse(given, reader);
    return unlocked(function, arguments);
    END_HANDLE_TH_ERRORS_PYBIND
  });
}

template <class Arguments, class Result>
void shortcut(pybind11::module_& m, const char* name, std::optional<Result> (*function)(const Arguments&)) {
  m.def(name, [function](const pybind11::args& given) -> pybind11::object {
    HANDLE_TH_ERRORS
    Arguments arguments{};
    ArgumentReader reader(given);
    arguments.visit(reader);
    if (!reader.complete()) return pybind11::none();
    return unlocked(function, arguments);
    END_HANDLE_TH_ERRORS_PYBIND
  });
}

}  // namespace fusednn
