// The parser. Each piece of the grammar becomes a function that evaluates it.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/jinja/template.h"

#include <algorithm>
#include <charconv>
#include <memory>
#include <optional>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/data/jinja/lexer.h"
#include "natslm/data/jinja/operators.h"

namespace natslm::data::jinja {
namespace {

using Kind = Token::Kind;

// Expressions and blocks nested deeper are refused, so that evaluating them needs little stack.
constexpr int kDeepest = 64;

// ---- what assignments and loops write to
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

// ---- the parser
class Parser {
 public:
  explicit Parser(std::string_view source) : tokens_(tokens_of(source)) {}

  Body whole() {
    Body body = statements({});
    if (now().kind != Kind::kEnd) unexpected();
    return body;
  }

 private:
  // One level of nesting, for as long as it lives.
  class Level {
   public:
    explicit Level(Parser& parser) : parser_(parser) {
      if (++parser_.depth_ > kDeepest) parser_.error("nested too deeply");
    }
    ~Level() { --parser_.depth_; }
    Level(const Level&) = delete;
    Level& operator=(const Level&) = delete;

   private:
    Parser& parser_;
  };

  struct Call {  // the arguments of a call, a filter or a test
    std::vector<Expression> positional;
    std::vector<std::pair<std::string, Expression>> named;
    Arguments evaluate(Renderer& renderer) const {
      Arguments arguments;
      for (const Expression& one : positional) arguments.positional.push_back(one(renderer));
      for (const auto& [name, one] : named) arguments.named.emplace_back(name, one(renderer));
      return arguments;
    }
  };

  // ---- tokens ----
  const Token& now() const { return tokens_[at_]; }
  const Token& next() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  [[noreturn]] void error(const std::string& what) const { fail("line ", now().line, ": ", what); }
  [[noreturn]] void unexpected() const { error("unexpected \"" + now().text + "\""); }
  bool is(Kind kind, std::string_view text) const {
    return now().kind == kind && now().text == text;
  }
  bool is_operator(std::string_view text) const { return is(Kind::kOperator, text); }
  bool is_word(std::string_view text) const { return is(Kind::kName, text); }
  bool take(Kind kind, std::string_view text) {
    if (!is(kind, text)) return false;
    ++at_;
    return true;
  }
  bool take_operator(std::string_view text) { return take(Kind::kOperator, text); }
  bool take_word(std::string_view text) { return take(Kind::kName, text); }
  void expect_operator(std::string_view text) {
    if (!take_operator(text)) {
      error("\"" + std::string(text) + "\" is needed before \"" + now().text + "\"");
    }
  }
  void expect_word(std::string_view text) {
    if (!take_word(text)) {
      error("\"" + std::string(text) + "\" is needed before \"" + now().text + "\"");
    }
  }
  void expect(Kind kind) {
    if (now().kind != kind) unexpected();
    ++at_;
  }
  std::string name() {
    if (now().kind != Kind::kName) unexpected();
    return tokens_[at_++].text;
  }

