"""The referee's judges: each looks at one kind of work and says what is wrong with it, "" for nothing.

They look at what can be measured (numbers that follow from the prices, pictures that differ, sound that is heard, a
film of the right form and length) and at no word that the maker says about it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import anyio.to_thread

from tessera.agents.commerce.evaluator import Judge
from tessera.agents.commerce.terms import Brief
from tessera.core.errors import Late, TesseraError
from tessera.devnet.studio.analysis import SCENES, analyse, check
from tessera.devnet.studio.archives import read_archive
from tessera.devnet.studio.charts import HEIGHT, WIDTH
from tessera.devnet.studio.tools import run_program
from tessera.devnet.studio.voice import loudness, read_voice

__all__ = ["JUDGES"]

QUIETEST = 0.005  # of the largest possible sample
FILM_S = (15.0, 240.0)
PNG = b"\x89PNG\r\n\x1a\n"
FRAME = (64, 36)  # a sampled frame of the film, small


def _analysis(brief: Brief, work: bytes) -> str:
    return "" if work == analyse(brief.inputs.get("series")) else "the facts do not follow from the prices"


def _charts(brief: Brief, work: bytes) -> str:
    entries = read_archive(work)
    for name in SCENES:
        pair = [entries.get(f"{name}-{number}.png", b"") for number in (0, 1)]
        if any(not png.startswith(PNG) or _size(png) != (WIDTH, HEIGHT) for png in pair):
            return f"{name} has no two pictures of {WIDTH} x {HEIGHT}"
        if pair[0] == pair[1]:
            return f"nothing comes in in {name}"
    return "" if "manifest.json" in entries else "there is no manifest"


def _size(png: bytes) -> tuple[int, int]:
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def _check(brief: Brief, work: bytes) -> str:
    return "" if work == check(brief.inputs.get("series"), brief.inputs.get("sentences")) else "the verdict is wrong"


def _voice(brief: Brief, work: bytes) -> str:
    wavs, sentences, _ = read_voice(work)
    silent = [name for name in SCENES if loudness(wavs[name]) < QUIETEST]
    if silent:
        return f"{', '.join(silent)} cannot be heard"
    return "" if all(sentences[name] for name in SCENES) else "a scene has no words"


def _recap(brief: Brief, work: bytes) -> str:
    with tempfile.TemporaryDirectory(prefix="tessera-judge-") as folder:
        film = Path(folder) / "film.mp4"
        film.write_bytes(work)
        facts = json.loads(run_program(
            ["ffprobe", "-v", "error", "-show_entries", "format=duration:stream=codec_name,width,height", "-of", "json",
             str(film)], timeout_s=30))  # fmt: skip
        codecs = {stream.get("codec_name"): stream for stream in facts.get("streams", [])}
        seconds = float(facts.get("format", {}).get("duration", 0))
        if not {"h264", "aac"} <= set(codecs):
            return f"the film has {sorted(map(str, codecs))}, expected h264 and aac"
        if (codecs["h264"].get("width"), codecs["h264"].get("height")) != (WIDTH, HEIGHT):
            return f"the film is not {WIDTH} x {HEIGHT}"
        if not FILM_S[0] <= seconds <= FILM_S[1]:
            return f"the film takes {seconds:.1f} s, expected {FILM_S[0]:g} to {FILM_S[1]:g}"
        return _look_and_listen(film, seconds)


def _look_and_listen(film: Path, seconds: float) -> str:
    """A frame every five seconds, and the sound."""
    width, height = FRAME
    words = ["ffmpeg", "-v", "error", "-nostdin", "-i", str(film)]
    view = ["-vf", f"fps=1/5,scale={width}:{height},format=gray", "-f", "rawvideo", "-"]
    data = run_program([*words, *view], timeout_s=60)
    frames = [data[at : at + width * height] for at in range(0, len(data), width * height)]
    if len(set(frames)) < max(3, len(frames) // 3):
        return "the picture hardly changes"
    if sum(max(frame) - min(frame) < 24 for frame in frames) > len(frames) // 4:
        return "much of the film is empty"
    sound = run_program([*words, "-ac", "1", "-ar", "8000", "-f", "s16le", "-"], timeout_s=60)
    values = memoryview(sound[: len(sound) // 2 * 2]).cast("h")
    mean = sum(abs(value) for value in values[::8]) / max(1, len(values[::8])) / 32_768
    return "" if mean >= QUIETEST and len(values) > 8_000 * (seconds - 2) else "the film cannot be heard"


def _judge(look: Callable[[Brief, bytes], str]) -> Judge:
    async def judge(brief: Brief, work: bytes) -> str:
        def careful() -> str:
            try:
                return look(brief, work)
            except Late:
                raise
            except TesseraError as error:
                return error.message[:200]
            except (ValueError, KeyError) as error:
                return f"it cannot be read: {error!r:.100}"

        return await anyio.to_thread.run_sync(careful)

    return judge


_LOOKS = {"analysis": _analysis, "check": _check, "charts": _charts, "voice": _voice, "recap": _recap}
JUDGES: dict[str, Judge] = {kind: _judge(look) for kind, look in _LOOKS.items()}
