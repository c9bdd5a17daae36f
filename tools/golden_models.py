#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Records the logits that `transformers` computes for tiny random models, as the truth that tests compare with.

Needs `pip install torch==2.11.0 transformers==5.23.0 safetensors` in an environment of its own; building and
testing do not.

  golden_models.py          writes tests/golden/models/: cases.json (name, config.json, weight file, context to
                            open the model with), the weight files, and logits.safetensors (tokens and logits of
                            each case), and frequencies.json (rotary frequencies of published models' sizes)
"""

import copy
import json
import pathlib

import torch
import transformers
from safetensors.torch import load_file, save_file

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "models"
TOKENS = 40
SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GPT2 = dict(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=48, bos_token_id=1, eos_token_id=2)
SHORT, LONG = [1.0, 1.25, 1.5, 2.0], [1.5, 3.0, 6.0, 12.0]


def llama(**more):
    return transformers.LlamaConfig(**{**SIZES, **more})


def rope(kind, **more):
    return dict(rope_type=kind, rope_theta=500.0, **more)


# name: (config, context to open with or 0, weights to share with or None)
CASES = {
    "llama": (llama(), 0, None),
    "llama_biases_tied": (llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
                                num_key_value_heads=4), 0, None),
    "llama_head_dim": (llama(head_dim=16, num_key_value_heads=1), 0, None),
    "llama_theta": (llama(rope_parameters=rope("default")), 0, "llama"),
    "llama_linear": (llama(rope_parameters=rope("linear", factor=4.0)), 0, "llama"),
    "llama_dynamic_within": (llama(rope_parameters=rope("dynamic", factor=3.0)), 0, "llama"),
    "llama_dynamic_beyond": (llama(rope_parameters=rope("dynamic", factor=3.0), max_position_embeddings=16), TOKENS,
                             "llama"),
    "llama_llama3": (llama(rope_parameters=rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                original_max_position_embeddings=32)), 0, "llama"),
    "llama_yarn": (llama(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16)), 0, "llama"),
    "llama_yarn_options": (llama(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16,
                                                      beta_fast=8.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.7,
                                                      truncate=False)), 0, "llama"),
    "llama_yarn_attention": (llama(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16,
                                                        attention_factor=1.3)), 0, "llama"),
    "mistral": (transformers.MistralConfig(**SIZES, sliding_window=7), 0, "llama"),
    "mistral_no_window": (transformers.MistralConfig(**SIZES, sliding_window=None), 0, "llama"),
    "qwen2": (transformers.Qwen2Config(**SIZES), 0, None),
    "qwen2_windows": (transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6,
                                               max_window_layers=1), 0, "qwen2"),
    "qwen3": (transformers.Qwen3Config(**SIZES, head_dim=16), 0, None),
    "qwen3_windows": (transformers.Qwen3Config(**SIZES, head_dim=16, use_sliding_window=True, sliding_window=5,
                                               layer_types=["sliding_attention", "full_attention"]), 0, "qwen3"),
    "gemma3": (transformers.Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 3}, head_dim=16, sliding_window=6,
                                             query_pre_attn_scalar=20, sliding_window_pattern=3), 0, None),
    "gemma3_scaled": (transformers.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 3}, head_dim=16, sliding_window=6, query_pre_attn_scalar=20,
        final_logit_softcapping=3.0, layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={"full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e4),
                         "sliding_attention": dict(rope_type="default", rope_theta=100.0)}), 0, "gemma3"),
    "phi3": (transformers.Phi3Config(**SIZES), 0, None),
    "phi3_window": (transformers.Phi3Config(**SIZES, sliding_window=9), 0, "phi3"),
    "phi3_partial": (transformers.Phi3Config(**SIZES, rope_parameters=dict(
        rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5)), 0, "phi3"),
    "phi3_longrope_short": (transformers.Phi3Config(
        **SIZES, original_max_position_embeddings=48, rope_parameters=rope(
            "longrope", short_factor=SHORT, long_factor=LONG)), 48, "phi3"),
    "phi3_longrope_long": (transformers.Phi3Config(
        **SIZES, original_max_position_embeddings=16, rope_parameters=rope(
            "longrope", short_factor=SHORT, long_factor=LONG)), 0, "phi3"),
    "phi3_longrope_partial": (transformers.Phi3Config(
        **SIZES, original_max_position_embeddings=16, rope_parameters=rope(
            "longrope", short_factor=SHORT[:2], long_factor=LONG[:2], partial_rotary_factor=0.5)), 0, "phi3"),
    "gpt2": (transformers.GPT2Config(**GPT2), 0, None),
    "gpt2_options": (transformers.GPT2Config(**GPT2, activation_function="gelu", scale_attn_weights=False), 0, "gpt2"),
}


LLAMA8B = dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=1)
PHI_SHORT = [1.0 + 0.01 * i for i in range(48)]
PHI_LONG = [1.0 + 0.05 * i * i for i in range(48)]
# name: (config, tokens of the text)
FREQUENCIES = {
    "smollm2": (transformers.LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3,
                                         num_hidden_layers=1, max_position_embeddings=8192,
                                         rope_parameters=dict(rope_type="default", rope_theta=100000.0)), 8192),
    "llama3.1": (transformers.LlamaConfig(**LLAMA8B, max_position_embeddings=131072, rope_parameters=dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192)), 131072),
    "llama_dynamic": (transformers.LlamaConfig(**LLAMA8B, max_position_embeddings=4096, rope_parameters=dict(
        rope_type="dynamic", rope_theta=10000.0, factor=2.0)), 10000),
    "qwen2.5_yarn": (transformers.Qwen2Config(**LLAMA8B, max_position_embeddings=32768, rope_parameters=dict(
        rope_type="yarn", rope_theta=1000000.0, factor=4.0, original_max_position_embeddings=32768)), 131072),
    "phi3.5_short": (transformers.Phi3Config(
        hidden_size=3072, num_attention_heads=32, num_hidden_layers=1, max_position_embeddings=131072,
        original_max_position_embeddings=4096, rope_parameters=dict(
            rope_type="longrope", rope_theta=10000.0, short_factor=PHI_SHORT, long_factor=PHI_LONG)), 4096),
    "phi3.5_long": (transformers.Phi3Config(
        hidden_size=3072, num_attention_heads=32, num_hidden_layers=1, max_position_embeddings=131072,
        original_max_position_embeddings=4096, rope_parameters=dict(
            rope_type="longrope", rope_theta=10000.0, short_factor=PHI_SHORT, long_factor=PHI_LONG)), 4097),
}


def frequencies(config, tokens):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        return module.inv_freq, module.attention_scaling
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=tokens)


def record_frequencies():
    all = []
    for name, (config, tokens) in FREQUENCIES.items():
        inverse, attention_factor = frequencies(config, tokens)
        written = json.loads(config.to_json_string(use_diff=False))
        all.append(dict(name=name, text=tokens, attention_factor=attention_factor, config=written,
                        inverse=[float(f"{x:.9g}") for x in inverse.tolist()]))
    (FOLDER / "frequencies.json").write_text("[\n" + ",\n".join(map(json.dumps, all)) + "\n]\n")


def fill(model, seed):
    """Weights of some consequence: every one matters to the logits. bf16 numbers, so that files are small."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 2:
            fan_in = weight.shape[0] if "c_" in name else weight.shape[1]
            deviation = 1.0 if "embed_tokens" in name or "wte" in name else fan_in ** -0.5
            value = noise * deviation
        else:
            centre = 0.0 if name.endswith("bias") or model.config.model_type == "gemma3_text" else 1.0
            value = centre + 0.2 * noise
        weight.data.copy_(value.to(torch.bfloat16).to(torch.float32))


def older_form(config):
    """The same config as files from before transformers 5 have it."""
    config = copy.deepcopy(config)
    parameters = config.pop("rope_parameters")
    if "full_attention" in parameters:
        config["rope_theta"] = parameters["full_attention"].pop("rope_theta")
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
        del config["layer_types"]
        config["sliding_window_pattern"] = 3
    else:
        config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = parameters if parameters["rope_type"] != "default" else None
    if config["rope_scaling"] and config["model_type"] == "llama":
        parameters["type"] = parameters["rope_type"]
    return config


def main():
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    cases, recorded = [], {}
    tokens = torch.randint(0, 40, (1, TOKENS), generator=torch.Generator().manual_seed(7))
    for seed, (name, (config, context, shared)) in enumerate(CASES.items()):
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if shared:
            state = {key: value.float() for key, value in load_file(FOLDER / f"{shared}.safetensors").items()}
            missing, unexpected = model.load_state_dict(state, strict=False)
            assert not unexpected and set(missing) <= {"lm_head.weight"}, (name, missing, unexpected)
            model.tie_weights()
        else:
            fill(model, seed)
            state = {key: value.to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
            if config.tie_word_embeddings:
                state.pop("lm_head.weight", None)
            save_file(state, FOLDER / f"{name}.safetensors", {"format": "pt"})
        with torch.no_grad():
            logits = model(tokens).logits[0].contiguous()
        recorded[name] = logits
        written = json.loads(config.to_json_string(use_diff=False))
        written["architectures"] = [type(model).__name__]
        case = dict(name=name, weights=f"{shared or name}.safetensors", context=context, config=written)
        cases.append(case)
        if name in {"llama_theta", "llama_llama3", "llama_yarn", "gemma3", "phi3_longrope_long"}:
            cases.append(dict(case, name=name + "_older_config", logits=name, config=older_form(written)))
        print(f"{name}: logits of deviation {logits.std():.2f}")
    recorded["tokens"] = tokens[0]
    save_file(recorded, FOLDER / "logits.safetensors", {"transformers": transformers.__version__,
                                                        "torch": torch.__version__})
    # One line a case.
    record_frequencies()
    lines = ",\n".join(json.dumps(case) for case in cases)
    (FOLDER / "cases.json").write_text("[\n" + lines + "\n]\n")
    for file in FOLDER.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
