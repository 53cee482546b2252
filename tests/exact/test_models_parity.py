"""Models made elsewhere against transformers itself, and ours the other way round.

Tolerance: with a float32 wire 1e-4 of logits whose spread is about 3 (the sums are the same, in another order);
bfloat16 and int8 round the stream at each boundary, by 2^-9 of each number and by 1/254 of the largest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from plain_world import FAMILIES, NEW, PROMPT, Staged, tensors_of, write_folder
from tessera.core.errors import Conflict, Invalid
from tessera.models.config import CodecConfig, ModelSpec
from tessera.models.decode import StageDecoder
from tessera.models.noise import integers
from tessera.models.pipeline import Pipeline
from tessera.models.plain_export import export_plain
from tessera.models.plain_folder import PlainFolder
from tessera.models.presets import Kind, preset_codec, tiny_spec
from tessera.models.stage import Stage
from tessera.models.tokenizer import train_tokenizer


def theirs(path: Path) -> tuple[list[int], Tensor]:
    """Greedy tokens of transformers, with its own cache, and the logits after the prompt."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model(prompt).logits[0, -1].float()
        new = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    return new[0, len(PROMPT) :].tolist(), logits


@pytest.mark.slow  # importing transformers takes longer than everything else
@pytest.mark.parametrize("family", FAMILIES)
def test_staged_decoding_equals_transformers(family: str, tmp_path: Path) -> None:
    path = write_folder(tmp_path / family, family)
    tokens, logits = theirs(path)
    for stages, wire, tolerance in (
        (1, "float32", 1e-4),
        (4, "float32", 1e-4),
        (4, "bfloat16", 0.15),
        (4, "int8", 0.6),
    ):
        found, first_last = Staged(PlainFolder(path), stages, wire, tmp_path / f"{stages}{wire}").greedy(PROMPT, NEW)
        assert float((first_last[0] - logits).abs().max()) < tolerance, wire
        if wire == "float32":
            assert found == tokens


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_in_bfloat16_is_the_imported_model_again(family: str, tmp_path: Path) -> None:
    """Tensor for tensor, the tied head included; and transformers computes the same with both."""
    path = write_folder(tmp_path / family, family, dtype=torch.bfloat16)
    folder = PlainFolder(path)
    assert folder.config.model.compute == "bfloat16"
    spec = folder.spec(3, CodecConfig(kind="dense", wire="bfloat16", conv=False))
    export_plain(spec, lambda stage: folder.stage(spec, stage), tmp_path / "out", ends=(2, 5))
    again = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        again |= safetensors.torch.load_file(file)
    assert again.keys() == tensors_of(family).keys()
    assert all(torch.equal(again[name].bfloat16(), t.bfloat16()) for name, t in tensors_of(family).items())
    assert PlainFolder(tmp_path / "out").config.model == folder.config.model
    for ours, other in zip(theirs(tmp_path / "out"), theirs(path), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(other))


OURS = [token % 300 for token in PROMPT]  # our tiny models know fewer


def trained(kind: Kind, stages: int, conv: bool) -> tuple[ModelSpec, Pipeline]:
    """A few steps on any tokens: no parameter is what it started as."""
    spec = tiny_spec(stages, codec=kind)
    codec = preset_codec(kind, 8).model_copy(update={"wire": "float32", "conv": conv})
    spec = spec.model_copy(update={"codec": codec})
    pipeline = Pipeline(spec, steps=4)
    for step in range(3):
        pipeline.train_step(step, [torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(step))])
    return spec, pipeline


def parameters(pipeline: Pipeline, stage: int) -> Mapping[str, Tensor]:
    return dict(pipeline.trainers[stage].stage.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "ssn", "reparam"])
def test_a_model_of_ours_comes_back_from_plain_form_as_it_was(kind: Kind, tmp_path: Path) -> None:
    spec, pipeline = trained(kind, 2, conv=False)
    export_plain(spec, lambda stage: parameters(pipeline, stage), tmp_path / "out")
    message: Any = None
    for trainer in pipeline.trainers:
        message = StageDecoder(trainer).step("s", OURS, message)
    back = Staged(PlainFolder(tmp_path / "out"), 2, "float32", tmp_path / "stages").logits("s", OURS)
    torch.testing.assert_close(back, message, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stages"), [("dense", 2), ("reparam", 2), ("ssn", 4), ("codec", 1)])
def test_transformers_computes_what_ours_does_from_its_export(kind: Kind, stages: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec, pipeline = trained(kind, stages, conv=False)
    tokenizer = train_tokenizer(["def main():\n    return 1\n"] * 3, 300)
    export_plain(
        spec, lambda stage: parameters(pipeline, stage), tmp_path / "out", ends=(0,), files=tokenizer.plain_files()
    )
    text = [int(token) for token in integers(spec.model.context, 300, "plain", "text")]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        logits_TV = model(torch.tensor([text])).logits[0]
    decoders = [StageDecoder(trainer) for trainer in pipeline.trainers]
    for at, token in enumerate(text):
        message: Any = None
        for decoder in decoders:
            message = decoder.step("s", [token], message)
        torch.testing.assert_close(message, logits_TV[at], rtol=0, atol=1e-4)
    known = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert known.encode("def café():") == tokenizer.encode("def café():")
    assert known.eos_token_id == 0


@pytest.mark.parametrize(("kind", "stages"), [("codec", 2), ("control", 2)])
def test_what_has_no_counterpart_elsewhere_is_refused_before_a_file_is_written(
    kind: Kind, stages: int, tmp_path: Path
) -> None:
    with pytest.raises(Invalid, match="no counterpart"):
        export_plain(tiny_spec(stages, codec=kind), lambda stage: {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trained_convolution_at_the_entry_is_refused(tmp_path: Path) -> None:
    spec = tiny_spec(2, codec="dense")
    params = {name: parameter.detach().clone() for name, parameter in Stage(spec, 0).named_parameters()}
    params["codecs.0.table.taps"][1, 3] = 0.5
    with pytest.raises(Invalid, match="several tokens"):
        export_plain(spec, lambda stage: params, tmp_path / "out")


def test_an_export_never_writes_over_anything(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("here")
    with pytest.raises(Conflict, match="holds something"):
        export_plain(tiny_spec(1, codec="dense"), lambda stage: {}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_layer_to_layer_window_is_served_within_it(tmp_path: Path) -> None:
    """Within the window both kinds of layers are the same."""
    mixed = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 64}
    path = write_folder(tmp_path / "mixed", "qwen2", **mixed)
    with pytest.raises(Invalid, match="context of at most 64"):
        PlainFolder(path)
    assert PlainFolder(path, context=64).config.model.window == 0
    every = write_folder(tmp_path / "every", "qwen2", **{**mixed, "max_window_layers": 0})
    assert PlainFolder(every).config.model.window == 64
    assert json.loads((every / "config.json").read_text())["use_sliding_window"] is True
