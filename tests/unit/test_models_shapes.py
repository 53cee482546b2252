"""The shapes in the annotations hold while a model trains and decodes; in use they are not checked."""

import subprocess
import sys

import pytest

CODE = """
import sys
from jaxtyping import install_import_hook
names = ["functional", "decoder", "codec", "stage", "wire"]
with install_import_hook(["tessera.models." + n for n in names], "beartype.beartype"):
    import numpy as np
    from tessera.models.pipeline import Pipeline
    from tessera.models.presets import tiny_spec
ids = np.arange(51).reshape(3, 17)
for kind in ("codec", "reparam", "ssn", "control", "dense"):
    pipeline = Pipeline(tiny_spec(3, codec=kind), steps=2)
    for step in range(2):
        pipeline.train_step(step, [ids, ids[:1, :6]])
    pipeline.evaluate(ids)
    assert len(pipeline.generate([1, 2, 3, 4], 3)) == 3
try:
    pipeline.trainers[0].stage(np.arange(3), None)
except Exception as error:
    sys.exit("Type-check error" not in str(error))
sys.exit("a wrong type passed: the checks are not on")
"""


@pytest.mark.slow
def test_shapes_are_as_annotated() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], check=False, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
