// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/vocabulary_json.h"

#include "natslm/base/error.h"

namespace natslm::data {
namespace {

std::pair<int32_t, int32_t> merge_of(const Names& names, const std::string& left,
                                     const std::string& right, const std::string& where) {
  const auto l = names.find(left), r = names.find(right);
  NATSLM_CHECK(l != names.end(), where, ": \"", left, "\" is not in the vocabulary");
  NATSLM_CHECK(r != names.end(), where, ": \"", right, "\" is not in the vocabulary");
  return {l->second, r->second};
}

}  // namespace

Names read_names(const Field& vocabulary) {
  vocabulary.need(vocabulary.value().is_object() && !vocabulary.value().empty(),
                  "must be an object of tokens and ids");
  Names names;
  std::unordered_map<int32_t, const std::string*> owner;
  for (const auto& [name, value] : vocabulary.value().items()) {
    const Field field(value, vocabulary.name() + "[\"" + name + "\"]");
    const int32_t id = field.id();
    const auto entry = names.emplace(name, id).first;
    const auto [other, fresh] = owner.try_emplace(id, &entry->first);
    field.need(fresh, fresh ? "" : "is also the id of \"" + *other->second + "\"");
    field.need(!name.empty(), "has no text");
  }
  return names;
}

std::pair<int32_t, int32_t> merge_of_line(const Names& names, const std::string& line,
                                          const std::string& where) {
  const size_t space = line.find(' ');
  NATSLM_CHECK(space != std::string::npos && space > 0 && space + 1 < line.size() &&
                   line.find(' ', space + 1) == std::string::npos,
               where, ": must be two tokens with a space between");
  return merge_of(names, line.substr(0, space), line.substr(space + 1), where);
}

void read_each_merge(const Field& merges, const Names& names,
                     const std::function<void(size_t, int32_t, int32_t)>& use) {
  for (size_t i = 0; i < merges.items(); ++i) {
    const Field merge = merges.item(i);
    std::pair<int32_t, int32_t> pair;
    if (merge.value().is_array()) {
      merge.need(merge.items() == 2, "must be two tokens");
      pair = merge_of(names, merge.item(0).text(), merge.item(1).text(), merge.name());
    } else {
      pair = merge_of_line(names, merge.text(), merge.name());
    }
    use(i, pair.first, pair.second);
  }
}

}  // namespace natslm::data
