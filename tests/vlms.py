"""Small vision-language models made of the library's own configs, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

IMAGE, VIDEO, PAD, EOS = 90, 91, 0, 1
SPECIAL = [IMAGE, VIDEO]
NEW = 5
"""Tokens that tests generate."""
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 2,
}
CLIP = {
    "image_size": 48,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
"""36 patches."""


Image = Callable[[int], tuple[int | list[int], dict[str, torch.Tensor]]]
"""The n-th image: how many tokens it has, or what stands for it in a prompt, and the arguments that encode it."""


@dataclass(frozen=True)
class Vlm:
    """One family: how to make a small model, and how to encode prompts for it.

    `types` names its argument of token types, 1 for images' tokens and 2 for videos'; where `answer` is given, 0 for
    the whole prompt and `answer` behind it. `first` is the position of a prompt's first token. Where `one_placeholder`,
    videos have that of images. `attention`: whether the tower has a row of it for visual tokens.
    `beams`: whether the library itself repeats images for them. `side_by_side`: whether images are one beside another.
    `inputs(rows)`: each row is a list of integers (text tokens), `"image"`s and `"video"`s; ragged rows are padded on
    the left.
    """

    make: Callable[[], Any]
    image: Image
    token: int = IMAGE
    types: str | None = None
    first: int = 0
    answer: int | None = None
    video: Callable[[int], tuple[list[int], dict[str, torch.Tensor]]] | None = None
    one_placeholder: bool = False
    attention: bool = True
    beams: bool = True
    side_by_side: bool = False

    def inputs(self, *rows: list[Any]) -> dict[str, Any]:
        sequences: list[list[int]] = []
        pixels: dict[str, list[torch.Tensor]] = {}
        images = videos = 0
        for row in rows:
            sequence: list[int] = []
            for item in row:
                one: dict[str, torch.Tensor] = {}
                if item == "image":
                    tokens, one = self.image(images)
                    sequence += tokens if isinstance(tokens, list) else [self.token] * tokens
                    images += 1
                elif item == "video":
                    placed, one = self.video(videos)
                    sequence += placed
                    videos += 1
                else:
                    sequence.append(item)
                for name, value in one.items():
                    pixels.setdefault(name, []).append(value)
            sequences.append(sequence)
        longest = max(map(len, sequences))
        ids = torch.tensor([[PAD] * (longest - len(s)) + s for s in sequences])
        mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
        found = {"input_ids": ids, "attention_mask": mask}
        beside = ("pixel_values",) if self.side_by_side else ()
        found |= {name: torch.cat(values, dim=-1 if name in beside else 0) for name, values in pixels.items()}
        if self.types is not None:
            types = (ids == self.token).int() + 2 * (ids == VIDEO).int()
            found[self.types] = types * (self.answer is None)
        if self.one_placeholder:
            found["input_ids"] = ids.masked_fill(ids == VIDEO, self.token)
        return found


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], Any]) -> Any:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return make().eval()


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE)
    )


def qwen_image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
    height, width = ((8, 8), (4, 12), (8, 4))[index % 3]
    pixels = noise(index, height * width, 3 * 2 * 14 * 14)
    return height * width // 4, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def qwen_video(pixels: int, separated: bool = False) -> Callable[[int], tuple[list[int], dict[str, torch.Tensor]]]:
    """Videos of 3 or 2 frames of `pixels`² patches; a frame's tokens stand behind its time, where `separated`."""

    def video(index: int) -> tuple[list[int], dict[str, torch.Tensor]]:
        frames, height, width = ((3, 4, 8), (2, 8, 4))[index % 2]
        patches = noise(50 + index, frames * height * width, 3 * 2 * pixels * pixels)
        placed: list[int] = []
        for frame in range(frames):
            placed += [20 + frame] * separated + [VIDEO] * (height * width // 4)
        return placed, {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[frames, height, width]])}

    return video


def qwen2_5() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    vision |= {"window_size": 56, "fullatt_block_indexes": [1, 3]}
    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
    height, width = ((8, 8), (4, 12), (8, 4))[index % 3]
    pixels = noise(index, height * width, 3 * 2 * 16 * 16)
    return height * width // 4, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def qwen3() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {"depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
    text = TEXT | {"head_dim": 8}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO)
    return Qwen3VLForConditionalGeneration(config)


def internvl() -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=[48, 48],
        patch_size=[6, 6],
    )
    return InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE)
    )


def square(tokens: int, pixels: int) -> Callable[[int], tuple[int, dict[str, torch.Tensor]]]:
    def image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
        return tokens, {"pixel_values": noise(index, 1, 3, pixels, pixels)}

    return image


def anyres_image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
    """A base tile and 2×1 tiles of 6×6 patches, in rows that end in a newline."""
    pixels = noise(index, 1, 3, 3, 48, 48)
    return 36 + 12 * 6 + 12, {"pixel_values": pixels, "image_sizes": torch.tensor([[96, 48]])}


def anyres_video(index: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """3 frames of 6×6 patches, halved to 3×3 tokens, and a newline."""
    return [VIDEO] * (3 * 9 + 1), {"pixel_values_videos": noise(50 + index, 1, 3, 3, 48, 48)}


ANYRES = {"image_grid_pinpoints": [[48, 48], [96, 48]], "image_token_id": IMAGE}


def llava_next() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT), **ANYRES)
    return LlavaNextForConditionalGeneration(config)


def llava_onevision() -> Any:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision, text = SiglipVisionConfig(**CLIP), Qwen2Config(**TEXT)
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, video_token_id=VIDEO, **ANYRES)
    return LlavaOnevisionForConditionalGeneration(config)


