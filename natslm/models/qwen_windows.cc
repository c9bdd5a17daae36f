// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/qwen_windows.h"

#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"

namespace natslm::models {

std::vector<int32_t> windows_of_layer_types(const HfFields::Json& types, const Config& config,
                                            int32_t window) {
  NATSLM_CHECK(types.is_array() && std::ssize(types) == config.layers,
               "the field 'layer_types' must be a list of ", config.layers, " kinds");
  std::vector<int32_t> windows;
  for (const auto& type : types) {
    const bool sliding = type == "sliding_attention";
    NATSLM_CHECK(sliding || type == "full_attention", "the field 'layer_types' has ",
                 in_quotes(type.dump()),
                 "; this build has \"full_attention\" and \"sliding_attention\"");
    NATSLM_CHECK(!sliding || window > 0, "a layer has sliding attention, but there is no window");
    windows.push_back(sliding ? window : 0);
  }
  return windows;
}

void read_qwen_windows(HfFields& fields, Config& c) {
  const bool used = fields.flag("use_sliding_window", false);
  const int32_t window = fields.integer("sliding_window", used ? 4096 : 0);
  const int32_t first = fields.integer("max_window_layers", 28);
  if (const HfFields::Json* types = fields.find("layer_types")) {
    c.blocks.windows = windows_of_layer_types(*types, c, used ? window : 0);
  } else if (used) {
    for (int32_t i = 0; i < c.layers; ++i) c.blocks.windows.push_back(i >= first ? window : 0);
  }
}

void write_layer_types(const Config& c, HfFields::Json& json) {
  json["sliding_window"] = nullptr;
  json["layer_types"] = HfFields::Json::array();
  for (int32_t i = 0; i < c.layers; ++i) {
    const int32_t window = c.window(i);
    if (window > 0) json["sliding_window"] = window;
    json["layer_types"].push_back(window > 0 ? "sliding_attention" : "full_attention");
  }
}

void write_qwen_windows(const Config& c, HfFields::Json& json) {
  write_layer_types(c, json);
  json["use_sliding_window"] = !json["sliding_window"].is_null();
  // What readers without layer_types go by: windows from this layer on.
  int32_t first = c.layers;
  while (first > 0 && c.window(first - 1) > 0) --first;
  json["max_window_layers"] = first;
}

}  // namespace natslm::models
