"""A small vision-language model: CLIP ViT-B/16 looks, Gemma 3 270M answers, joined as LLaVA joins them.

It is a `transformers.LlavaForConditionalGeneration`. The projector, two linear layers, reads the 196 patches of the
tower's last block but one; Gemma reads what it makes of them, and then a question. Tower and language model are
pretrained and come from packages (`turbovlm_lab.zoo.clip`, `turbovlm_lab.zoo.gemma`); what `studies/visual_tokens`
trained is the projector and a low-rank change of Gemma, `weights/small_vlm.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.zoo.clip import CONFIG, IMAGE_SIZE, PATCH_SIZE, load_clip, preprocess
from turbovlm_lab.zoo.gemma import load_gemma
from turbovlm_lab.zoo.low_rank import merge_low_rank

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS = Path(__file__).parent / "weights" / "small_vlm.safetensors"
SIDE = IMAGE_SIZE // PATCH_SIZE
TOKENS = SIDE**2
"""Of an image of 224×224 pixels."""
IMAGE_TOKEN, BOS, EOS, PAD = 5, 2, 1, 0
"""Gemma's own `[multimodal]`, `<bos>`, `<eos>` and `<pad>`."""
SCALE = ".scale"
"""What the names of scales in the file of weights end with."""
LAYER = -2
"""Of the tower's hidden states, the one that is projected."""
PROJECTOR, LANGUAGE = "projector.", "language."
"""What names in the file of weights begin with."""
LONGEST = 64
"""Tokens of an answer."""


@dataclass(frozen=True, eq=False)
class SmallVlm:
    """A `transformers.LlavaForConditionalGeneration` and Gemma's tokenizer."""

    model: Any
    tokenizer: Any

    def encode(self, question: str) -> list[int]:
        """The tokens behind an image's: the question on a line of its own."""
        ids: list[int] = self.tokenizer(f"\n{question}", add_special_tokens=False).input_ids
        return ids

    def encode_answer(self, answer: str) -> list[int]:
        """The tokens to be generated, the end included."""
        ids: list[int] = self.tokenizer(f" {answer}", add_special_tokens=False).input_ids
        return [*ids, EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """The answer in generated tokens, up to the end."""
        found = list(ids)
        found = found[: found.index(EOS)] if EOS in found else found
        text: str = self.tokenizer.decode(found, skip_special_tokens=True)
        return text.strip()

    def inputs(self, images: Sequence[Image], questions: Sequence[str]) -> dict[str, Tensor]:
        """Arguments of `generate`: a question about each image, padded on the left.

        Args:
            images: any images; the centre square is read.
            questions: one for each.

        Raises:
            ConfigError: not as many questions as images, or none of them.
        """
        if len(images) != len(questions):
            raise ConfigError(f"{len(questions)} questions for {len(images)} images: there must be one for each")
        pixels = preprocess(images)
        prompts = [[BOS, *[IMAGE_TOKEN] * TOKENS, *self.encode(text)] for text in questions]
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels.to(self.model.dtype)}

    @torch.no_grad()
    def answer(self, images: Sequence[Image], questions: Sequence[str]) -> list[str]:
        """The likeliest answer, token by token, to a question about each image.

        Raises:
            ConfigError: see `inputs`.
        """
        inputs = {name: value.to(self.model.device) for name, value in self.inputs(images, questions).items()}
        out = self.model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        return [self.decode(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]


def join_parts(tower: Any, language_model: Any, image_token: int = IMAGE_TOKEN) -> Any:
    """A `LlavaForConditionalGeneration` of a pretrained tower and language model, its projector's weights random.

    Args:
        tower: a `CLIPVisionModel`.
        language_model: a model of text with its embeddings, without the head, which shares their weights. Both are
            taken as they are, not copied.
        image_token: the placeholder.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_id=image_token,
        vision_feature_layer=LAYER,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = tower, language_model
    projector = model.model.multi_modal_projector.to_empty(device="cpu").to(language_model.dtype)
    for layer in (projector.linear_1, projector.linear_2):
        layer.reset_parameters()
    model.lm_head.weight = language_model.get_input_embeddings().weight
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model.eval()


def with_clip(language_model: Any, tokenizer: Any) -> SmallVlm:
    """CLIP's tower and Gemma without its head, fp32, on the CPU, joined by a projector with random weights.

    Raises:
        TurboError: see `load_clip`.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tower = CLIPVisionModel(CLIPVisionConfig(**CONFIG, attn_implementation="sdpa"))
    tower.load_state_dict(load_clip().vision_model.state_dict())
    return SmallVlm(join_parts(tower, language_model), tokenizer)


def load_small_vlm(weights: Path | str = WEIGHTS) -> SmallVlm:
    """The model with its weights, in eval mode, fp32, on the CPU.

    Args:
        weights: a safetensors file of the projector's and of the change of Gemma.

    Raises:
        TurboError: the weights, CLIP's, Gemma's or `transformers` are not there.
    """
    if not Path(weights).is_file():
        raise TurboError(f"{weights}: there are no such weights; studies/visual_tokens/train.py makes them")
    gemma = load_gemma()
    vlm = with_clip(gemma.model.model, gemma.tokenizer)
    load_trained(vlm.model, weights)
    return vlm


def load_trained(model: Any, weights: Path | str) -> None:
    """Give an untrained model the projector and the change of Gemma that a file holds."""
    from safetensors.torch import load_file

    state = unpacked(load_file(weights))
    inner = model.model
    inner.multi_modal_projector.load_state_dict(_within(state, PROJECTOR))
    merge_low_rank(inner.language_model, _within(state, LANGUAGE))


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a file: of each matrix, `[out, in]`, bytes and a scale for every row; the rest in fp16."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.ndim != 2:
            found[name] = value.half().cpu().contiguous()
            continue
        scale = value.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        found[name] = (value.float() / scale).round().to(torch.int8).cpu().contiguous()
        found[name + SCALE] = scale.cpu()
    return found


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of such a file, fp32."""
    values = {name: value.float() for name, value in state.items() if not name.endswith(SCALE)}
    return {name: value * state[name + SCALE] if name + SCALE in state else value for name, value in values.items()}


def _within(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
