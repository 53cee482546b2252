"""Checkpoint folders that somebody else made: refused whole, by name, before a number is believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from plain_world import config_of, write_folder
from tessera.core.errors import Invalid
from tessera.models.config import CodecConfig
from tessera.models.plain import read_config
from tessera.models.plain_folder import PlainFolder
from tessera.models.stage_file import load_stage, write_stage

DENSE = CodecConfig(kind="dense", wire="float32", conv=False)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "llama", "llama", files=1)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_experts", 8, "num_experts = 8"),
        ("hidden_act", "gelu", "hidden_act = gelu; only silu"),
        ("attention_bias", True, "attention_bias = True"),
        ("mlp_bias", True, "mlp_bias"),
        ("attention_multiplier", 0.01, "attention_multiplier"),
        ("logit_scale", 2.0, "logit_scale"),
        ("architectures", ["GPT2LMHeadModel"], "known are LlamaForCausalLM"),
        ("architectures", ["Qwen3ForCausalLM"], "model_type 'llama'"),
        ("architectures", [], "architectures"),
        ("quantization_config", {"quant_method": "gptq"}, "quantization_config"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "rope_type 'yarn'"),
        ("rope_parameters", {"rope_type": "llama3", "factor": 4.0}, "low_freq_factor"),
        ("rope_parameters", {"rope_type": "llama3", "mscale": 1.0}, "mscale"),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "full_attention"),
        ("rope_parameters", [1], "is an object"),
        ("hidden_size", 2**40, "hidden_size"),
        ("hidden_size", 30_000, "width"),
        ("hidden_size", "64", "hidden_size"),
        ("num_hidden_layers", 100_000, "layers"),
        ("vocab_size", -1, "vocab_size"),
        ("num_attention_heads", 0, "heads"),
        ("num_key_value_heads", 3, "cannot share"),
        ("rms_norm_eps", 1e400, "rms_norm_eps"),
        ("rms_norm_eps", "small", "rms_norm_eps"),
        ("max_position_embeddings", None, "max_position_embeddings"),
    ],
)
def test_what_a_config_asks_for_and_we_do_not_compute_is_refused_by_name(key: str, value: Any, reason: str) -> None:
    with pytest.raises(Invalid, match=reason):
        read_config(json.dumps(config_of("llama", **{key: value})).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"model_type": NaN}'])
def test_a_config_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(Invalid, match=r"config\.json"):
        read_config(data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra, which no part"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(65)}), r"shape \(65,\)"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}), "I8: quantised"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(64).to(torch.float8_e4m3fn)}), "F8_E4M3: quantised"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    folder: Path, change: Callable[[dict[str, Tensor]], object], reason: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(Invalid, match=reason):
        PlainFolder(folder)


def test_numbers_that_are_not_finite_are_refused_when_they_are_read(folder: Path) -> None:
    rewrite(folder, lambda t: t["model.layers.3.mlp.down_proj.weight"].view(-1)[7:8].fill_(float("nan")))
    opened = PlainFolder(folder)
    opened.stage(opened.spec(4, DENSE), 0)
    with pytest.raises(Invalid, match=r"layers\.3\.mlp\.down_proj\.weight holds numbers"):
        opened.stage(opened.spec(4, DENSE), 3)


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden.safetensors", "x.bin", 7, None]
)
def test_an_index_names_files_of_its_folder_and_nothing_else(tmp_path: Path, name: object) -> None:
    folder = write_folder(tmp_path / "llama", "llama", files=2)
    shutil.copytree(folder, tmp_path / "other")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(Invalid, match="expected a safetensors file of this folder"):
        PlainFolder(folder)


def test_an_index_that_lies_about_a_tensor_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", "llama", files=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    index["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index["weight_map"]["nowhere"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(Invalid, match="it does not"):
        PlainFolder(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", "llama", files=2)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        tensors = safetensors.torch.load_file(folder / name)
        safetensors.torch.save_file({**tensors, "twice": torch.zeros(2)}, folder / name)
    with pytest.raises(Invalid, match="twice lies in"):
        PlainFolder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_params_are_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00true\x85R.")
    with pytest.raises(Invalid, match="pickled params, which may run code"):
        PlainFolder(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 200, 5_000])
def test_a_file_that_is_cut_short_is_refused(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(Invalid, match=r"cannot read model\.safetensors"):
        PlainFolder(folder)


def test_a_header_that_claims_more_than_the_file_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(Invalid, match=r"cannot read model\.safetensors"):
        PlainFolder(folder)


def test_a_stage_needs_the_files_of_its_own_tensors_only(tmp_path: Path) -> None:
    """Cut by layers, as large checkpoints are: after the headers, no other file is looked at."""
    folder = write_folder(tmp_path / "llama", "llama", files=1)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for name in tensors:
        part = name.split(".")[2] if ".layers." in name else "ends"
        where[name] = f"part-{part}.safetensors"
    for file in set(where.values()):
        safetensors.torch.save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    opened = PlainFolder(folder)
    spec = opened.spec(4, DENSE)
    for layer in (0, 2, 3):
        (folder / f"part-{layer}.safetensors").unlink()
    (folder / "part-ends.safetensors").unlink()
    assert {name.split(".")[1] for name in opened.stage(spec, 1)} == {"1"}
    with pytest.raises(Invalid, match="cannot read part-2"):
        opened.stage(spec, 2)


def test_a_stages_file_is_compared_with_what_the_stage_is(folder: Path, tmp_path: Path) -> None:
    opened = PlainFolder(folder)
    spec, file = opened.spec(4, DENSE), tmp_path / "stage"
    params = opened.stage(spec, 1)
    changes: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in params.items() if not k.endswith("down")}, "down is missing"),
        ({**params, "head": torch.zeros(2)}, "head is missing or unexpected"),
        ({**params, "layers.1.down": torch.zeros(64, 95)}, r"expected \(64, 96\)"),
        ({**params, "layers.1.down": params["layers.1.down"].bfloat16()}, "bfloat16, expected"),
    ]
    for tensors, reason in changes:
        write_stage(tensors, file)
        with pytest.raises(Invalid, match=reason):
            load_stage(spec, 1, file)
    file.write_bytes(b"no safetensors")
    with pytest.raises(Invalid, match="cannot read stage 1"):
        load_stage(spec, 1, file)


def test_more_stages_than_layers_and_more_context_than_it_was_made_for_are_refused(folder: Path) -> None:
    with pytest.raises(Invalid, match="1 to as many stages, not 5"):
        PlainFolder(folder).spec(5, DENSE)
    with pytest.raises(Invalid, match="made for 128 tokens"):
        PlainFolder(folder, context=129)
