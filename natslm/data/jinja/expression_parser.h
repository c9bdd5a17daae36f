// The parser of expressions: each piece of the grammar becomes a function that evaluates it.
// Internal to data/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "natslm/data/jinja/template.h"
#include "natslm/data/jinja/token_cursor.h"

namespace natslm::data::jinja {

// Each function takes the tokens of what it is named for, from the present one on, and throws Error
// with the line where they are something else.
class ExpressionParser : public TokenCursor {
 public:
  using TokenCursor::TokenCursor;

  // The arguments of a call, a filter or a test.
  struct Call {
    std::vector<Expression> positional;
    std::vector<std::pair<std::string, Expression>> named;
    Arguments evaluate(Renderer& renderer) const;
  };

  // conditional: may an `if` follow? (After `in` of a loop it begins the loop's own condition.)
  Expression tuple_or_expression(bool conditional = true);
  Expression expression();
  // A name, a literal, a display or what stands in parentheses.
  Expression primary();
  // .name [key] [from:to:step] (arguments)
  Expression postfix(Expression value, bool with_calls);
  // (arguments)
  Call call_arguments();
  // |filter and `is` test, as many as follow.
  Expression filters(Expression value);
  // One filter: its name and its arguments.
  Expression filter(Expression value);

 private:
  // From the loosest operator to the tightest.
  Expression or_expression();
  Expression and_expression();
  Expression not_expression();
  Expression comparison();
  std::string comparison_operator();  // "" when no comparison follows
  Expression sum();
  Expression concatenation();
  Expression product();
  Expression power();
  Expression unary(bool with_filters);
  // Operands of one level of operators, from left to right.
  template <class Operand>
  Expression binary(std::initializer_list<const char*> operators, Operand&& operand);

  Expression parenthesis();
  Expression list_display();
  Expression dict_display();
  Expression brackets(Expression value);
  Expression test(Expression value);
};

}  // namespace natslm::data::jinja
