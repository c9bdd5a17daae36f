// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/jinja/renderer.h"

#include <algorithm>

namespace natslm::data::jinja {

void Scope::set(const std::string& name, Value value) {
  for (auto& [known, old] : variables) {
    if (known == name) {
      old = std::move(value);
      return;
    }
  }
  variables.emplace_back(name, std::move(value));
}

const Value* Scope::find(std::string_view name) const {
  for (const auto& [known, value] : variables) {
    if (known == name) return &value;
  }
  return nullptr;
}

Renderer::Renderer(Scope globals, std::time_t now) : now_(now) {
  scopes_.push_back(std::move(globals));
  scope_ = &scopes_.back();
}

Value Renderer::variable(const std::string& name) const {
  for (const Scope* scope = scope_; scope; scope = scope->outer) {
    if (const Value* value = scope->find(name)) return *value;
  }
  return Value::undefined(name);
}

void Renderer::write(std::string_view text) {
  charge(text.size());
  *out_ += text;
}

std::string Renderer::captured(const Scope* outer, const std::function<void()>& body) {
  step();
  std::string text;
  std::string* const out = std::exchange(out_, &text);
  Scope* const scope = scope_;
  scopes_.push_back({outer, {}});
  scope_ = &scopes_.back();
  body();
  out_ = out;
  scope_ = scope;
  return text;
}

void Renderer::nested(const std::function<void()>& body) {
  step();
  Scope* const scope = scope_;
  scopes_.push_back({scope, {}});
  scope_ = &scopes_.back();
  body();
  scope_ = scope;
}

}  // namespace natslm::data::jinja
