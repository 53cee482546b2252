"""config.json as well-known models have it: read, counted, and written again."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tessera.core.errors import Invalid
from tessera.models.config import CodecConfig, ModelConfig, ModelSpec
from tessera.models.memory import parameter_shapes
from tessera.models.plain import read_config, write_config
from tessera.models.presets import tiny_spec

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
COMMON: dict[str, Any] = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
}  # fmt: skip
# Name, what its config.json says, and the number of its params as published.
KNOWN: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 2 7B": ({
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "vocab_size": 32000,
    }, 6_738_415_616),
    "Llama 3.1 8B": ({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
        "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500000.0, "vocab_size": 128256,
    }, 8_030_261_248),
    "Mistral 7B v0.1": ({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "vocab_size": 32000,
    }, 7_241_732_096),
    "Qwen2.5 7B": ({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False, "vocab_size": 152064,
    }, 7_615_616_512),
    "Qwen3 8B": ({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
        "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
        "vocab_size": 151936,
    }, 8_190_735_360),
}  # fmt: skip


def read(said: dict[str, Any]) -> ModelConfig:
    return read_config(json.dumps(said).encode()).model


def params(model: ModelConfig) -> int:
    spec = ModelSpec(model=model, codec=CodecConfig(kind="dense", wire="float32", conv=False), stages=1)
    return sum(math.prod(shape) for shape in parameter_shapes(spec, 0).values())


@pytest.mark.parametrize("name", KNOWN)
def test_a_well_known_model_has_the_params_that_it_is_known_for(name: str) -> None:
    said, published = KNOWN[name]
    model = read({**COMMON, **said})
    assert params(model) == published
    assert model.window == (4096 if name.startswith("Mistral") else 0)
    assert read(write_config(model, tied=False, dtype="bfloat16", ends=(2,))) == model


def test_both_spellings_of_positions_say_the_same() -> None:
    said = {**COMMON, **KNOWN["Llama 3.1 8B"][0]}
    del said["rope_scaling"], said["rope_theta"]
    new = {**said, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}}
    older = {**said, "rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}}
    assert read(new) == read(older) == read({**COMMON, **KNOWN["Llama 3.1 8B"][0]})
    assert read(new).rope_stretch != read(said).rope_stretch is None


def test_a_key_that_asks_for_nothing_is_passed_over() -> None:
    said = {**COMMON, **KNOWN["Qwen3 8B"][0]}
    nothing = {"use_mrope": False, "quantization_config": None, "is_llama_config": True, "anything": None}
    assert read({**said, **nothing}) == read(said)
    assert read({**said, "sliding_window": 32, "use_sliding_window": False}) == read(said)


def test_a_context_is_chosen_within_what_the_model_was_made_for() -> None:
    data = json.dumps({**COMMON, **KNOWN["Mistral 7B v0.1"][0]}).encode()
    assert read_config(data, context=4096).model.window == 0  # within the window every token sees all
    assert read_config(data, context=4097).model.window == 4096
    with pytest.raises(Invalid, match="made for 32768"):
        read_config(data, context=32769)


def test_a_model_of_ours_is_written_as_the_family_that_computes_like_it() -> None:
    model = tiny_spec().model
    plain = model.model_copy(update={"qk_norm": False})
    for ours, family in (
        (model, "qwen3"), (plain, "llama"), (plain.model_copy(update={"window": 16}), "mistral"),
        (plain.model_copy(update={"qkv_bias": True}), "qwen2"),
    ):  # fmt: skip
        said = write_config(ours, tied=True, dtype="float32")
        assert (said["model_type"], said["tie_word_embeddings"]) == (family, True)
    with pytest.raises(Invalid, match="no family"):
        write_config(model.model_copy(update={"qkv_bias": True}), tied=False, dtype="float32")
