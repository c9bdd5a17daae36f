// The parser of statements: each becomes a function that runs it.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/jinja/template.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/data/jinja/expression_parser.h"

namespace natslm::data::jinja {
namespace {

using Kind = Token::Kind;

// What assignments and loops write to.
struct Target {
  std::vector<std::string> names;  // one: the value; several: its items
  std::string member;              // not empty: names[0].member of a namespace
  bool tuple = false;

  void assign(Renderer& renderer, const Value& value) const {
    if (!member.empty()) {
      const Value space = renderer.variable(names[0]);
      NATSLM_CHECK(space.space(), "only a namespace's members can be set, and \"", names[0],
                   "\" is a ", space.type_name());
      space.space()->members.set(Value(member), value);
    } else if (!tuple) {
      renderer.set(names[0], value);
    } else {
      const std::vector<Value> items = iterate(value);
      NATSLM_CHECK(items.size() == names.size(), items.size(), " values for ", names.size(),
                   " names");
      for (size_t i = 0; i < names.size(); ++i) renderer.set(names[i], items[i]);
    }
  }
};

Flow run(const Body& body, Renderer& renderer) {
  for (const Statement& statement : body) {
    renderer.line = statement.line;
    renderer.step();
    if (const Flow flow = statement.run(renderer); flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

struct Parameter {
  std::string name;
  Expression otherwise;  // null: must be given
};

// A macro, or the body of {% call %}: bound to the scope that it stands in.
Value macro_value(const std::string& name,
                  const std::shared_ptr<const std::vector<Parameter>>& parameters,
                  const std::shared_ptr<const Body>& body, const Scope* scope) {
  return Callable{
      name, [=](Renderer& renderer, Arguments& arguments) -> Value {
        NATSLM_CHECK(renderer.calls < Renderer::kDeepestCalls, "macros call each other more than ",
                     Renderer::kDeepestCalls, " levels deep");
        NATSLM_CHECK(arguments.positional.size() <= parameters->size(), name, " takes ",
                     parameters->size(), " arguments, not ", arguments.positional.size());
        ++renderer.calls;
        const std::string text = renderer.captured(scope, [&] {
          std::vector<bool> used(arguments.named.size());
          for (size_t i = 0; i < parameters->size(); ++i) {
            const Parameter& parameter = (*parameters)[i];
            const auto named = std::ranges::find_if(
                arguments.named, [&](const auto& one) { return one.first == parameter.name; });
            if (i < arguments.positional.size()) {
              renderer.set(parameter.name, arguments.positional[i]);
            } else if (named != arguments.named.end()) {
              used[named - arguments.named.begin()] = true;
              renderer.set(parameter.name, named->second);
            } else if (parameter.otherwise) {
              renderer.set(parameter.name, parameter.otherwise(renderer));
            } else {
              renderer.set(parameter.name, Value::undefined(parameter.name));
            }
          }
          for (size_t i = 0; i < used.size(); ++i) {
            if (used[i]) continue;
            NATSLM_CHECK(arguments.named[i].first == "caller", name, " has no argument ",
                         arguments.named[i].first);
            renderer.set("caller", arguments.named[i].second);
          }
          run(*body, renderer);
        });
        --renderer.calls;
        return text;
      }};
}

class StatementParser : private ExpressionParser {
 public:
  using ExpressionParser::ExpressionParser;

  Body whole() {
    Body body = statements({});
    if (now().kind != Kind::kEnd) unexpected(now());
    return body;
  }

 private:
  // Up to one of the words that end the block; the word is left for the caller.
  Body statements(std::initializer_list<std::string_view> ends) {
    const Level level(*this);
    Body body;
    for (;;) {
      const int line = now().line;
      if (now().kind == Kind::kText) {
        body.push_back({line, [text = take().text](Renderer& r) {
                          r.write(text);
                          return Flow::kNext;
                        }});
      } else if (now().kind == Kind::kPrintBegin) {
        take();
        Expression value = tuple_or_expression();
        expect(Kind::kPrintEnd);
        body.push_back({line, [value = std::move(value)](Renderer& r) {
                          r.write(value(r).text());
                          return Flow::kNext;
                        }});
      } else if (now().kind == Kind::kBlockBegin) {
        take();
        if (std::ranges::find(ends, now().text) != ends.end()) return body;
        body.push_back({line, statement()});
      } else {
        if (ends.size() > 0) error("the block that began before does not end");
        return body;
      }
    }
  }

  void end_block() { expect(Kind::kBlockEnd); }
  void end_block(std::string_view word) {
    expect_word(word);
    end_block();
  }

  std::function<Flow(Renderer&)> statement() {
    const std::string word = name();
    if (word == "if") return if_statement();
    if (word == "for") return for_statement();
    if (word == "set") return set_statement();
    if (word == "macro") return macro_statement();
    if (word == "call") return call_statement();
    if (word == "filter") return filter_statement();
    if (word == "with") return with_statement();
    if (word == "generation") {  // marks what training would learn
      end_block();
      auto body = std::make_shared<const Body>(statements({"endgeneration"}));
      end_block("endgeneration");
      return [body](Renderer& r) { return run(*body, r); };
    }
    if (word == "break" || word == "continue") {
      if (loops_ == 0) error(word + " outside of a loop");
      end_block();
      const Flow flow = word == "break" ? Flow::kBreak : Flow::kContinue;
      return [flow](Renderer&) { return flow; };
    }
    error("the statement \"" + word + "\" is not supported");
  }

  std::function<Flow(Renderer&)> if_statement() {
    struct Branch {
      Expression condition;  // null: else
      Body body;
    };
    auto branches = std::make_shared<std::vector<Branch>>();
    Expression condition = expression();
    end_block();
    for (;;) {
      branches->push_back({std::move(condition), statements({"elif", "else", "endif"})});
      condition = nullptr;
      if (take_word("elif")) {
        condition = expression();
        end_block();
      } else if (take_word("else")) {
        end_block();
        branches->push_back({nullptr, statements({"endif"})});
        end_block("endif");
        break;
      } else {
        end_block("endif");
        break;
      }
    }
    return [branches](Renderer& r) {
      for (const Branch& branch : *branches) {
        if (!branch.condition || branch.condition(r).truth()) return run(branch.body, r);
      }
      return Flow::kNext;
    };
  }

  Target target(bool with_member) {
    Target result;
    const bool bracket = take_operator("(");
    result.names.push_back(name());
    if (with_member && !bracket && take_operator(".")) {
      result.member = name();
      return result;
    }
    while (take_operator(",")) {
      result.tuple = true;
      if (now().kind != Kind::kName || is_word("in")) break;
      result.names.push_back(name());
    }
    if (bracket) expect_operator(")");
    return result;
  }

  std::function<Flow(Renderer&)> for_statement() {
    struct Loop {
      Target target;
      Expression items, condition;
      Body body, otherwise;
    };
    auto loop = std::make_shared<Loop>();
    loop->target = target(false);
    expect_word("in");
    loop->items = tuple_or_expression(false);
    if (take_word("if")) loop->condition = expression();
    if (is_word("recursive")) error("recursive loops are not supported");
    end_block();
    ++loops_;
    loop->body = statements({"else", "endfor"});
    --loops_;
    if (take_word("else")) {
      end_block();
      loop->otherwise = statements({"endfor"});
    }
    end_block("endfor");
    return [loop](Renderer& r) {
      std::vector<Value> items = iterate(loop->items(r));
      Flow flow = Flow::kNext;
      bool ran = false;
      ++r.loops;
      r.nested([&] {
        if (loop->condition) {
          std::erase_if(items, [&](const Value& item) {
            r.step();
            r.forget_variables();
            loop->target.assign(r, item);
            return !loop->condition(r).truth();
          });
        }
        const auto state = std::make_shared<LoopState>();
        state->items = &items;
        state->depth = static_cast<size_t>(r.loops);
        for (; state->index < items.size(); ++state->index) {
          r.step();
          ran = true;
          r.forget_variables();
          r.set("loop", state);
          loop->target.assign(r, items[state->index]);
          if (run(loop->body, r) == Flow::kBreak) break;
        }
        state->items = nullptr;  // a template may have kept `loop`
      });
      --r.loops;
      if (!ran) flow = run(loop->otherwise, r);
      return flow;
    };
  }

  std::function<Flow(Renderer&)> set_statement() {
    const Target to = target(true);
    if (take_operator("=")) {
      Expression value = tuple_or_expression();
      end_block();
      return [to, value = std::move(value)](Renderer& r) {
        to.assign(r, value(r));
        return Flow::kNext;
      };
    }
    Expression value = filtered_block(filters(captured_text()), "endset");
    return [to, value = std::move(value)](Renderer& r) {
      to.assign(r, value(r));
      return Flow::kNext;
    };
  }

  // What a block wrote, as the first operand of the filters that its tag names.
  static constexpr const char* kCaptured = " captured";
  static Expression captured_text() {
    return [](Renderer& r) { return r.variable(kCaptured); };
  }

  // Up to the word that ends the block: what it writes, through these filters.
  Expression filtered_block(Expression filtered, std::string_view end) {
    end_block();
    auto body = std::make_shared<const Body>(block_without_loop(end));
    return [filtered = std::move(filtered), body](Renderer& r) {
      const std::string text = r.captured(r.scope(), [&] { run(*body, r); });
      Value result;
      r.nested([&] {
        r.set(kCaptured, Value(text));
        result = filtered(r);
      });
      return result;
    };
  }

  // break and continue cannot leave a block whose text is kept.
  Body block_without_loop(std::string_view end) {
    const int loops = std::exchange(loops_, 0);
    Body body = statements({end});
    loops_ = loops;
    end_block(end);
    return body;
  }

  std::shared_ptr<const std::vector<Parameter>> parameters() {
    auto result = std::make_shared<std::vector<Parameter>>();
    expect_operator("(");
    while (!is_operator(")")) {
      Parameter parameter{name(), nullptr};
      if (take_operator("=")) parameter.otherwise = expression();
      result->push_back(std::move(parameter));
      if (!take_operator(",")) break;
    }
    expect_operator(")");
    return result;
  }

  std::function<Flow(Renderer&)> macro_statement() {
    const std::string called = name();
    const auto takes = parameters();
    end_block();
    auto body = std::make_shared<const Body>(block_without_loop("endmacro"));
    return [=](Renderer& r) {
      r.set(called, macro_value(called, takes, body, r.scope()));
      return Flow::kNext;
    };
  }

  std::function<Flow(Renderer&)> call_statement() {
    const auto takes =
        is_operator("(") ? parameters() : std::make_shared<const std::vector<Parameter>>();
    Expression function = postfix(primary(), false);
    if (!is_operator("(")) error("a call is needed here");
    const Call arguments = call_arguments();
    end_block();
    auto body = std::make_shared<const Body>(block_without_loop("endcall"));
    return [=](Renderer& r) {
      Arguments given = arguments.evaluate(r);
      given.named.emplace_back("caller", macro_value("caller", takes, body, r.scope()));
      r.write(call(r, function(r), given).text());
      return Flow::kNext;
    };
  }

  std::function<Flow(Renderer&)> filter_statement() {
    Expression filtered = filter(captured_text());
    filtered = filters(std::move(filtered));
    Expression value = filtered_block(std::move(filtered), "endfilter");
    return [value = std::move(value)](Renderer& r) {
      r.write(value(r).text());
      return Flow::kNext;
    };
  }

  std::function<Flow(Renderer&)> with_statement() {
    std::vector<std::pair<std::string, Expression>> values;
    while (now().kind == Kind::kName) {
      std::string variable = name();
      expect_operator("=");
      values.emplace_back(std::move(variable), expression());
      if (!take_operator(",")) break;
    }
    end_block();
    auto body = std::make_shared<const Body>(statements({"endwith"}));
    end_block("endwith");
    return [values = std::move(values), body](Renderer& r) {
      std::vector<Value> evaluated;
      for (const auto& [variable, value] : values) evaluated.push_back(value(r));
      Flow flow = Flow::kNext;
      r.nested([&] {
        for (size_t i = 0; i < values.size(); ++i) r.set(values[i].first, evaluated[i]);
        flow = run(*body, r);
      });
      return flow;
    };
  }
  int loops_ = 0;  // that the present statement is in
};

}  // namespace

Template::Template(std::string_view source) : body_(StatementParser(source).whole()) {}

std::string Template::render(const Dict& variables, std::time_t now) const {
  Scope globals = global_functions();
  for (const auto& [key, value] : variables.items()) globals.set(key.text(), value);
  Renderer renderer(std::move(globals), now);
  try {
    return renderer.captured(renderer.scope(), [&] { run(body_, renderer); });
  } catch (const Refused&) {
    throw;
  } catch (const Error& error) {
    fail("line ", renderer.line, ": ", error.what());
  }
}

}  // namespace natslm::data::jinja
