"""Recordings whose words are known: sentences spoken by the voices of two speech synthesisers.

    apt-get install flite espeak-ng
    python studies/speech/prepare.py        # writes studies/speech/data/: 120 recordings, and what is said in them

The sentences are put together from the lists below, always the same; flite (its voices slt, rms and awb, made from
recordings of people) and espeak-ng take turns. Recordings are mono, 16 kHz, 16 bits.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import wave
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

DATA = Path(__file__).parent / "data"
RATE = 16_000
COUNT = 120

WHO = (
    *("the old fisherman", "my younger sister", "a tall stranger", "the postman", "the new teacher"),
    *("every child in the village", "the woman with the green umbrella", "a tired soldier", "her grandfather"),
    *("the captain of the ship", "somebody from the museum"),
)
DOES = (
    *("carried a basket of apples", "was looking for a lost key", "wrote a long letter", "listened to the radio"),
    *("bought a loaf of bread and some cheese", "heard a strange noise", "told the same story again"),
    *("painted the wooden fence", "waited patiently for the train", "found a silver coin", "climbed the narrow stairs"),
    *("forgot to close the window", "drew a map of the island"),
)
WHERE = (
    *("near the old stone bridge", "in the garden behind the house", "on the other side of the river"),
    *("at the end of the street", "by the light of a single candle", "under the apple tree", "in the middle of town"),
)
WHEN = (
    *("before the rain began", "late on a cold evening", "and nobody noticed", "although it was already dark"),
    *("while the others were asleep", "as if nothing had happened", "just after breakfast", "without saying a word"),
    "because the road was closed",
)


@dataclass(frozen=True)
class Recording:
    """What is said, in words, and how it sounds: `[samples]`, float32 in [−1, 1], mono, 16 kHz."""

    name: str
    text: str
    wave: Tensor

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.wave) / RATE


def sentences(count: int = COUNT) -> list[str]:
    """Different ones; steps without a common divisor go through every list evenly."""
    lists = (WHO, DOES, WHERE, WHEN)
    assert all(gcd(len(a), len(b)) == 1 for i, a in enumerate(lists) for b in lists[:i])
    return [" ".join(parts[number % len(parts)] for parts in lists) for number in range(count)]


def flite(voice: str) -> Callable[[str, Path], list[str]]:
    return lambda text, path: ["flite", "-voice", voice, "-t", text, "-o", str(path)]


VOICES: dict[str, Callable[[str, Path], list[str]]] = {
    "flite-slt": flite("slt"),
    "flite-rms": flite("rms"),
    "espeak-ng": lambda text, path: ["espeak-ng", "-v", "en-us", "-s", "150", "-w", str(path), text],
    "flite-awb": flite("awb"),
}
"""The command by which each says a text into a file."""


def main() -> None:
    for command in ("flite", "espeak-ng"):
        if shutil.which(command) is None:
            raise SystemExit(f"{command} is not installed: apt-get install flite espeak-ng")
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    lines = []
    for number, text in enumerate(sentences()):
        voice = list(VOICES)[number % len(VOICES)]
        name = f"{number:03d}-{voice}"
        say(text, voice, DATA / f"{name}.wav")
        lines.append(f"{name}\t{text}\n")
    (DATA / "sentences.tsv").write_text("".join(lines))
    print(f"{len(lines)} recordings, {sum(r.seconds for r in synthesised()):.0f} seconds: {DATA}")


def say(text: str, voice: str, path: Path) -> None:
    """Write what a voice makes of a text, at 16 kHz."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.wav"
        subprocess.run(VOICES[voice](text, made), check=True, capture_output=True)
        samples, rate = read_wave(made)
    if rate != RATE:
        samples = torch.from_numpy(resample_poly(samples.numpy(), RATE, rate).astype(np.float32))
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((samples.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes())


def read_wave(path: Path) -> tuple[Tensor, int]:
    """Samples in [−1, 1] and how many there are a second, of a mono file of 16 bits."""
    with wave.open(str(path)) as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise ValueError(f"{path}: {file.getnchannels()} channels of {8 * file.getsampwidth()} bits, not 1 of 16")
        samples = np.frombuffer(file.readframes(-1), dtype="<i2").astype(np.float32) / 32768
        return torch.from_numpy(samples), file.getframerate()


def synthesised() -> list[Recording]:
    """What `main` has made."""
    pairs = [line.split("\t") for line in (DATA / "sentences.tsv").read_text().splitlines()]
    return [Recording(name, text, read_wave(DATA / f"{name}.wav")[0]) for name, text in pairs]


def librivox(folder: Path) -> list[Recording]:
    """The five sentences of Austen's Sense and Sensibility in Debian's pocketsphinx-testdata, read by a person."""
    found = []
    for line in (folder / "transcription").read_text().splitlines():
        text, _, name = line.removeprefix("<s> ").removesuffix(")").partition(" </s> (")
        found.append(Recording(name, text, read_wave(folder / f"{name}.wav")[0]))
    return found


if __name__ == "__main__":
    main()
