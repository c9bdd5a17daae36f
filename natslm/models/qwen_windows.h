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

// The same two ways back: sliding_window (null if no layer has one) and layer_types; and with
// Qwen's other two fields. Windows that differ in length are left for who reads them back to see.
void write_layer_types(const Config& config, HfFields::Json& json);
void write_qwen_windows(const Config& config, HfFields::Json& json);

}  // namespace natslm::models
