"""The editor's craft: pictures, narration and captions as one MP4 (H.264 and AAC), by ffmpeg."""

from __future__ import annotations

import io
import tempfile
import textwrap
from pathlib import Path

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.devnet.studio.analysis import SCENES
from tessera.devnet.studio.archives import read_archive
from tessera.devnet.studio.charts import INK, SCALE, WIDTH
from tessera.devnet.studio.tools import run_program
from tessera.devnet.studio.voice import read_voice

__all__ = ["FPS", "cut"]

FPS = 25
LEAD_S, TAIL_S = 0.6, 0.7  # silence around what is said
COMES_IN = {"fade": 0.9, "wiperight": 2.2, "wipeup": 1.2}  # seconds
CAPTION_Y, CAPTION_HEIGHT, CAPTION_SIZE, CAPTION_WIDTH = 600, 90, 26, 74  # CAPTION_WIDTH in characters
_FFMPEG = ["ffmpeg", "-v", "error", "-nostdin", "-y"]


def cut(charts: bytes, voice: bytes) -> bytes:
    """The film. Raises: Invalid for charts or narration that do not fit."""
    pictures = read_archive(charts)
    wavs, sentences, seconds = read_voice(voice)
    try:
        comes_in = encoding.decode(pictures["manifest.json"], 65_536)["comes_in"]
        ways = {name: str(comes_in[name]) for name in SCENES}
        files = {name: (pictures[f"{name}-0.png"], pictures[f"{name}-1.png"]) for name in SCENES}
    except (KeyError, TypeError) as error:
        raise Invalid(f"these are no charts: {error!r:.100}") from error
    if not set(ways.values()) <= set(COMES_IN):
        raise Invalid(f"a picture comes in by {', '.join(COMES_IN)}, not {sorted(set(ways.values()))}")
    with tempfile.TemporaryDirectory(prefix="tessera-cut-") as folder:
        room = Path(folder)
        pieces = []
        for name in SCENES:
            (room / f"{name}.wav").write_bytes(wavs[name])
            for number, png in enumerate(files[name]):
                (room / f"{name}-{number}.png").write_bytes(png)
            pieces.append(_scene(room, name, ways[name], seconds[name], sentences[name]))
        return _join(room, pieces)


def _scene(room: Path, name: str, way: str, spoken_s: float, sentences: list[tuple[int, str]]) -> Path:
    """One scene with its sound."""
    length, comes = LEAD_S + spoken_s + TAIL_S, COMES_IN[way]
    starts = [LEAD_S + at / 1_000 for at, _ in sentences]
    ends = [*starts[1:], length - TAIL_S / 2]
    inputs = ["-i", str(room / f"{name}-0.png"), "-i", str(room / f"{name}-1.png"), "-i", str(room / f"{name}.wav")]
    chain = [_still(0, length), _still(1, length - 0.3)]
    chain.append(f"[s0][s1]xfade=transition={way}:duration={comes}:offset=0.3[v0]")
    for index, ((_, text), start, end) in enumerate(zip(sentences, starts, ends, strict=True)):
        png = room / f"{name}-caption-{index}.png"
        png.write_bytes(_caption(text))
        inputs += ["-i", str(png)]
        when = f"overlay=0:{CAPTION_Y}:enable='between(t,{start:.3f},{end:.3f})'"
        chain.append(f"[v{index}][{3 + index}:v]{when}[v{index + 1}]")
    last = len(sentences)
    chain.append(f"[v{last}]fade=t=in:d=0.25,fade=t=out:st={length - 0.25:.3f}:d=0.25,format=yuv420p[v]")
    sound = (
        f"[2:a]aresample=44100,highpass=f=70,lowpass=f=9000,adelay={round(LEAD_S * 1_000)},apad,loudnorm=I=-17:TP=-2"
    )
    chain.append(f"{sound},aresample=44100,atrim=0:{length:.3f}[a]")
    out = room / f"{name}.mp4"
    run_program(
        [*_FFMPEG, *inputs, "-filter_complex", ";".join(chain), "-map", "[v]", "-map", "[a]", "-t", f"{length:.3f}",
         "-r", str(FPS), "-c:v", "libx264", "-preset", "superfast", "-crf", "19", "-tune", "animation",
         "-c:a", "aac", "-b:a", "112k", "-ac", "1", str(out)]
    )  # fmt: skip
    return out


def _still(number: int, seconds: float) -> str:
    """A picture that is decoded once and stands for a while."""
    frames = round(seconds * FPS)
    return f"[{number}:v]format=yuv420p,loop=loop={frames - 1}:size=1,setpts=N/({FPS}*TB),fps={FPS}[s{number}]"


def _join(room: Path, pieces: list[Path]) -> bytes:
    (room / "list.txt").write_text("".join(f"file '{piece.name}'\n" for piece in pieces), encoding="ascii")
    out = room / "film.mp4"
    run_program(
        [*_FFMPEG, "-f", "concat", "-safe", "0", "-i", str(room / "list.txt"), "-c", "copy", "-movflags", "+faststart",
         "-metadata", "title=Market recap", "-metadata", "comment=Generated data: these prices are no market's",
         str(out)]
    )  # fmt: skip
    return out.read_bytes()


def _caption(text: str) -> bytes:
    """A transparent picture with the sentence at its foot."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGBA", (WIDTH * SCALE, CAPTION_HEIGHT * SCALE), (0, 0, 0, 0))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(CAPTION_SIZE * SCALE)
    width = CAPTION_WIDTH if len(text) <= CAPTION_WIDTH else len(text) // 2 + 8  # two lines of a like length
    lines = textwrap.wrap(text[: 2 * CAPTION_WIDTH], width)[:2]
    for row, line in enumerate(lines):
        y = (CAPTION_HEIGHT / 2 + (row - (len(lines) - 1) / 2) * CAPTION_SIZE * 1.35) * SCALE
        draw.text((WIDTH * SCALE / 2, y), line, fill=INK, font=font, anchor="mm")
    buffer = io.BytesIO()
    image.resize((WIDTH, CAPTION_HEIGHT), Image.Resampling.LANCZOS).save(buffer, "PNG")
    return buffer.getvalue()
