// The sliding windows of Qwen's configs. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/models/hf_config.h"

namespace natslm::models {

// use_sliding_window, sliding_window, max_window_layers or layer_types -> config.blocks.windows.
void read_qwen_windows(HfFields& fields, Config& config);
// layer_types of a config -> windows; `window` is that of its sliding layers. Throws Error for a
// kind of layer other than "full_attention" and "sliding_attention".
std::vector<int32_t> windows_of_layer_types(const HfFields::Json& types, const Config& config,
                                            int32_t window);

}  // namespace natslm::models
