"""Specs: what they refuse, and the costs that follow from shapes."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tessera.core.encoding import decode, encode
from tessera.core.errors import Invalid
from tessera.models.config import CodecConfig, ModelSpec, parse_spec
from tessera.models.memory import parameter_shapes
from tessera.models.pipeline import Pipeline
from tessera.models.presets import default_spec, tiny_spec


def changed(**parts: dict[str, Any]) -> dict[str, Any]:
    data = tiny_spec().model_dump()
    for part, values in parts.items():
        data[part] = {**data[part], **values}
    return data


def test_a_spec_survives_canonical_encoding() -> None:
    spec = default_spec()
    assert parse_spec(decode(encode(spec.model_dump()), 100_000)) == spec
    assert spec.digest() == default_spec().digest() != default_spec(seed=1).digest()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (changed(model={"colour": 1}), "model.colour"),
        (changed(model={"width": "32"}), "model.width"),
        (changed(model={"width": True}), "model.width"),
        (changed(model={"width": 30, "heads": 4}), "does not split into 4 heads"),
        (changed(model={"head_size": 15}), "even size, not 15"),
        (changed(model={"head_size": 16}), "leave it out"),
        (changed(model={"rope_stretch": {"factor": 8.0, "slow": 4.0, "fast": 1.0, "trained": 32}}), "below fast"),
        (changed(model={"heads": 4, "kv_heads": 3}), "cannot share"),
        (changed(model={"rope_base": float("nan")}), "model.rope_base"),
        (changed(model={"compute": "float16"}), "model.compute"),
        (changed(codec={"k": 0}), "needs k"),
        (changed(codec={"k": 33}), "wider than the stream"),
        (changed(codec={"k": 9, "wire": "int5"}), "whole bytes"),
        (changed(codec={"kind": "dense"}), "k must be 0"),
        (changed(codec={"kind": "control"}), "k must be 0"),
        (changed(codec={"kind": "reparam"}), "conv must be false"),
        (changed(codec={"kind": "ssn"}), "conv must be false"),
        (changed(codec={"kind": "ssn", "conv": False, "pairs": 8}), "pairs 0"),
        (changed(optimizer={"muon_rate": -1.0}), "optimizer.muon_rate"),
        ({**tiny_spec().model_dump(), "stages": 5}, "at least as many layers"),
        ({**tiny_spec().model_dump(), "stages": 0}, "stages"),
        ([], "spec"),
        (None, "spec"),
    ],
)
def test_a_wrong_field_is_named(data: object, reason: str) -> None:
    with pytest.raises(Invalid, match=reason):
        parse_spec(data)


@pytest.mark.parametrize("stages", range(1, 5))
def test_cuts_cover_every_layer_once_and_evenly(stages: int) -> None:
    cuts = default_spec(stages).cuts()
    assert [layer for cut in cuts for layer in cut] == list(range(4))
    sizes = [len(cut) for cut in cuts]
    assert len(sizes) == stages
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("kind", ["codec", "control", "dense", "reparam", "ssn"])
def test_flops_are_those_of_the_matrix_products_that_run(kind: Any) -> None:
    """torch counts the products of a training step; attention, which it counts without the causal half, apart."""
    spec = tiny_spec(3, codec=kind)
    length, counted = spec.model.context, []
    pipeline, ids = Pipeline(spec, steps=1), torch.zeros(1, length + 1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        pipeline.train_step(0, [ids])
    by_operation = counter.get_flop_counts()["Global"]
    counted = sum(n for operation, n in by_operation.items() if str(operation) in ("aten.mm", "aten.addmm"))
    attention = 6 * spec.model.layers * 2 * spec.model.width * (length // 2)
    formula = sum(spec.flops_per_token(stage) for stage in range(3)) - attention
    # Fixed bases need no gradient of their own and stage 0's table lies in span(U): both run fewer products.
    assert counted == pytest.approx(formula * length, rel=0.2 if spec.codec.subspace else 1e-12)


ELSEWHERE: dict[str, Any] = {"head_size": 24, "qkv_bias": True, "window": 16}


def test_what_only_models_made_elsewhere_have_is_left_out_of_the_canonical_form_of_others() -> None:
    """So that a run's id does not depend on which of them this version knows."""
    assert not {*ELSEWHERE, "rope_stretch"} & tiny_spec().model_dump()["model"].keys()
    data = changed(model=ELSEWHERE)
    spec = parse_spec(data)
    assert ELSEWHERE.items() <= spec.model_dump()["model"].items()
    assert parse_spec(decode(encode(spec.model_dump()), 100_000)) == spec


def test_the_costs_of_heads_that_are_wider_than_the_stream_follow_from_their_shapes() -> None:
    spec, length = parse_spec(changed(model=ELSEWHERE, codec={"kind": "dense", "k": 0})), 64
    pipeline = Pipeline(spec, steps=1)
    with FlopCounterMode(display=False) as counter:
        pipeline.train_step(0, [torch.zeros(1, length + 1, dtype=torch.int64)])
    by_operation = counter.get_flop_counts()["Global"]
    counted = sum(n for operation, n in by_operation.items() if str(operation) in ("aten.mm", "aten.addmm"))
    attention = 6 * spec.model.layers * 2 * (2 * 24) * 16  # looks back at its window
    assert counted == (sum(spec.flops_per_token(stage) for stage in range(2)) - attention) * length
    for stage, trainer in enumerate(pipeline.trainers):
        shapes = parameter_shapes(spec, stage).values()
        assert sum(math.prod(shape) for shape in shapes) == sum(p.numel() for p in trainer.stage.parameters())


def test_only_existing_stages_have_costs() -> None:
    for stage in (-1, 2):
        with pytest.raises(Invalid, match="does not exist"):
            tiny_spec(2).flops_per_token(stage)


def test_the_default_code_takes_a_twentieth_of_dense_with_its_envelope() -> None:
    spec = default_spec()
    assert 20 * (spec.message_bytes_per_token() + 0.3) <= spec.dense_bytes_per_token()


def test_each_number_type_has_its_size() -> None:
    model = tiny_spec().model

    def size(codec: CodecConfig) -> int:
        return ModelSpec(model=model, codec=codec, stages=2).message_bytes_per_token()

    assert size(CodecConfig(k=8)) == 10
    assert size(CodecConfig(k=8, wire="int5")) == 7
    assert size(CodecConfig(k=8, wire="float32")) == 32
    assert size(CodecConfig(kind="dense", wire="bfloat16")) == 64
    assert size(CodecConfig(kind="dense", wire="int8")) == 34
    assert size(CodecConfig(kind="control", wire="bfloat16")) == 64


def test_reading_a_spec_loads_no_torch() -> None:
    code = "import sys, tessera.models.config, tessera.models.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
