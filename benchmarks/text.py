"""What merging inside a text encoder costs and saves: MiniLM on the prose of scikit-learn's dataset descriptions.

    python benchmarks/text.py                           # writes benchmarks/results/text.{json,md}

Fidelity is the cosine between a sentence's embedding and the full model's, each sentence alone, so that no padding is
merged for nothing; speed is that of batches of 16 as they come.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch
from cases import RESULTS, compare_shown, described, machine, save

import turbovlm
from turbovlm import TurboConfig
from turbovlm_lab.zoo import SentenceEncoder, load_minilm

SHARES = (0.8, 0.6)
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain means": {"reduce": "merge"},
    "weighted difference": {"degree": "weighted_difference"},
    "weighted difference, plain means": {"degree": "weighted_difference", "reduce": "merge"},
    "similarity=heads": {"similarity": "heads"},
    "similarity=keys": {"similarity": "keys"},
    "similarity=queries": {"similarity": "queries"},
    "guidance=mean": {"guidance": "mean"},
    "redundancy (ToMe)": {
        "similarity": "keys",
        "degree": "redundancy",
        "partition": "alternate",
        "order": "partition",
        "reduce": "merge",
        "restore": "copy",
    },
    "random": {"degree": "random"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    model, texts = load_minilm(), sentences()
    results: dict[str, Any] = {"machine": machine(), "sentences": len(texts)}
    results["words"] = sum(len(text.split()) for text in texts) / len(texts)
    results["fidelity"] = fidelity(model, texts)
    batch = model.tokens(texts[:16])
    configs = [TurboConfig(flops=share) for share in SHARES]
    results["speed"] = compare_shown(model, batch, configs, "speed", args.rounds).to_dict()
    save(RESULTS / "text.json", results)
    (RESULTS / "text.md").write_text(report(results))
    print(report(results))


def sentences() -> list[str]:
    """Whole sentences of 8 to 60 words, mostly letters, in the order of the files."""
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    prose = [re.sub(r"\s+", " ", path.read_text()) for path in sorted(folder.glob("*.rst"))]
    found = [sentence for text in prose for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)]
    letters = [sum(c.isalpha() for c in sentence) / max(len(sentence), 1) for sentence in found]
    return [s for s, share in zip(found, letters) if 8 <= len(s.split()) <= 60 and share > 0.72]


@torch.inference_mode()
def fidelity(model: SentenceEncoder, texts: list[str]) -> list[dict[str, Any]]:
    """Cosines to the full model's embeddings: mean, and the lowest twentieth's upper end."""
    inputs = [model.tokens([text]) for text in texts]
    full = torch.cat([model(**one) for one in inputs])
    rows = []
    for share in SHARES:
        for name, settings in SETTINGS.items():
            with turbovlm.apply(model, flops=share, **settings):
                cosines = (torch.cat([model(**one) for one in inputs]) * full).sum(-1)
            row = {"mean": float(cosines.mean()), "p5": float(cosines.quantile(0.05))}
            rows.append({"flops": share, "setting": name, **row})
    return rows


def report(results: dict[str, Any]) -> str:
    lines = ["# Merging inside a text encoder", "", described(results["machine"]), ""]
    lines += [
        f"MiniLM (6 BERT blocks), {results['sentences']} sentences of {results['words']:.0f} words on average.",
        "",
        "## Cosine to the full model's embedding, each sentence alone",
        "",
        "| MACs left | setting | mean | 5th percentile |",
        "|--:|---|--:|--:|",
    ]
    lines += [f"| {r['flops']:.0%} | {r['setting']} | {r['mean']:.4f} | {r['p5']:.4f} |" for r in results["fidelity"]]
    batch = results["speed"]["batch"]
    lines += ["", f"## Speed, {batch} sentences at a time, padded", "", "| | speed-up | quartiles | MACs |"]
    lines += ["|---|--:|--:|--:|"]
    for run in results["speed"]["runs"]:
        low, high = run["speedup_quartiles"]
        lines.append(f"| {run['name']} | {run['speedup']:.3f}× | {low:.3f}–{high:.3f} | {run['macs_ratio']:.3f}× |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
