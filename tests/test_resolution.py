"""The control at equal tokens: a smaller image."""

from __future__ import annotations

import pytest

from turbovlm.errors import ConfigError, UnsupportedModelError
from turbovlm.vlm import downsample

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")

SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<image>"]


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "what": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    return fast


@pytest.fixture
def qwen(tokenizer):
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
    )


def tokens(processor, image):
    inputs = processor(images=[image], text=["<|image_pad|> what"], return_tensors="pt")
    return int((inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum())


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (2000, 2000)])
@pytest.mark.parametrize("keep", [0.5, 0.25, 64])
def test_as_many_tokens_as_visual_keep_leaves(qwen, size, keep):
    image = Image.new("RGB", size, "red")
    target = keep if isinstance(keep, int) else keep * tokens(qwen, image)
    smaller = downsample(qwen, image, keep)
    assert tokens(qwen, smaller) == pytest.approx(target, rel=0.1)
    assert smaller.width / smaller.height == pytest.approx(size[0] / size[1], rel=0.02)


def test_all_of_them_is_the_image_itself(qwen):
    image = Image.new("RGB", (640, 480))
    assert downsample(qwen, image, 1.0) is image


def test_what_cannot_be_done_says_why(qwen, tokenizer):
    image = Image.new("RGB", (640, 480))
    llava = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    with pytest.raises(ConfigError, match="makes 256 tokens of this image in smaller sizes, and nothing near 128"):
        downsample(llava, image, 0.5)
    with pytest.raises(UnsupportedModelError, match="CLIPProcessor does not say"):
        downsample(
            transformers.CLIPProcessor(image_processor=transformers.CLIPImageProcessor(), tokenizer=tokenizer),
            image,
            0.5,
        )
    with pytest.raises(ConfigError, match=r"visual_keep=1\.5"):
        downsample(qwen, image, 1.5)
