"""config.json of a Llama-family model in Hugging Face's layout, read into a `ModelConfig` and written from one.

A model that other programs can hold is in *plain form*. Reading is by a closed list: a key is used, or is passed over
because it concerns training or another program, or asks for nothing (null, false); whatever else it asks for is refused
by name, because a model that is computed a little differently is wrong without telling. Both spellings of a key are
read, those before transformers 5 and those since. tests/exact/test_models_parity.py compares with transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from tessera.core.errors import Invalid
from tessera.models.config import ModelConfig, RopeStretch

__all__ = ["CONFIG_LIMIT", "CONTEXT_LIMIT", "Family", "PlainConfig", "read_config", "read_json", "write_config"]

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
CONFIG_LIMIT = 1 << 20  # bytes of config.json
CONTEXT_LIMIT = 131_072  # tokens, of `ModelConfig`

_CLASSES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# What concerns training, another program, or is found elsewhere: end tokens in generation_config.json, the number type
# in the tensors themselves.
_PASSED_OVER = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
    "hidden_dropout", "initializer_range", "is_llama_config", "pad_token_id", "torch_dtype",
    "transformers.js_config", "transformers_version", "use_cache",
})  # fmt: skip
_FIXED: dict[str, object] = {"hidden_act": "silu", "pretraining_tp": 1, "partial_rotary_factor": 1.0}
_USED = frozenset({
    "head_dim", "hidden_size", "intermediate_size", "layer_types", "max_position_embeddings", "max_window_layers",
    "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings",
    "use_sliding_window", "vocab_size",
})  # fmt: skip
_STRETCH = {"factor": "factor", "low_freq_factor": "slow", "high_freq_factor": "fast",
            "original_max_position_embeddings": "trained"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlainConfig:
    """What a config.json says."""

    family: Family
    model: ModelConfig
    tied: bool  # the head is the token table


def read_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises: Invalid: it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Invalid(f"{what} is not a JSON object")
    return value


def read_config(data: bytes, *, context: int = 0, compute: Literal["float32", "bfloat16"] = "float32") -> PlainConfig:
    """The model that config.json describes.

    Args:
        context: most tokens of a session; 0 = as many as the model was made for, up to 131,072.

    Raises: Invalid naming what is missing, wrong or not known here.
    """
    found = read_json(data, "config.json")
    if found.get("quantization_config") is not None:
        raise Invalid("config.json has a quantization_config: only params in float32, float16 or bfloat16 are read")
    family = _family(found)
    _refuse_others(found)
    made_for = _integer(found, "max_position_embeddings")
    if context > made_for:
        raise Invalid(f"the model was made for {made_for} tokens of context, not {context}")
    context = context or min(made_for, CONTEXT_LIMIT)
    width, heads = _integer(found, "hidden_size"), _integer(found, "num_attention_heads")
    head = _integer(found, "head_dim", width // max(heads, 1))
    base, stretch = _rope(found)
    facts = {
        "vocab_size": _integer(found, "vocab_size"),
        "width": width,
        "layers": _integer(found, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": _integer(found, "num_key_value_heads", heads),
        "ffn": _integer(found, "intermediate_size"),
        "context": context,
        "rope_base": base,
        "norm_eps": _number(found, "rms_norm_eps", 1e-6),
        "qk_norm": family == "qwen3",
        "compute": compute,
        "head_size": 0 if head * heads == width else head,
        "qkv_bias": family == "qwen2",
        "window": _window(found, family, context),
        "rope_stretch": stretch,
    }
    try:
        return PlainConfig(family, ModelConfig.model_validate(facts), found.get("tie_word_embeddings") is True)
    except ValidationError as error:
        first = error.errors()[0]
        raise Invalid(f"config.json: {'.'.join(map(str, first['loc'])) or 'sizes'}: {first['msg']}") from error


def write_config(model: ModelConfig, *, tied: bool, dtype: str, ends: tuple[int, ...] = ()) -> dict[str, Any]:
    """config.json of `model`, as transformers 5 writes it; its older names stand beside where they differ.

    Raises: Invalid: no family is computed like this.
    """
    family = _family_of(model)
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_stretch is not None:
        stretch = model.rope_stretch.model_dump()
        rope = {"rope_type": "llama3", **{theirs: stretch[ours] for theirs, ours in _STRETCH.items()}}
    facts: dict[str, Any] = {
        "architectures": [next(name for name, known in _CLASSES.items() if known == family)],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_parameters": {**rope, "rope_theta": model.rope_base},
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "eos_token_id": list(ends) or None,
        "bos_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if model.rope_stretch is not None:
        facts["rope_scaling"] = rope
    if family in ("qwen2", "qwen3"):
        slides = model.window > 0
        facts |= {"use_sliding_window": slides, "max_window_layers": 0 if slides else model.layers}
        facts["layer_types"] = ["sliding_attention" if slides else "full_attention"] * model.layers
    if family != "llama":
        facts["sliding_window"] = model.window or None
    return facts


# --- inside -----------------------------------------------------------------------------------------------------------


def _family(found: Mapping[str, Any]) -> Family:
    classes = found.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    kind = _CLASSES.get(name) if isinstance(name, str) else None
    if kind is None or found.get("model_type") != kind:
        said = f"model_type {str(found.get('model_type'))[:40]!r}, architectures {str(classes)[:80]}"
        raise Invalid(f"config.json says {said}: known are {', '.join(_CLASSES)}")
    return kind


def _family_of(model: ModelConfig) -> Family:
    """Which of the families computes like this."""
    if model.qkv_bias and model.qk_norm:
        raise Invalid("no family has both a bias on queries, keys and values and normalised queries and keys")
    if model.qk_norm or model.qkv_bias:
        return "qwen3" if model.qk_norm else "qwen2"
    return "mistral" if model.window else "llama"


def _refuse_others(found: Mapping[str, Any]) -> None:
    for key, value in found.items():
        if key in _USED or key in _PASSED_OVER or value is None or value is False:
            continue
        if key not in _FIXED:
            raise Invalid(f"config.json asks for {key[:60]} = {str(value)[:60]}, which is not known here")
        if value != _FIXED[key]:
            raise Invalid(f"config.json asks for {key} = {str(value)[:60]}; only {_FIXED[key]} is known here")


def _window(found: Mapping[str, Any], family: Family, context: int) -> int:
    """Tokens that a token sees; 0 = all. One window for all layers."""
    window = _integer(found, "sliding_window", 0)
    if family == "llama" or window == 0 or window >= context:
        return 0
    if family == "mistral":
        return window
    if found.get("use_sliding_window") is not True:
        return 0
    layers = _integer(found, "num_hidden_layers")
    kinds = found.get("layer_types")
    if kinds is None:
        full = _integer(found, "max_window_layers", layers)
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if kinds == ["full_attention"] * layers:
        return 0
    if kinds == ["sliding_attention"] * layers:
        return window
    raise Invalid(f"config.json's layer_types differ from layer to layer: take a context of at most {window} tokens")


def _rope(found: Mapping[str, Any]) -> tuple[float, RopeStretch | None]:
    """The base of the positions and how they are stretched, from either spelling."""
    new, old = (_object(found, key) for key in ("rope_parameters", "rope_scaling"))
    rope = new or old
    base = _number(rope if "rope_theta" in rope else found, "rope_theta", 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise Invalid(f"config.json asks for rope_type {str(kind)[:40]!r}; known are 'default' and 'llama3'")
    known = {"rope_type", "type", "rope_theta", *(_STRETCH if kind == "llama3" else ())}
    others = sorted(key for key in rope.keys() - known if rope[key] != _FIXED.get(key))
    if others:
        raise Invalid(f"config.json's rope asks for {others[0][:60]}, which is not known here")
    if kind == "default":
        return base, None
    facts = {ours: _number(rope, theirs) for theirs, ours in _STRETCH.items()}
    try:
        return base, RopeStretch.model_validate({**facts, "trained": int(facts["trained"])})
    except ValidationError as error:
        raise Invalid(f"config.json's rope: {error.errors()[0]['msg']}") from error


def _object(found: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = found.get(key)
    if value is not None and not isinstance(value, dict):
        raise Invalid(f"config.json's {key} is an object, not {str(value)[:60]}")
    return value or {}


def _integer(found: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = found.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 <= value < 2**31:
        raise Invalid(f"config.json's {key} is an integer ≥ 0, not {str(value)[:60]}")
    return value


def _number(found: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = found.get(key)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float) or not 0 <= value < 2**31:  # type: ignore[operator]
        raise Invalid(f"config.json's {key} is a number ≥ 0, not {str(value)[:60]}")
    return float(value)  # type: ignore[arg-type]
