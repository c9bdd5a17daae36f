// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/jinja/expression_parser.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <optional>
#include <utility>

#include "natslm/data/jinja/operators.h"

namespace natslm::data::jinja {
namespace {

using Kind = Token::Kind;

Expression list_of(std::vector<Expression> items, bool tuple) {
  return [items = std::move(items), tuple](Renderer& r) -> Value {
    List list{{}, tuple};
    for (const Expression& item : items) list.items.push_back(item(r));
    return list;
  };
}

}  // namespace

Arguments ExpressionParser::Call::evaluate(Renderer& renderer) const {
  Arguments arguments;
  for (const Expression& one : positional) arguments.positional.push_back(one(renderer));
  for (const auto& [name, one] : named) arguments.named.emplace_back(name, one(renderer));
  return arguments;
}

Expression ExpressionParser::tuple_or_expression(bool conditional) {
  Expression first = conditional ? expression() : or_expression();
  if (!is_operator(",")) return first;
  std::vector<Expression> items{std::move(first)};
  while (take_operator(",")) {
    if (now().kind == Kind::kBlockEnd || now().kind == Kind::kPrintEnd || is_operator(")")) break;
    items.push_back(conditional ? expression() : or_expression());
  }
  return list_of(std::move(items), true);
}

Expression ExpressionParser::expression() {
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

Expression ExpressionParser::or_expression() {
  Expression left = and_expression();
  while (take_word("or")) {
    left = [left, right = and_expression()](Renderer& r) {
      Value value = left(r);
      return value.truth() ? value : right(r);
    };
  }
  return left;
}

Expression ExpressionParser::and_expression() {
  Expression left = not_expression();
  while (take_word("and")) {
    left = [left, right = not_expression()](Renderer& r) {
      Value value = left(r);
      return value.truth() ? right(r) : value;
    };
  }
  return left;
}

Expression ExpressionParser::not_expression() {
  if (!take_word("not")) return comparison();
  const Level level(*this);
  return [value = not_expression()](Renderer& r) -> Value { return !value(r).truth(); };
}

// "" when no comparison follows.
std::string ExpressionParser::comparison_operator() {
  if (now().kind == Kind::kOperator) {
    for (const char* one : {"==", "!=", "<=", ">=", "<", ">"}) {
      if (take_operator(one)) return one;
    }
  }
  if (take_word("in")) return "in";
  if (is_word("not") && next().kind == Kind::kName && next().text == "in") {
    take();
    take();
    return "not in";
  }
  return "";
}

Expression ExpressionParser::comparison() {
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
Expression ExpressionParser::binary(std::initializer_list<const char*> operators,
                                    Operand&& operand) {
  Expression left = operand();
  for (int count = 0;; ++count) {
    const auto found =
        std::ranges::find_if(operators, [&](const char* one) { return is_operator(one); });
    if (found == operators.end()) return left;
    // The functions of a chain are nested too.
    if (count > 1000) error("too many operators in a row");
    take();
    left = [operation = std::string(*found), left, right = operand()](Renderer& r) {
      const Value a = left(r);
      return arithmetic(r, operation, a, right(r));
    };
  }
}

Expression ExpressionParser::sum() {
  return binary({"+", "-"}, [&] { return concatenation(); });
}

Expression ExpressionParser::concatenation() {
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

Expression ExpressionParser::product() {
  return binary({"*", "/", "//", "%"}, [&] { return power(); });
}

Expression ExpressionParser::power() {
  return binary({"**"}, [&] { return unary(true); });
}

Expression ExpressionParser::unary(bool with_filters) {
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

Expression ExpressionParser::primary() {
  const Level level(*this);
  if (now().kind == Kind::kEnd) error("an expression is needed");
  const Token& token = take();
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
      while (now().kind == Kind::kString) text += take().text;
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
  unexpected(token);
}

Expression ExpressionParser::parenthesis() {
  if (take_operator(")")) return list_of({}, true);
  Expression value = tuple_or_expression();
  expect_operator(")");
  return value;
}

Expression ExpressionParser::list_display() {
  std::vector<Expression> items;
  while (!is_operator("]")) {
    items.push_back(expression());
    if (!take_operator(",")) break;
  }
  expect_operator("]");
  return list_of(std::move(items), false);
}

Expression ExpressionParser::dict_display() {
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
Expression ExpressionParser::postfix(Expression value, bool with_calls) {
  for (int count = 0;; ++count) {
    if (count > 200) error("too many members in a row");
    if (take_operator(".")) {
      if (now().kind == Kind::kInteger) {
        value = [value, index = take().text](Renderer& r) {
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

Expression ExpressionParser::brackets(Expression value) {
  Expression parts[3];
  size_t part = 0;
  bool slice = false;
  while (!is_operator("]")) {
    if (take_operator(":")) {
      slice = true;
      if (++part > 2) unexpected(now());
    } else {
      if (parts[part]) unexpected(now());
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

ExpressionParser::Call ExpressionParser::call_arguments() {
  Call arguments;
  expect_operator("(");
  while (!is_operator(")")) {
    if (is_operator("*") || is_operator("**")) error("unpacked arguments are not supported");
    if (now().kind == Kind::kName && next().kind == Kind::kOperator && next().text == "=") {
      std::string argument = name();
      take();
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

Expression ExpressionParser::filters(Expression value) {
  for (int count = 0;; ++count) {
    if (count > 200) error("too many filters in a row");
    if (take_operator("|")) {
      value = filter(std::move(value));
    } else if (is_word("is")) {
      take();
      value = test(std::move(value));
    } else if (is_operator("(")) {
      value = postfix(std::move(value), true);
    } else {
      return value;
    }
  }
}

Expression ExpressionParser::filter(Expression value) {
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

Expression ExpressionParser::test(Expression value) {
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

}  // namespace natslm::data::jinja
