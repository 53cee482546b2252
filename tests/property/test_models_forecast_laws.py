"""No schedule beats its slowest stage, its cores or its links, and every one ends."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.models.forecast import StagePace, Workload, forecast

paces = st.builds(
    StagePace,
    forward_s=st.floats(1e-6, 1e-2),
    backward_s=st.floats(1e-6, 1e-2),
    step_s=st.floats(0, 1),
    evaluate_s=st.floats(0, 1e-2),
    machine=st.sampled_from(["", "a", "b"]),
    cores=st.just(2),
    threads=st.integers(1, 2),
    up_bytes_s=st.floats(1e3, 1e9),
    down_bytes_s=st.floats(1e3, 1e9),
)
works = st.builds(
    Workload,
    microbatches=st.integers(1, 12),
    tokens=st.integers(1, 4096),
    bytes_per_token=st.floats(0, 1e3),
    evaluate_every=st.integers(0, 10),
    evaluate_batches=st.integers(0, 5),
)


@settings(max_examples=60)
@given(st.lists(paces, min_size=1, max_size=6), works, st.floats(0, 0.5))
def test_no_forecast_beats_what_bounds_it(stages: list[StagePace], work: Workload, rtt_s: float) -> None:
    found = forecast(stages, work, rtt_s=rtt_s)
    seconds = 1 / found.tokens_per_s
    assert seconds > 0
    for index, stage in enumerate(stages):
        own = stage.forward_s + stage.backward_s
        sent = work.bytes_per_token * ((index > 0) + (index < len(stages) - 1))
        assert seconds >= 0.999 * own
        assert seconds >= 0.999 * sent / stage.up_bytes_s
        assert seconds >= 0.999 * sent / stage.down_bytes_s
    for name in ("a", "b"):
        work_s = sum((s.forward_s + s.backward_s) * s.threads for s in stages if s.machine == name)
        assert seconds >= 0.999 * work_s / 2
    assert all(0 <= part <= 1 for part in found.busy)