def qwen2() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 3, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 32}
    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    config = Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO)
    return Qwen2VLForConditionalGeneration(config)


def idefics3_image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
    return 9, {"pixel_values": noise(index, 1, 1, 3, 48, 48)}


def idefics3() -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    text = LlamaConfig(**TEXT)
    config = Idefics3Config(vision_config=CLIP, text_config=text, image_token_id=IMAGE, scale_factor=2)
    return Idefics3ForConditionalGeneration(config)


def smolvlm() -> Any:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(vision_config=CLIP, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2)
    return SmolVLMForConditionalGeneration(config)


def paligemma() -> Any:
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    text = GemmaConfig(**TEXT, head_dim=8)
    vision = SiglipVisionConfig(**CLIP, projection_dim=32)
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, projection_dim=32)
    return PaliGemmaForConditionalGeneration(config)


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(**TEXT, head_dim=8, layer_types=["full_attention"] * 3)
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**CLIP), text_config=text, image_token_id=IMAGE, mm_tokens_per_image=9
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # zeros, as made
    return model


VLMS = {
    "llava": Vlm(llava, square(36, 48)),
    "qwen2_5_vl": Vlm(qwen2_5, qwen_image, types="mm_token_type_ids", video=qwen_video(14)),
    "qwen3_vl": Vlm(qwen3, qwen3_image, types="mm_token_type_ids", video=qwen_video(16, separated=True)),
    "internvl": Vlm(internvl, square(16, 48)),
    "llava_next": Vlm(llava_next, anyres_image),
    "llava_onevision": Vlm(llava_onevision, anyres_image, video=anyres_video),
    "qwen2_vl": Vlm(qwen2, qwen_image, types="mm_token_type_ids", video=qwen_video(14)),
    "idefics3": Vlm(idefics3, idefics3_image),
    "smolvlm": Vlm(smolvlm, idefics3_image),
    "paligemma": Vlm(paligemma, square(36, 48), types="token_type_ids", first=1, answer=1),
    "gemma3": Vlm(gemma3, square(9, 48), types="token_type_ids"),
}


def blip(task: str) -> Any:
    import transformers

    vision = CLIP | {"initializer_range": 0.05}
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"} | {
        "encoder_hidden_size": 32,
        "sep_token_id": EOS,
    }
    config = transformers.BlipConfig(
        vision_config=vision, text_config=text, projection_dim=16, image_text_hidden_size=16
    )
    return getattr(transformers, f"BlipFor{task}")(config)


def blip2() -> Any:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    vision = CLIP | {"initializer_range": 0.05}
    qformer = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    qformer |= {"intermediate_size": 48, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    text = OPTConfig(
        vocab_size=100,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=EOS,
    )
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=IMAGE
    )
    return Blip2ForConditionalGeneration(config)


def vision_encoder_decoder() -> Any:
    from transformers import BertConfig, BertLMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    decoder = BertLMHeadModel(BertConfig(**text, is_decoder=True, add_cross_attention=True))
    model = VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**CLIP)), decoder=decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, PAD
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 2, PAD
    return model


def dropped(handle, inputs, family):
    """Where the prompts lose tokens, `[batch, N]`, as the handle tells."""
    gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    tokens = [family.token] if family.video is None else [family.token, VIDEO]
    places = torch.cat([(inputs["input_ids"] == token).flatten().nonzero().squeeze(1) for token in tokens])
    counts = [selection.destination.shape[1] for selection in handle.visual]
    for where, selection in zip(places.split(counts), handle.visual):
        stays = torch.zeros(len(where), dtype=torch.bool)
        stays[selection.kept[0]] = True
        gone.view(-1)[where[~stays]] = True
    return gone


def full_positions(model, inputs, family):
    mask = inputs["attention_mask"]
    if hasattr(getattr(model, "model", model), "compute_3d_position_ids"):
        return model.model.get_rope_index(**{k: v for k, v in inputs.items() if "pixel" not in k})[0]
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0) + family.first


def masked_forward(model, inputs, gone, family):
    """The logits of the full prompt with the dropped positions masked, and its positions."""
    positions = full_positions(model, inputs, family)
    mask = inputs["attention_mask"] * ~gone
    return model(**{**inputs, "attention_mask": mask, "position_ids": positions}).logits


def masked_generate(model, inputs, gone, family):
    """Greedy decoding without a cache, of the full prompt with the dropped positions masked."""
    inputs = {**inputs, "position_ids": full_positions(model, inputs, family)}
    inputs["attention_mask"] = inputs["attention_mask"] * ~gone
    found = []
    for _ in range(NEW):
        logits = model(**inputs).logits[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
        found.append(logits.argmax(-1, keepdim=True))
        one = torch.ones_like(found[-1])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], found[-1]], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], one], dim=1)
        positions = inputs["position_ids"]
        inputs["position_ids"] = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        if family.types is not None:
            inputs[family.types] = torch.cat([inputs[family.types], one.int() * (family.answer or 0)], dim=1)
    return torch.cat(found, dim=1)


def generated(model, inputs, **settings):
    settings = {"do_sample": False, "eos_token_id": None, "suppress_tokens": SPECIAL, **settings}
    out = model.generate(**inputs, max_new_tokens=NEW, **settings)
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    assert torch.equal(sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    return sequences[:, inputs["input_ids"].shape[1] :]


def made(name):
    return VLMS[name], seeded(VLMS[name].make)


def visual_of(inputs, family):
    """The pixels, and the sizes beside them."""
    return {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", family.types)}
