"""What a tower loses where whole squares of patches merge, and not patches one by one, at as many tokens left.

    python studies/photos/prepare.py                     # 256 photographs, fetched
    python benchmarks/cells.py                           # writes benchmarks/results/cells.{json,md}

Two real towers, CLIP ViT-B/16 and the saliency ViT-S/14, read in squares of 2×2 patches, as mergers of vision-language
models do: every position is restored, and the four patches of each square are read side by side. The drift is 1 −
cosine to what the unmerged tower gives, the photographs' mean taken off both; its mean over squares and photographs.
Four ways: patches merged one by one, the default; squares (`partition="cells"`), which are compared by their patches'
features side by side; squares compared by the means of these; and random squares. All merge in the same blocks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from cases import RESULTS, described, load, machine, save
from torch import Tensor

from turbovlm import TurboConfig
from turbovlm.encoder import cells
from turbovlm.encoder.feature import plan_encoder
from turbovlm.encoder.towers import find_towers
from turbovlm.patching import install, patches_on, remove

sys.path.insert(0, str(Path(__file__).parents[1] / "studies" / "photos"))
BATCH, SIDE = 16, 2
KEEPS = (0.75, 0.5, 0.25)
MEANS = "squares, compared by means"
WAYS: dict[str, dict[str, Any]] = {
    "patches one by one": {},
    "squares": {"partition": "cells"},
    MEANS: {"partition": "cells"},
    "random squares": {"partition": "cells", "degree": "random"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=24, help="how many (default: %(default)s)")
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS), metavar="NAME")
    args = parser.parse_args()
    results: dict[str, Any] = {"towers": {}} | load(RESULTS / "cells.json") | {"machine": machine()}
    for name in args.towers:
        model, pixels = TOWERS[name](args.photos)
        whole = squares(model, pixels)
        found = results["towers"][name] = {"photos": args.photos, "squares": whole.shape[1], "drift": {}}
        for way, settings in WAYS.items():
            for keep in KEEPS:
                with merged(model, TurboConfig(keep=keep, **settings), way == MEANS):
                    drift = drift_of(whole, squares(model, pixels))
                found["drift"].setdefault(way, {})[f"{keep:g}"] = drift
                print(name, way, keep, drift, flush=True)
        save(RESULTS / "cells.json", results)
    (RESULTS / "cells.md").write_text(report(results))
    print(report(results))


def clip(photos: int) -> tuple[nn.Module, Tensor]:
    from turbovlm_lab.zoo import clip as zoo

    return zoo.load_clip(), zoo.preprocess(photographs(photos))


def saliency(photos: int) -> tuple[nn.Module, Tensor]:
    from turbovlm_lab.zoo import load_saliency_vit, preprocess

    return load_saliency_vit().backbone, preprocess(photographs(photos))


TOWERS = {"CLIP ViT-B/16": clip, "saliency ViT-S/14": saliency}


def photographs(count: int) -> list[Any]:
    from prepare import load_photos

    return load_photos()[:count]


@torch.inference_mode()
def squares(model: Any, pixels: Tensor) -> Tensor:
    """The last patches of each square side by side, `[images, squares, 4 · width]`."""
    patches = torch.cat([model(pixel_values=batch).last_hidden_state[:, 1:] for batch in pixels.split(BATCH)])
    side = int(patches.shape[1] ** 0.5) // SIDE
    grid = patches.view(len(patches), side, SIDE, side, SIDE, -1).transpose(2, 3)
    return grid.reshape(len(patches), side * side, -1)


def drift_of(whole: Tensor, found: Tensor) -> float:
    centre = whole.mean(dim=0)
    return float((1 - F.cosine_similarity(whole - centre, found - centre, dim=-1)).mean())


@contextmanager
def merged(model: nn.Module, config: TurboConfig, by_means: bool) -> Iterator[None]:
    """The model's tower merges, and restores every position."""
    (tower,) = find_towers(model)
    feature = plan_encoder(replace(tower, restore=True, cell=SIDE), config)
    own = cells.compared
    if by_means:
        cells.compared = lambda features: features.mean(dim=2)
    install(feature.patches(model))
    try:
        yield
    finally:
        remove(patches_on(model))
        cells.compared = own


def report(results: dict[str, Any]) -> str:
    lines = ["# Whole squares of patches, or patches one by one", "", described(results["machine"]), ""]
    lines += ["Drift of what a merger of 2×2 patches would read.", ""]
    for name, found in results["towers"].items():
        lines += [f"## {name}, {found['squares']} squares, {found['photos']} photographs", ""]
        lines += [f"| merged | {' | '.join(f'keep={keep:g}' for keep in KEEPS)} |", "|---|" + "--:|" * len(KEEPS)]
        for way, drifts in found["drift"].items():
            lines.append(f"| {way} | {' | '.join(f'{drift:.3f}' for drift in drifts.values())} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
