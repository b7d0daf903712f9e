"""Pipelines of `transformers` and `diffusers`."""

from __future__ import annotations

from typing import Any

import torch

from matrix_cases import Case
from matrix_checks.check import check, close, differ, in_transformers, quiet


def has_pipeline(case: Case) -> bool:
    plain = case.first().keys() in ({"pixel_values"}, {"input_ids", "attention_mask"})
    return bool(case.pipes) or case.name == "llava" or (in_transformers(case) and plain and case.name != "video_mae")


@check("`transformers.pipeline`, pipelines of `diffusers`", has_pipeline)
@torch.no_grad()
def pipelines(case: Case) -> None:
    if case.pipes:
        for name in case.pipes:
            pipeline_of_images(case, name)
    elif case.group == "text":
        pipeline_of_text(case)
    elif case.group == "language":
        pipeline_of_a_prompt(case)
    else:
        pipeline_of_an_encoder(case)


def pipeline_of_images(case: Case, name: str) -> None:
    """As with the denoiser accelerated by itself, and not as without."""
    from pipelines import PIPES

    made = PIPES[name]

    def images(pipe: Any) -> torch.Tensor:
        size = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
        return torch.as_tensor(pipe(**made.inputs(64, 64), **size).images)

    pipe, twin = made(), made()
    plain = images(pipe)
    denoiser = next(part for part in ("unet", "transformer") if getattr(twin, part, None) is not None)
    with case.apply(pipe), case.apply(getattr(twin, denoiser)):
        found = images(pipe)
        close(found, images(twin))
        if case.settings is not None:
            differ(found, plain)
    assert torch.equal(images(pipe), plain)


def pictures() -> list[Any]:
    from PIL import Image

    pixels = [torch.rand(6, 6, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    return [Image.fromarray((p * 255).byte().numpy()).resize((48, 48)) for p in pixels]


def pipeline_of_an_encoder(case: Case) -> None:
    from transformers import ViTImageProcessor, pipeline

    processor = ViTImageProcessor(size={"height": 48, "width": 48})
    inputs = processor(pictures(), return_tensors="pt")
    model = case.make()
    with case.apply(model):
        found = pipeline("image-feature-extraction", model=model, image_processor=processor)(pictures())
        for each, wanted in zip(found, case.run(model, inputs)):
            close(torch.tensor(each)[0], wanted)
    if case.head is None:
        return
    model = case.head()
    with case.apply(model):
        found = pipeline("image-classification", model=model, image_processor=processor)(pictures(), top_k=5)
        for each, wanted in zip(found, model(**inputs).logits.softmax(-1)):
            scores = {row["label"]: row["score"] for row in each}
            close(torch.tensor([scores[f"LABEL_{i}"] for i in range(5)]), wanted)


def pipeline_of_text(case: Case) -> None:
    from transformers import pipeline

    words = tokenizer()
    text = " ".join(f"w{i}" for i in range(20, 40))
    model = case.make()
    with case.apply(model):
        (found,) = pipeline("feature-extraction", model=model, tokenizer=words)(text)
        close(torch.tensor(found), case.run(model, words(text, return_tensors="pt"))[0])


def pipeline_of_a_prompt(case: Case) -> None:
    """The words that `generate` gives by itself."""
    import transformers

    size = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**size),
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    model, (picture, _), text = case.make(), pictures(), "<image> w20 w21"
    unsaid = [0, 1, 2, 3, *range(90, 100)]  # special, or words that the tokenizer has not
    asked = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": unsaid, "eos_token_id": None}
    with quiet(), case.apply(model):
        generator = transformers.pipeline("image-text-to-text", model=model, processor=processor)
        (answer,) = generator(images=picture, text=text, return_full_text=False, generate_kwargs=asked)
        inputs = processor(images=picture, text=text, return_tensors="pt")
        new = model.generate(**inputs, **asked)[:, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"].split() == processor.decode(new[0]).split()
    assert len(answer["generated_text"].split()) == 5


def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    names = ["<pad>", "</s>", "<s>", "<unk>", *(f"w{i}" for i in range(4, 90)), "<image>"]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special, model_max_length=64)
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.model_input_names = ["input_ids", "attention_mask"]
    return fast
