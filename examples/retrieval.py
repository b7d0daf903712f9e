"""Images ranked by how well a sentence fits them, without turbovlm and with it.

    python examples/retrieval.py holiday/ "a dog on the beach"
    python examples/retrieval.py holiday/ "a dog on the beach" --model Salesforce/blip-itm-base-coco

Dual encoders (CLIP, SigLIP) rank by cosine; BLIP by the probability that image and sentence match.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import images, load, parser_of, side_by_side


def main(argv: Sequence[str] | None = None) -> None:
    from transformers import AutoConfig, AutoModel, BlipForImageTextRetrieval

    parser = parser_of(__doc__ or "", "openai/clip-vit-base-patch16", r=8)
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("sentence")
    args = parser.parse_args(argv)
    found = images(parser, [args.images])
    try:
        blip = AutoConfig.from_pretrained(args.model).model_type == "blip"
    except OSError as error:
        parser.error(f"--model {args.model}: {' '.join(str(error).split())}")
    model, processor = load(parser, args, BlipForImageTextRetrieval if blip else AutoModel)
    sentences = [args.sentence] * (len(found) if blip else 1)
    length = {"padding": "max_length"} if model.config.model_type.startswith("siglip") else {}
    inputs = processor(images=list(found.values()), text=sentences, return_tensors="pt", **length)
    inputs = inputs.to(args.device, model.dtype)

    def answer() -> list[str]:
        scores = _scores(model, inputs, blip)
        ranked = sorted(zip(scores, found), reverse=True)
        return [f"{score:.3f} {name}" for score, name in ranked]

    side_by_side(parser, args, model, answer)


def _scores(model: Any, inputs: Any, blip: bool) -> list[float]:
    """One score per image."""
    out = model(**inputs)
    if blip:
        matches: list[float] = out.itm_score.softmax(dim=-1)[:, 1].tolist()
        return matches
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (out.image_embeds, out.text_embeds))
    cosines: list[float] = (image @ text.T)[:, 0].tolist()
    return cosines


if __name__ == "__main__":
    main()
