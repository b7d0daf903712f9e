"""A question about images to a model with a chat template, without turbovlm and with it.

python examples/chat.py cat.jpg dog.jpg --question "Which of the two is larger?"
python examples/chat.py cat.jpg --model llava-hf/llava-1.5-7b-hf --visual-keep 128 --dtype bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import images, load, parser_of, side_by_side


def main(argv: Sequence[str] | None = None) -> None:
    from transformers import AutoModelForImageTextToText

    parser = parser_of(__doc__ or "", "Qwen/Qwen2.5-VL-3B-Instruct", visual_keep=0.5)
    parser.add_argument("images", type=Path, nargs="+", help="files or folders")
    parser.add_argument("--question", default="Describe what you see.")
    parser.add_argument("--words", type=int, default=60, help="tokens of the answer at most (default: 60)")
    args = parser.parse_args(argv)
    found = images(parser, args.images)
    model, processor = load(parser, args, AutoModelForImageTextToText)
    content = [{"type": "image", "image": image} for image in found.values()]
    chat = [{"role": "user", "content": [*content, {"type": "text", "text": args.question}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(args.device, model.dtype)

    def answer() -> list[str]:
        out = model.generate(**inputs, max_new_tokens=args.words)[:, inputs["input_ids"].shape[1] :]
        return [processor.batch_decode(out, skip_special_tokens=True)[0].strip()]

    side_by_side(parser, args, model, answer)


if __name__ == "__main__":
    main()
