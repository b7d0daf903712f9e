"""What merging inside Whisper's encoder costs in words and times, and saves: Whisper base on recordings with truth.

    python studies/speech/prepare.py                       # 120 synthesised sentences
    python benchmarks/speech.py --librivox FOLDER          # everything; what was measured before is not measured again
    python benchmarks/speech.py --parts speed              # `words`, `times` or `speed` alone
    python benchmarks/speech.py --parts words --settings unmerged "default 0.25"

Writes benchmarks/results/speech.{json,md}. FOLDER is `usr/share/pocketsphinx/test/data/librivox` of Debian's
pocketsphinx-testdata, where it lies when that is installed.

`words`: the word error rate after Whisper's own normalisation of English (numbers, contractions, punctuation), greedy,
10 recordings a batch; its interval, and that of the difference to the unmerged model, are 95 % by bootstrap over
recordings. `times`: how far time stamps move where the words stay. `speed`: process CPU time of one recording on one
thread, rounds interleaved.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import RESULTS, described, load, machine, save
from judges import PUBLISHED

import turbovlm
from turbovlm_lab.zoo.whisper import SAMPLING_RATE, Whisper, load_whisper

sys.path.insert(0, str(Path(__file__).parents[1] / "studies" / "speech"))
INSTALLED = Path("/usr/share/pocketsphinx/test/data/librivox")
FILE = RESULTS / "speech.json"
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "ToMe": {"degree": "redundancy", **PUBLISHED},
    "random": {"degree": "random"},
    "every position restored": {"dense": True},
}
SHARES = {0.25: ("default", "ToMe", "random"), 0.1: tuple(KINDS)}
"""Shares of the tokens that are left, and what is measured with each."""
SETTINGS: dict[str, dict[str, Any] | None] = {"unmerged": None} | {
    f"{kind} {share}": {"keep": share, **KINDS[kind]} for share, kinds in SHARES.items() for kind in kinds
}
TIMED: dict[str, dict[str, Any] | None] = {
    "unmerged": None,
    "default 0.5": {"keep": 0.5},
    "default 0.25": {"keep": 0.25},
    "default 0.1": {"keep": 0.1},
    "every position restored 0.1": {"keep": 0.1, "dense": True},
}
LENGTHS = (10, 2, 28)
"""Seconds of speech in the window of 30."""
BATCH, DRAWS, WINDOWS = 10, 2000, 5
LONGEST = {"max_new_tokens": 160}
TOGETHER = 4
"""Synthesised sentences in one window of 30 seconds, a short pause behind each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--librivox", type=Path, default=INSTALLED, metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", choices=("words", "times", "speed"), default=["words", "times", "speed"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin with nothing new after so many")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing (default: %(default)s)")
    args = parser.parse_args()
    from prepare import librivox, synthesised

    if not args.librivox.is_dir():
        parser.error(f"{args.librivox} is no folder: apt-get install pocketsphinx-testdata, or --librivox FOLDER")
    args.until = time.monotonic() + 60 * args.minutes
    sets = {"LibriVox": librivox(args.librivox), "synthesised": together(synthesised())}
    results: dict[str, Any] = {"said": {}, "times": {}, "speed": {}} | load(FILE)
    results["machine"] = machine()
    results["seed"] = 0
    results["recordings"] = {
        name: [{"name": r.name, "text": r.text, "seconds": round(r.seconds, 2)} for r in found]
        for name, found in sets.items()
    }
    whisper = load_whisper()
    jobs = {"words": write_down, "times": write_times, "speed": write_speed}
    for part in args.parts:
        jobs[part](results, whisper, sets, args)
    (RESULTS / "speech.md").write_text(report(results))
    print(report(results))


