"""Captions of images, without turbovlm and with it.

python examples/caption.py holiday/ --r 16
python examples/caption.py cat.jpg --model Salesforce/blip2-opt-2.7b --dtype bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import images, load, parser_of, side_by_side


def main(argv: Sequence[str] | None = None) -> None:
    from transformers import AutoModelForImageTextToText

    parser = parser_of(__doc__ or "", "Salesforce/blip-image-captioning-base", r=16)
    parser.add_argument("images", type=Path, nargs="+", help="files or folders")
    parser.add_argument("--words", type=int, default=20, help="tokens of a caption at most (default: 20)")
    args = parser.parse_args(argv)
    found = images(parser, args.images)
    model, processor = load(parser, args, AutoModelForImageTextToText)
    inputs = processor(images=list(found.values()), return_tensors="pt").to(args.device, model.dtype)

    def answer() -> list[str]:
        captions = processor.batch_decode(model.generate(**inputs, max_new_tokens=args.words), skip_special_tokens=True)
        return [f"{name}: {caption.strip()}" for name, caption in zip(found, captions)]

    side_by_side(parser, args, model, answer)


if __name__ == "__main__":
    main()
