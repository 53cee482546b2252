"""What the boundary codec costs in steps and saves in bytes, against dense and against its matched control.

    python benchmarks/bench_codec.py [--quick] [--json]
    python benchmarks/bench_codec.py --width 1024 --device cuda --steps 4000,16000 --modes control,codec --seeds 0

Every mode trains on the same windows of the same text, all stages in one process, with the bytes of a real boundary
between them. Each finished run is a line of `results/codec_runs.jsonl`; only runs that are missing there are trained,
and all figures are computed from it. The envelope's bytes are metered on the links of a real session.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from codec_figures import Study, figures, report
from codec_runs import Run, Size, append, load, prepare, train

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "codec_runs.jsonl"
QUICK = Size(width=32, heads=2, ffn=32, vocab=512, length=64)


def main() -> None:
    arguments = parse()
    size = QUICK if arguments.quick else sized(arguments)
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs.jsonl" if arguments.quick else arguments.runs
        if not arguments.figures:
            complete(list(planned(arguments, size)), runs, arguments)
        study = Study(load(runs), size)
    result = {**figures(study, metered_overhead()), **surroundings(arguments.device)}
    text = report(study)
    if not arguments.quick and size == Size() and runs == RUNS:
        write_results(result, text)
    print(text)
    if arguments.json:
        print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short runs: under 50 s on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--figures", action="store_true", help="train nothing: read the finished runs alone")
    parser.add_argument("--device", default="cpu", help="a torch device")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a processor")
    parser.add_argument("--modes", type=listed(str), default=["control", "codec", "dense", "reparam"])
    parser.add_argument("--steps", type=listed(int), default=[500, 1000, 2000, 4000])
    parser.add_argument("--seeds", type=listed(int), default=[0, 1])
    parser.add_argument("--change", type=listed(str), default=[], metavar="NAME=VALUE,…", help="a rate, tried out")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the file of finished runs")
    for name, value in vars(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser.parse_args()


def sized(arguments: argparse.Namespace) -> Size:
    return Size(**{name: getattr(arguments, name) for name in vars(Size())})


def planned(arguments: argparse.Namespace, size: Size) -> Iterator[Run]:
    changed = tuple((name, float(value)) for name, value in (item.split("=") for item in arguments.change))
    steps, seeds = ([5, 20], [0]) if arguments.quick else (arguments.steps, arguments.seeds)
    for seed in seeds:
        for length in steps:
            for mode in arguments.modes:
                yield Run(mode, size, length, seed, changed)


def complete(plan: list[Run], path: Path, arguments: argparse.Namespace) -> None:
    """Trains what is not in `path` yet."""
    import torch

    from tessera.models.device import keep_freed_memory

    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    data = None
    for number, run in enumerate(plan, 1):
        settings = run.settings()
        if any(all(record.get(name) == value for name, value in settings.items()) for record in load(path)):
            continue
        data = data or prepare(run.size.vocab, part=16 if arguments.quick else 1)
        record = train(run, data, arguments.device)
        append(path, record)
        print(f"{number}/{len(plan)} {run.mode} {run.steps} steps, seed {run.seed}: {record['loss']:.4f}", flush=True)


def metered_overhead() -> float:
    """Bytes that links carry for each token and direction beside the codes: headers, receipts, framing.

    Metered on the streams of four processes that train the default model; the same for every width.
    """
    from bench_pipeline import manifest, run_split

    _, profile = run_split(1, 3)  # the bytes of a step are the same in every step
    carried = sum(stage["wire_bytes"] for stage in profile) / sum(stage["wire_tokens"] for stage in profile)
    return carried - float(manifest(1).model.message_bytes_per_token())


def surroundings(device: str) -> dict[str, Any]:
    import torch

    return {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores"
        if device == "cpu"
        else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "command": "python benchmarks/bench_codec.py",
    }


def write_results(result: dict[str, Any], text: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "codec.json").write_text(json.dumps(result, indent=1) + "\n")
    figures_table = "\n".join(f"| {name} | {value} |" for name, value in result.items())
    name = RESULTS / f"codec_{os.cpu_count()}core_{datetime.now(UTC):%Y%m}_tables.md"
    name.write_text(
        f"# Boundary codec: tables of all runs\n\n| figure | value |\n|---|---|\n{figures_table}\n\n{text}\n"
    )


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return read


if __name__ == "__main__":
    main()
