"""Small checkpoints in plain form of every family, with numbers that follow from their names, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from tessera.models.config import CodecConfig
from tessera.models.decode import StageDecoder
from tessera.models.noise import integers, symmetric
from tessera.models.plain_folder import PlainFolder
from tessera.models.stage_file import load_stage, write_stage

BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3},
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 16, "head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "qwen2": {  # as files before transformers 5 say it, and with the head tied to the table
        "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "float32",
        "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 4, "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32, "attention_bias": False, "sliding_window": None, "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
}  # fmt: skip
PROMPT = [int(token) for token in integers(24, 320, "plain", "prompt")]
NEW = 64


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    return {**BASE, "model_type": family, **FAMILIES[family], **changes}


def tensors_of(family: str) -> dict[str, Tensor]:
    """By plain names. Spread so that greedy text is no repetition, gains and biases far from 1 and 0."""
    c = config_of(family)
    d, ffn, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"]
    head = c.get("head_dim", d // c["num_attention_heads"])
    heads = {"q": c["num_attention_heads"] * head, "k": kv * head, "v": kv * head}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for name, rows in heads.items():
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, d)
            if family == "qwen2":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        if family == "qwen3":
            shapes |= {f"{at}.self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
        shapes[f"{at}.self_attn.o_proj.weight"] = (d, heads["q"])
        shapes |= {f"{at}.mlp.gate_proj.weight": (ffn, d), f"{at}.mlp.up_proj.weight": (ffn, d)}
        shapes |= {f"{at}.mlp.down_proj.weight": (d, ffn)}
        shapes |= {f"{at}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    return {name: _numbers(family, name, shape) for name, shape in shapes.items()}


def write_folder(
    path: Path, family: str, *, files: int = 3, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A checkpoint in `files` files, one without an index. `changes` are of the config alone."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config_of(family, **changes)))
    tensors = {name: tensor.to(dtype) for name, tensor in sorted(tensors_of(family).items())}
    if files == 1:
        safetensors.torch.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    where = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[number::files])
        safetensors.torch.save_file(part, path / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def write_tokenizer(path: Path, **facts: Any) -> None:
    """Byte-level, of 320 tokens, with three markers; the second ends a text."""
    engine = Tokenizer(BPE())
    engine.pre_tokenizer, engine.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    markers = ["<s>", "<|im_end|>", "<|im_start|>"]
    trainer = BpeTrainer(
        vocab_size=320, special_tokens=markers, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    text = (
        "the user said to the assistant that the system is here and every word of it counts for something new, always"
    )
    engine.train_from_iterator([text] * 8, trainer=trainer)
    (path / "tokenizer.json").write_text(str(engine.to_str()))
    config = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHATML, **facts}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


class Staged:
    """A checkpoint cut into stages, each from a file of its own, decoded one after another."""

    def __init__(self, folder: PlainFolder, stages: int, wire: str, work: Path) -> None:
        work.mkdir(exist_ok=True)
        spec = folder.spec(stages, CodecConfig.model_validate({"kind": "dense", "wire": wire, "conv": False}))
        self.decoders = []
        for stage in range(stages):
            write_stage(folder.stage(spec, stage), work / f"{stage}")
            self.decoders.append(StageDecoder(load_stage(spec, stage, work / f"{stage}")))

    def logits(self, session: str, ids: list[int]) -> Tensor:
        """After the last of `ids`."""
        message: Any = None
        for decoder in self.decoders:
            message = decoder.step(session, ids, message)
        return message

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
        """The tokens, and the logits of the first and the last of them [2, V]."""
        found, logits = [], [self.logits("greedy", prompt)]
        for _ in range(count):
            found.append(int(logits[-1].argmax()))
            logits.append(self.logits("greedy", found[-1:]))
        return found, torch.stack([logits[0], logits[-2]])


def _numbers(family: str, name: str, shape: tuple[int, ...]) -> Tensor:
    std = 0.3 if len(shape) == 1 else 1.5 / shape[1] ** 0.5
    numbers = torch.from_numpy(symmetric(shape, std, "plain", family, name))
    return numbers if len(shape) == 2 or name.endswith("bias") else numbers + 1