def together(recordings: list[Any]) -> list[Any]:
    """Several sentences, by different voices, as one recording."""
    pause = torch.zeros(SAMPLING_RATE // 4)
    found = []
    for first in range(0, len(recordings), TOGETHER):
        some = recordings[first : first + TOGETHER]
        wave = torch.cat([part for r in some for part in (r.wave, pause)])
        assert len(wave) <= 30 * SAMPLING_RATE
        found.append(replace(some[0], text=" ".join(r.text for r in some), wave=wave))
    return found


def merging(whisper: Whisper, name: str) -> contextlib.AbstractContextManager[Any]:
    """The model as a setting has it, while that lasts."""
    settings = {**TIMED, **SETTINGS}[name]
    return contextlib.nullcontext() if settings is None else turbovlm.apply(whisper.model, **settings)


# ------------------------------------------------------------------------------------------------------------- words


def write_down(results: dict[str, Any], whisper: Whisper, sets: dict[str, Any], args: argparse.Namespace) -> None:
    """Keep what is heard, batch by batch with every setting, so that all have heard the same when time is up."""
    for group, recordings in sets.items():
        said = results["said"].setdefault(group, {})
        for first in range(0, len(recordings), BATCH):
            waves = [r.wave for r in recordings[first : first + BATCH]]
            for name in args.settings:
                heard = said.setdefault(name, [])
                if len(heard) > first or time.monotonic() > args.until:
                    continue
                started = time.process_time()
                with merging(whisper, name):
                    heard += whisper.transcribe(waves, **LONGEST)
                save(FILE, results)
                spent = time.process_time() - started
                print(f"{group} from {first} on, {name}: {spent:.0f} s of CPU time", file=sys.stderr, flush=True)


def errors(heard: str, text: str) -> tuple[int, int]:
    """Words replaced, left out and put in, and words in `text`, after normalisation."""
    ours, truth = words(heard), words(text)
    row = list(range(len(truth) + 1))
    for i, word in enumerate(ours, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(truth, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1], len(truth)


def words(text: str) -> list[str]:
    """A text's words as Whisper's authors compare them."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return str(EnglishTextNormalizer({})(text)).split()


def heard_by_all(said: dict[str, list[str]]) -> int:
    """How many recordings every setting has heard that has heard any."""
    return min((len(heard) for heard in said.values() if heard), default=0)


def rates(results: dict[str, Any], group: str, name: str) -> dict[str, Any]:
    """Word error rate, its interval, and the interval of its difference to the unmerged model's, in per cent."""
    said = results["said"][group]
    texts = [r["text"] for r in results["recordings"][group]][: heard_by_all(said)]
    counted = np.array([errors(heard, text) for heard, text in zip(said[name], texts)])
    plain = np.array([errors(heard, text) for heard, text in zip(said["unmerged"], texts)])
    drawn = np.random.default_rng(0).integers(len(texts), size=(DRAWS, len(texts)))

    def rate(of: Any) -> Any:
        return 100 * of[..., 0].sum(-1) / of[..., 1].sum(-1)

    differences = rate(counted[drawn]) - rate(plain[drawn])
    same = statistics.mean(words(a) == words(b) for a, b, _ in zip(said[name], said["unmerged"], texts))
    return {
        "wer": float(rate(counted)),
        "interval": np.quantile(rate(counted[drawn]), (0.025, 0.975)).tolist(),
        "difference": float(rate(counted) - rate(plain)),
        "difference_interval": np.quantile(differences, (0.025, 0.975)).tolist(),
        "same": float(same),
    }


# ------------------------------------------------------------------------------------------------------------- times


def write_times(results: dict[str, Any], whisper: Whisper, sets: dict[str, Any], args: argparse.Namespace) -> None:
    """Keep the times of segments and words, of recordings of several sentences."""
    recordings = [r.wave for r in sets["synthesised"][:WINDOWS]]
    for name in TIMED:
        if name in results["times"] or time.monotonic() > args.until:
            continue
        with merging(whisper, name):
            results["times"][name] = [stamps(whisper, wave) for wave in recordings]
        save(FILE, results)
    whisper.model.set_attn_implementation("sdpa")  # what the times of words had changed


def stamps(whisper: Whisper, wave: torch.Tensor) -> dict[str, Any]:
    """When segments begin and end, and when each token is said."""
    options = {"language": "en", "task": "transcribe", "return_timestamps": True, "return_token_timestamps": True}
    frames = torch.tensor([len(wave) // 160])
    mask = (torch.arange(3000) < frames).long().unsqueeze(0)
    with torch.inference_mode():
        out = whisper.model.generate(
            whisper.features([wave]), attention_mask=mask, return_segments=True, **options, **LONGEST
        )
    (found,) = out["segments"]
    return {
        "segments": [(float(s["start"]), float(s["end"])) for s in found],
        "tokens": [int(t) for s in found for t in s["tokens"]],
        "times": [round(float(t), 2) for s in found for t in s["token_timestamps"]],
    }


def moved(results: dict[str, Any], name: str) -> dict[str, float]:
    """How far times are from the unmerged model's, in seconds, of the tokens that both say, in the same order."""
    spoken, segments, tokens = [], [], 0
    for ours, own in zip(results["times"][name], results["times"]["unmerged"]):
        mine, theirs = (
            [(t, w) for t, w in zip(each["tokens"], each["times"]) if t < FIRST_TIME] for each in (ours, own)
        )
        tokens += len(theirs)
        both = difflib.SequenceMatcher(None, [t for t, _ in mine], [t for t, _ in theirs], autojunk=False)
        for run in both.get_matching_blocks():
            some = zip(mine[run.a : run.a + run.size], theirs[run.b : run.b + run.size])
            spoken += [abs(a - b) for (_, a), (_, b) in some]
        if len(ours["segments"]) == len(own["segments"]):
            segments += [abs(a - b) for x, y in zip(ours["segments"], own["segments"]) for a, b in zip(x, y)]
    return {
        "same": len(spoken) / tokens,
        "token_median": float(np.median(spoken)),
        "token_p90": float(np.quantile(spoken, 0.9)),
        "segment_mean": statistics.mean(segments) if segments else float("nan"),
        "segment_most": max(segments, default=float("nan")),
    }


FIRST_TIME = 50257
"""From here on tokens are no words: the end, languages, tasks, times."""

# ------------------------------------------------------------------------------------------------------------- speed


def write_speed(results: dict[str, Any], whisper: Whisper, sets: dict[str, Any], args: argparse.Namespace) -> None:
    """Time the encoder, and a whole transcription, with every setting in turn."""
    torch.set_num_threads(1)
    speech = torch.cat([r.wave for r in sets["synthesised"]])
    for seconds in LENGTHS:
        features = whisper.features([speech[: seconds * SAMPLING_RATE]])
        none: dict[str, Any] = {"tokens": {}, "runs": {name: {"encoder": [], "whole": []} for name in TIMED}}
        found = results["speed"].setdefault(str(seconds), none)
        if len(found["runs"]["unmerged"]["whole"]) >= args.rounds or time.monotonic() > args.until:
            continue
        with torch.inference_mode():
            whisper.model.model.encoder(features)  # warms up
        while len(found["runs"]["unmerged"]["whole"]) < args.rounds and time.monotonic() <= args.until:
            turn = {name: time_once(whisper, name, features) for name in TIMED}
            for name, (encoder, whole, tokens) in turn.items():
                found["runs"][name]["encoder"].append(encoder)
                found["runs"][name]["whole"].append(whole)
                found["tokens"][name] = tokens
            save(FILE, results)


def time_once(whisper: Whisper, name: str, features: torch.Tensor) -> tuple[float, float, int]:
    """Seconds of the encoder and of a transcription, and how many tokens that said."""
    options = {"language": "en", "task": "transcribe", "max_new_tokens": 120}
    with merging(whisper, name), torch.inference_mode():
        started = time.process_time()
        whisper.model.model.encoder(features)
        between = time.process_time()
        said = whisper.model.generate(features, **options)
        return between - started, time.process_time() - between, said.shape[1]


# ------------------------------------------------------------------------------------------------------------- report


def report(results: dict[str, Any]) -> str:
    lines = ["# Merging inside Whisper base", "", described(results["machine"]), ""]
    if results["said"]:
        lines += report_words(results)
    if "unmerged" in results["times"]:
        lines += report_times(results)
    if results["speed"]:
        lines += report_speed(results)
    return "\n".join(lines) + "\n"


def report_words(results: dict[str, Any]) -> list[str]:
    lines = ["## Word error rate", ""]
    lines += [
        "`keep`: share of the encoder's 1,500 tokens left behind its last block; settings of one `keep` cost alike."
    ]
    lines += ["In brackets 95 % by bootstrap over recordings; *same*: recordings whose words are the unmerged model's."]
    for group, said in results["said"].items():
        found = results["recordings"][group][: heard_by_all(said)]
        if not found:
            continue
        spoken = sum(r["seconds"] for r in found)
        lines += ["", f"### {group}: {len(found)} recordings, {sum(len(words(r['text'])) for r in found)} words"]
        lines += ["", f"{spoken / len(found):.1f} seconds of speech on average in windows of 30.", ""]
        lines += ["| keep | setting | WER | above unmerged | same |", "|--:|---|--:|--:|--:|"]
        for name in sorted(SETTINGS, key=lambda name: -float(name.rpartition(" ")[2]) if " " in name else -1):
            if said.get(name):
                kind, _, keep = name.rpartition(" ")
                r = rates(results, group, name)
                (low, high), (less, more) = r["interval"], r["difference_interval"]
                above = "" if not kind else f"{r['difference']:+.1f} ({less:+.1f} to {more:+.1f})"
                rate = f"{r['wer']:.1f} % ({low:.1f} to {high:.1f})"
                lines.append(f"| {keep if kind else ''} | {kind or name} | {rate} | {above} | {r['same']:.0%} |")
    return lines


def report_times(results: dict[str, Any]) -> list[str]:
    count = len(results["times"]["unmerged"])
    lines = [
        "",
        "## Time stamps",
        "",
        f"{count} recordings of {TOGETHER} sentences, against the unmerged model's: seconds between the times of a ",
    ]
    lines[-1] += "token that both say (by cross-attention), and of a segment's begin or end where there are as many "
    lines[-1] += "(by tokens of time, of 0.02 s)."
    lines += ["", "| setting | said by both | token, median | 90 % below | segment, mean | most |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    for name in results["times"]:
        if name != "unmerged":
            m = moved(results, name)
            cells = [f"{m[key]:.2f}" for key in ("token_median", "token_p90", "segment_mean", "segment_most")]
            lines.append(f"| {name} | {m['same']:.0%} | {' | '.join(cells)} |".replace("nan", "–"))
    return lines


def report_speed(results: dict[str, Any]) -> list[str]:
    lines = ["", "## Speed, one recording, process CPU time", ""]
    rounds = {len(found["runs"]["unmerged"]["whole"]) for found in results["speed"].values()} - {0}
    lines += [
        "One thread. Of the unmerged model in seconds, of the others how many times faster: medians of ratios within a "
        f"round, of {' or '.join(map(str, sorted(rounds)))}."
    ]
    for what in ("encoder", "whole"):
        title = "Encoder" if what == "encoder" else "Encoder and decoder, greedy"
        others = [name for name in TIMED if name != "unmerged"]
        lines += ["", f"### {title}", "", f"| speech | tokens said | unmerged | {' | '.join(others)} |"]
        lines += ["|--:|--:|--:|" + "--:|" * len(others)]
        for seconds, found in results["speed"].items():
            runs = found["runs"]
            own = runs["unmerged"][what]
            if not own:
                continue
            cells = [f"{statistics.median(a / b for a, b in zip(own, runs[n][what])):.2f}×" for n in others]
            first = f"{found['tokens']['unmerged']} | {statistics.median(own):.2f} s"
            lines.append(f"| {seconds} s | {first} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
