"""Re-ranking by BLIP's image-text matching, with fewer image tokens in the later layers of its text encoder.

    python benchmarks/grounding.py                      # writes benchmarks/results/grounding.{json,md}

BLIP-base's shape at 384 px, random weights: a sentence of 35 tokens with each of 16 images that are encoded already,
577 tokens each. The baseline is the library's text encoder as it is, whose attention is not fused.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn as nn
from cases import RESULTS, compare_shown, described, machine, save

from turbovlm import ReadConfig

IMAGES, WORDS, IMAGE_SIZE = 16, 35, 384
VERSIONS = {f"{keep:g}": ReadConfig(cross_keep=keep) for keep in (0.5, 0.25, 0.1)}


class Ranking(nn.Module):
    """A sentence beside images that are encoded already."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Scores, `[images, 2]`, of their tokens, `[images, 577, 768]`."""
        words = self.model.text_encoder(input_ids=input_ids, encoder_hidden_states=image).last_hidden_state
        scores: torch.Tensor = self.model.itm_head(words[:, 0])
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    model = blip()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30000, (1, WORDS), generator=generator).expand(IMAGES, -1)
    pixels = torch.randn(IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    with torch.inference_mode():
        image = model.model.vision_model(pixels).last_hidden_state
    shown = compare_shown(model, {"input_ids": ids, "image": image}, VERSIONS, "re-ranking", args.rounds)
    results = {"machine": machine(), "re-ranking": shown.to_dict()}
    save(RESULTS / "grounding.json", results)
    (RESULTS / "grounding.md").write_text(report(results))
    print(report(results))


def blip() -> Ranking:
    """BLIP-base for retrieval, with random weights."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    torch.manual_seed(0)
    config = BlipConfig(vision_config={"image_size": IMAGE_SIZE}, text_config={"encoder_hidden_size": 768})
    return Ranking(BlipForImageTextRetrieval(config)).eval()


def report(results: dict[str, Any]) -> str:
    lines = ["# Fewer image tokens in later cross-attention layers", "", described(results["machine"]), ""]
    lines += [f"BLIP-base's shape, random weights, fp32; {WORDS} words with each of {IMAGES} images. Medians.", ""]
    lines += ["| cross_keep | GMACs | MACs ratio | s | speed-up | peak MB |", "|--:|--:|--:|--:|--:|--:|"]
    for run in results["re-ranking"]["runs"]:
        keep = "1" if run["name"] == "model" else run["name"]
        seconds = sorted(run["wall_seconds"])[len(run["wall_seconds"]) // 2]
        lines.append(
            f"| {keep} | {run['macs'] / 1e9:.1f} | {run['macs_ratio']:.2f}× | {seconds:.2f} "
            f"| **{run['speedup']:.2f}×** | {run['peak_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
