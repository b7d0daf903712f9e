"""A question about an image, without turbovlm and with it.

python examples/vqa.py cat.jpg "What is the cat lying on?"
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import images, load, parser_of, side_by_side


def main(argv: Sequence[str] | None = None) -> None:
    from transformers import BlipForQuestionAnswering

    parser = parser_of(__doc__ or "", "Salesforce/blip-vqa-base", r=16)
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    args = parser.parse_args(argv)
    (image,) = images(parser, [args.image]).values()
    model, processor = load(parser, args, BlipForQuestionAnswering)
    inputs = processor(images=image, text=args.question, return_tensors="pt").to(args.device, model.dtype)

    def answer() -> list[str]:
        return [processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0].strip()]

    side_by_side(parser, args, model, answer)


if __name__ == "__main__":
    main()
