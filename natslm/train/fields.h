// The fields of a struct of options, by name. Whatever goes over all of them (a command line, a
// checkpoint, a comparison of two runs) walks the one list that the struct's header has:
//
//   struct Options { int64_t steps = 1000; };
//   constexpr auto fields_of(const Options&) {
//     return std::tuple{Field{"steps", &Options::steps, Affects::kWeights, "optimiser steps"}};
//   }
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>
#include <tuple>
#include <type_traits>

namespace natslm::train {

// What a field decides: the weights that come out (then a resumed run must have the same value), or
// only how often something is written.
enum class Affects : int8_t { kWeights, kFilesOnly };

template <class O, class T>
struct Field {
  const char* name;  // as on the command line, without the dashes
  T O::*member;
  Affects affects;
  const char* help;
};

// Calls visit(field, value) for every field, in the order of the list: a Field, and a reference to
// its value in `options`, which may be const.
template <class O, class Visit>
void for_each_field(O& options, Visit&& visit) {
  std::apply([&](const auto&... field) { (visit(field, options.*field.member), ...); },
             fields_of(options));
}

// Gives the fields of `to` the values of those of `from` that have the same name and type and for
// which wanted(name) is true. The two may be structs of different types.
template <class From, class To, class Wanted>
void copy_fields(const From& from, To& to, Wanted&& wanted) {
  for_each_field(from, [&](const auto& source, const auto& value) {
    if (!wanted(source.name)) return;
    for_each_field(to, [&](const auto& target, auto& field) {
      if constexpr (std::is_same_v<decltype(field), std::remove_cvref_t<decltype(value)>&>)
        if (std::string_view(source.name) == target.name) field = value;
    });
  });
}

}  // namespace natslm::train
