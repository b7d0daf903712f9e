"""Models that read images and cannot have fewer of their tokens read, as data: which, and what stands against it."""

from __future__ import annotations

import inspect

import torch.nn as nn

from turbovlm.registry import class_paths
from turbovlm.vlm.families.family import library

CODES = (
    "its images are tokens of a codebook, with the language model's own embeddings, which no tower gives features of"
)
STACKS = (
    "an encoder reads the prompt and a decoder attends to all of the encoder's columns: the decoder's mask, which "
    "generate makes of the full prompt, would have to be shortened as well"
)
TOGETHER = "it encodes images only together with the prompt: its forward takes no mm_encoder_outputs"
ACROSS = (
    "layers of its language model attend to images across, by masks of which image tokens each word sees, and "
    "nothing shortens those masks"
)
PLACES = "its images stand where a mask of its own says (image_embeds_position_mask), as many tokens as its config has"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        library("pi0", "PI0Model"),
        "it puts visual tokens into its prompt itself, and its action expert counts the whole prompt's columns in the "
        "cache",
    ),
    **dict.fromkeys((*library("chameleon", "ChameleonModel"), *library("emu3", "Emu3Model")), CODES),
    **dict.fromkeys(library("glm_image", "GlmImageModel"), CODES),
    **dict.fromkeys((*library("florence2", "Florence2Model"), *library("t5gemma2", "T5Gemma2Model")), STACKS),
    **dict.fromkeys((*library("mllama", "MllamaModel"), *library("idefics", "IdeficsModel")), ACROSS),
    **dict.fromkeys((*library("kosmos2", "Kosmos2Model"), *library("kosmos2_5", "Kosmos2_5Model")), PLACES),
    **dict.fromkeys(
        (
            *library("modernvbert", "ModernVBertModel"),
            *library("ultravbert", "UltraVBertModel"),
            *library("neomme", "NeoMMEModel"),
            *library("embedding_gemma2", "EmbeddingGemma2Model"),
            *library("phi4_multimodal", "Phi4MultimodalModel"),
            *library("git", "GitModel"),
        ),
        TOGETHER,
    ),
    **dict.fromkeys(
        library("granite4_vision", "Granite4VisionModel"),
        "its features are pairs, of a layer of the language model and what is added there, and none is a pooler_output",
    ),
    **dict.fromkeys(
        library("diffusion_gemma", "DiffusionGemmaEncoderModel"),
        "a decoder of its own attends to all columns that it has read, and counts them",
    ),
}
"""Why, by the dotted path of the part that reads images, or of one around it."""


def refusal(module: nn.Module) -> str | None:
    """Why a model, or a part of one, cannot have fewer visual tokens read; None where nothing is known against it."""
    return next((REFUSED[path] for path in class_paths(module) if path in REFUSED), None)


def fills_placeholders(cls: type[nn.Module]) -> bool:
    """Whether a class puts features in place of placeholders as families' do, and so may need no more than an entry."""
    return hasattr(cls, "get_image_features") and "mm_encoder_outputs" in inspect.signature(cls.forward).parameters
