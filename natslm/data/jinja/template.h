// Jinja templates, as far as models' chat templates use the language: parsed once into functions,
// rendered many times. Whitespace is treated as by trim_blocks and lstrip_blocks. A construct,
// filter or test that is not known is an Error that names it, when the template is parsed. Internal
// to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ctime>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/data/jinja/renderer.h"

namespace natslm::data::jinja {

enum class Flow { kNext, kBreak, kContinue };
using Expression = std::function<Value(Renderer&)>;
struct Statement {
  int line;
  std::function<Flow(Renderer&)> run;
};
using Body = std::vector<Statement>;

class Template {
 public:
  // Throws Error with the line.
  explicit Template(std::string_view source);
  // Throws Error with the line, Refused where the template itself raises one.
  std::string render(const Dict& variables, std::time_t now) const;

 private:
  Body body_;
};

}  // namespace natslm::data::jinja