  // ---- statements ----
  // Up to one of the words that end the block; the word is left for the caller.
  Body statements(std::initializer_list<std::string_view> ends) {
    const Level level(*this);
    Body body;
    for (;;) {
      const int line = now().line;
      if (now().kind == Kind::kText) {
        body.push_back({line, [text = tokens_[at_++].text](Renderer& r) {
                          r.write(text);
                          return Flow::kNext;
                        }});
      } else if (now().kind == Kind::kPrintBegin) {
        ++at_;
        Expression value = tuple_or_expression();
        expect(Kind::kPrintEnd);
        body.push_back({line, [value = std::move(value)](Renderer& r) {
                          r.write(value(r).text());
                          return Flow::kNext;
                        }});
      } else if (now().kind == Kind::kBlockBegin) {
        ++at_;
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
    Expression filtered = filters(captured_text());
    end_block();
    auto body = std::make_shared<const Body>(block_without_loop("endset"));
    return [to, filtered = std::move(filtered), body](Renderer& r) {
      const std::string text = r.captured(r.scope(), [&] { run(*body, r); });
      Value result;
      r.nested([&] {
        r.set(kCaptured, Value(text));
        result = filtered(r);
      });
      to.assign(r, result);
      return Flow::kNext;
    };
  }

  // What a block wrote, as the first operand of the filters that its tag names.
  static constexpr const char* kCaptured = " captured";
  static Expression captured_text() {
    return [](Renderer& r) { return r.variable(kCaptured); };
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
    end_block();
    auto body = std::make_shared<const Body>(block_without_loop("endfilter"));
    return [filtered = std::move(filtered), body](Renderer& r) {
      const std::string text = r.captured(r.scope(), [&] { run(*body, r); });
      Value result;
      r.nested([&] {
        r.set(kCaptured, Value(text));
        result = filtered(r);
      });
      r.write(result.text());
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

  // ---- expressions, from the loosest operator to the tightest ----
  // conditional: may an `if` follow? (After `in` of a loop it begins the loop's own condition.)
  Expression tuple_or_expression(bool conditional = true) {
    Expression first = conditional ? expression() : or_expression();
    if (!is_operator(",")) return first;
    std::vector<Expression> items{std::move(first)};
    while (take_operator(",")) {
      if (now().kind == Kind::kBlockEnd || now().kind == Kind::kPrintEnd || is_operator(")")) break;
      items.push_back(conditional ? expression() : or_expression());
    }
    return list_of(std::move(items), true);
  }

  static Expression list_of(std::vector<Expression> items, bool tuple) {
    return [items = std::move(items), tuple](Renderer& r) -> Value {
      List list{{}, tuple};
      for (const Expression& item : items) list.items.push_back(item(r));
      return list;
    };
  }

  Expression expression() {
    const Level level(*this);
    Expression value = or_expression();
    while (take_word("if")) {
      Expression condition = or_expression(), otherwise;
      if (take_word("else")) otherwise = expression();
      value = [value, condition, otherwise](Renderer& r) -> Value {
        if (condition(r).truth()) return value(r);
        return otherwise ? otherwise(r) : Value::undefined("the value of an if without else");
      };
    }
    return value;
  }

  Expression or_expression() {
    Expression left = and_expression();
    while (take_word("or")) {
      left = [left, right = and_expression()](Renderer& r) {
        Value value = left(r);
        return value.truth() ? value : right(r);
      };
    }
    return left;
  }

  Expression and_expression() {
    Expression left = not_expression();
    while (take_word("and")) {
      left = [left, right = not_expression()](Renderer& r) {
        Value value = left(r);
        return value.truth() ? right(r) : value;
      };
    }
    return left;
  }

  Expression not_expression() {
    if (!take_word("not")) return comparison();
    const Level level(*this);
    return [value = not_expression()](Renderer& r) -> Value { return !value(r).truth(); };
  }

  // "" when no comparison follows.
  std::string comparison_operator() {
    if (now().kind == Kind::kOperator) {
      for (const char* one : {"==", "!=", "<=", ">=", "<", ">"}) {
        if (take_operator(one)) return one;
      }
    }
    if (take_word("in")) return "in";
    if (is_word("not") && next().kind == Kind::kName && next().text == "in") {
      at_ += 2;
      return "not in";
    }
    return "";
  }

  Expression comparison() {
    Expression first = sum();
    std::vector<std::pair<std::string, Expression>> rest;
    for (std::string operation; !(operation = comparison_operator()).empty();) {
      rest.emplace_back(operation, sum());
    }
    if (rest.empty()) return first;
    return [first, rest](Renderer& r) -> Value {
      Value left = first(r);
      for (const auto& [operation, expression] : rest) {
        Value right = expression(r);
        r.step();
        if (!compared(operation, left, right)) return false;
        left = std::move(right);
      }
      return true;
    };
  }

  // Operands of one level of operators, from left to right.
  template <class Operand>
  Expression binary(std::initializer_list<const char*> operators, Operand&& operand) {
    Expression left = operand();
    for (int count = 0;; ++count) {
      const auto found =
          std::ranges::find_if(operators, [&](const char* one) { return is_operator(one); });
      if (found == operators.end()) return left;
      // The functions of a chain are nested too.
      if (count > 1000) error("too many operators in a row");
      ++at_;
      left = [operation = std::string(*found), left, right = operand()](Renderer& r) {
        const Value a = left(r);
        return arithmetic(r, operation, a, right(r));
      };
    }
  }

  Expression sum() {
    return binary({"+", "-"}, [&] { return concatenation(); });
  }

  Expression concatenation() {
    std::vector<Expression> parts{product()};
    while (take_operator("~")) parts.push_back(product());
    if (parts.size() == 1) return parts[0];
    return [parts](Renderer& r) -> Value {
      std::string text;
      for (const Expression& part : parts) text += part(r).text();
      r.charge(text.size());
      return text;
    };
  }

  Expression product() {
    return binary({"*", "/", "//", "%"}, [&] { return power(); });
  }

  Expression power() {
    return binary({"**"}, [&] { return unary(true); });
  }

  Expression unary(bool with_filters) {
    const Level level(*this);
    Expression value;
    if (take_operator("-")) {
      value = [operand = unary(false)](Renderer& r) {
        return arithmetic(r, "-", Value(int64_t{0}), operand(r));
      };
    } else if (take_operator("+")) {
      value = [operand = unary(false)](Renderer& r) {
        return arithmetic(r, "+", Value(int64_t{0}), operand(r));
      };
    } else {
      value = primary();
    }
    value = postfix(std::move(value), true);
    return with_filters ? filters(std::move(value)) : value;
  }

  Expression primary() {
    const Level level(*this);
    const Token token = now();
    if (token.kind == Kind::kEnd) error("an expression is needed");
    ++at_;
    const auto constant = [](Value value) -> Expression {
      return [value = std::move(value)](Renderer&) { return value; };
    };
    switch (token.kind) {
      case Kind::kName:
        if (token.text == "true" || token.text == "True") return constant(true);
        if (token.text == "false" || token.text == "False") return constant(false);
        if (token.text == "none" || token.text == "None") return constant({});
        return [variable = token.text](Renderer& r) { return r.variable(variable); };
      case Kind::kString: {
        std::string text = token.text;
        while (now().kind == Kind::kString) text += tokens_[at_++].text;
        return constant(text);
      }
      case Kind::kInteger: {
        int64_t value = 0;
        const char* end = token.text.data() + token.text.size();
        const auto parsed = std::from_chars(token.text.data(), end, value);
        if (parsed.ec != std::errc() || parsed.ptr != end) error("the number is too large");
        return constant(value);
      }
      case Kind::kReal: {
        double value = 0;
        std::from_chars(token.text.data(), token.text.data() + token.text.size(), value);
        return constant(value);
      }
      case Kind::kOperator:
        if (token.text == "(") return parenthesis();
        if (token.text == "[") return list_display();
        if (token.text == "{") return dict_display();
        break;
      default:
        break;
    }
    --at_;
    unexpected();
  }

  Expression parenthesis() {
    if (take_operator(")")) return list_of({}, true);
    Expression value = tuple_or_expression();
    expect_operator(")");
    return value;
  }

  Expression list_display() {
    std::vector<Expression> items;
    while (!is_operator("]")) {
      items.push_back(expression());
      if (!take_operator(",")) break;
    }
    expect_operator("]");
    return list_of(std::move(items), false);
  }

  Expression dict_display() {
    std::vector<std::pair<Expression, Expression>> items;
    while (!is_operator("}")) {
      Expression key = expression();
      expect_operator(":");
      items.emplace_back(std::move(key), expression());
      if (!take_operator(",")) break;
    }
    expect_operator("}");
    return [items = std::move(items)](Renderer& r) -> Value {
      Dict dict;
      for (const auto& [key, value] : items) dict.set(key(r), value(r));
      return dict;
    };
  }

  // .name [key] [from:to:step] (arguments)
  Expression postfix(Expression value, bool with_calls) {
    for (int count = 0;; ++count) {
      if (count > 200) error("too many members in a row");
      if (take_operator(".")) {
        if (now().kind == Kind::kInteger) {
          value = [value, index = tokens_[at_++].text](Renderer& r) {
            return subscript(value(r), Value(int64_t{std::atoll(index.c_str())}));
          };
        } else {
          value = [value, member = name()](Renderer& r) { return attribute(value(r), member); };
        }
      } else if (take_operator("[")) {
        value = brackets(std::move(value));
      } else if (with_calls && is_operator("(")) {
        value = [value, arguments = call_arguments()](Renderer& r) {
          const Value function = value(r);
          Arguments given = arguments.evaluate(r);
          r.step();
          return call(r, function, given);
        };
      } else {
        return value;
      }
    }
  }

  Expression brackets(Expression value) {
    Expression parts[3];
    size_t part = 0;
    bool slice = false;
    while (!is_operator("]")) {
      if (take_operator(":")) {
        slice = true;
        if (++part > 2) unexpected();
      } else {
        if (parts[part]) unexpected();
        parts[part] = expression();
      }
    }
    expect_operator("]");
    if (!slice) {
      if (!parts[0]) error("a key is needed in []");
      return [value, key = parts[0]](Renderer& r) {
        const Value object = value(r);
        return subscript(object, key(r));
      };
    }
    return [value, from = parts[0], to = parts[1], step = parts[2]](Renderer& r) {
      const Value object = value(r);
      const auto bound = [&](const Expression& one) -> std::optional<int64_t> {
        if (!one) return std::nullopt;
        const Value evaluated = one(r);
        if (evaluated.is_none()) return std::nullopt;
        return evaluated.whole_number("the bound of a slice");
      };
      return sliced(r, object, bound(from), bound(to), bound(step).value_or(1));
    };
  }

  Call call_arguments() {
    Call arguments;
    expect_operator("(");
    while (!is_operator(")")) {
      if (is_operator("*") || is_operator("**")) error("unpacked arguments are not supported");
      if (now().kind == Kind::kName && next().kind == Kind::kOperator && next().text == "=") {
        std::string argument = name();
        ++at_;
        arguments.named.emplace_back(std::move(argument), expression());
      } else {
        if (!arguments.named.empty()) error("an argument without a name follows one with a name");
        arguments.positional.push_back(expression());
      }
      if (!take_operator(",")) break;
    }
    expect_operator(")");
    return arguments;
  }

  Expression filters(Expression value) {
    for (int count = 0;; ++count) {
      if (count > 200) error("too many filters in a row");
      if (take_operator("|")) {
        value = filter(std::move(value));
      } else if (is_word("is")) {
        ++at_;
        value = test(std::move(value));
      } else if (is_operator("(")) {
        value = postfix(std::move(value), true);
      } else {
        return value;
      }
    }
  }

  Expression filter(Expression value) {
    const std::string called = name();
    if (!is_filter(called)) error("the filter \"" + called + "\" is not supported");
    Call arguments;
    if (is_operator("(")) arguments = call_arguments();
    return [value, called, arguments](Renderer& r) {
      const Value operand = value(r);
      Arguments given = arguments.evaluate(r);
      r.step();
      return apply_filter(r, called, operand, given);
    };
  }

  Expression test(Expression value) {
    const bool negated = take_word("not");
    const std::string called = name();
    if (!is_test(called)) error("the test \"" + called + "\" is not supported");
    Call arguments;
    const bool operand =
        now().kind == Kind::kString || now().kind == Kind::kInteger || now().kind == Kind::kReal ||
        is_operator("[") || is_operator("{") ||
        (now().kind == Kind::kName && !is_word("else") && !is_word("or") && !is_word("and") &&
         !is_word("if") && !is_word("is") && !is_word("not") && !is_word("in"));
    if (is_operator("(")) {
      arguments = call_arguments();
    } else if (operand) {
      arguments.positional.push_back(postfix(primary(), true));
    }
    return [value, called, arguments, negated](Renderer& r) -> Value {
      const Value tested = value(r);
      Arguments given = arguments.evaluate(r);
      return apply_test(r, called, tested, given) != negated;
    };
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int depth_ = 0, loops_ = 0;
};

}  // namespace

Template::Template(std::string_view source) : body_(Parser(source).whole()) {}

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
