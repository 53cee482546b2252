"""The narrator's craft: what is said in each scene, as WAV in a zip, by a speech synthesiser that works offline."""

from __future__ import annotations

import io
import wave

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.devnet.studio.analysis import SCENES, read_analysis
from tessera.devnet.studio.archives import read_archive, write_archive
from tessera.devnet.studio.tools import run_program

__all__ = ["loudness", "read_voice", "speak"]

VOICE, WORDS_PER_MINUTE, PITCH, GAP = "en-us", 162, 42, 1  # GAP: hundredths of a second between words
PAUSE_MS = 280  # between sentences
SPOKEN_S = (0.5, 60.0)  # of one scene


def speak(analysis: bytes | str) -> bytes:
    """A zip: NAME.wav of each scene, and manifest.json with its sentences and where each begins, in milliseconds."""
    say = read_analysis(analysis)["say"]
    entries, sentences = {}, {}
    for name in SCENES:
        entries[f"{name}.wav"], sentences[name] = _scene(say[name])
    return write_archive(entries | {"manifest.json": encoding.encode({"sentences": sentences})})


def _scene(text: str) -> tuple[bytes, list[list[object]]]:
    """Sentence by sentence, so that captions know when each begins."""
    pieces, begins, rate = [], [], 0
    frames = 0
    for sentence in _sentences(text):
        rate, samples = _say(sentence)
        begins.append([frames * 1_000 // rate, sentence])
        pause = b"\0\0" * (rate * PAUSE_MS // 1_000)
        pieces += [samples, pause]
        frames += (len(samples) + len(pause)) // 2
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(b"".join(pieces))
    return buffer.getvalue(), begins


def _sentences(text: str) -> list[str]:
    parts = text.replace("? ", "?\n").replace(". ", ".\n").split("\n")
    return [part.strip() for part in parts if part.strip()]


def _say(sentence: str) -> tuple[int, bytes]:
    """Rate and samples, without the silence around them."""
    words = ["espeak-ng", "-v", VOICE, "-s", str(WORDS_PER_MINUTE), "-p", str(PITCH), "-g", str(GAP), "--stdin",
             "--stdout"]  # fmt: skip
    data = run_program(words, sentence.encode(), timeout_s=30)
    start = data.find(b"data")
    if data[:4] != b"RIFF" or start < 0:
        raise Invalid("the synthesiser gives no WAV")
    rate = int.from_bytes(data[24:28], "little")  # its header's length is a placeholder: read past it
    samples = data[start + 8 :]
    return rate, _trimmed(samples[: len(samples) // 2 * 2])


def _trimmed(samples: bytes, quiet: int = 160) -> bytes:
    values = memoryview(samples).cast("h")
    loud = [index for index in range(0, len(values), 32) if abs(values[index]) > quiet]
    return samples if not loud else samples[max(0, loud[0] - 400) * 2 : (loud[-1] + 1_200) * 2]


def read_voice(data: bytes) -> tuple[dict[str, bytes], dict[str, list[tuple[int, str]]], dict[str, float]]:
    """WAVs, sentences and seconds by scene. Raises: Invalid for anything that a recap cannot use."""
    entries = read_archive(data)
    try:
        manifest = encoding.decode(entries["manifest.json"], 65_536)
        sentences = {name: [(int(at), str(text)) for at, text in manifest["sentences"][name]] for name in SCENES}
        wavs = {name: entries[f"{name}.wav"] for name in SCENES}
        seconds = {name: _seconds(wav) for name, wav in wavs.items()}
    except (KeyError, TypeError, ValueError, wave.Error, EOFError) as error:
        raise Invalid(f"this is no narration: {error!r:.100}") from error
    for name, length in seconds.items():
        if not SPOKEN_S[0] <= length <= SPOKEN_S[1]:
            raise Invalid(f"{name} is spoken in {length:.1f} s, expected {SPOKEN_S[0]} to {SPOKEN_S[1]}")
    return wavs, sentences, seconds


def loudness(wav: bytes) -> float:
    """The mean of the samples' size, as a part of the largest possible."""
    with wave.open(io.BytesIO(wav)) as file:
        values = memoryview(file.readframes(file.getnframes())).cast("h")
    return sum(abs(value) for value in values[::16]) / max(1, len(values[::16])) / 32_768


def _seconds(wav: bytes) -> float:
    with wave.open(io.BytesIO(wav)) as file:
        if file.getnchannels() != 1 or file.getsampwidth() != 2 or not 8_000 <= file.getframerate() <= 48_000:
            raise Invalid("a narration is mono, 16 bits, 8 to 48 kHz")
        return file.getnframes() / file.getframerate()
