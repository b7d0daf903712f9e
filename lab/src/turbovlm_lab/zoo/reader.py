"""A small model that reads scenes: captions, answers to questions, and whether statements about two images are true.

Its eyes are a pretrained encoder, unchanged (`EYES`): ten blocks of the ViT-S/14 of `turbovlm_lab.zoo.saliency`, or
eleven of OpenAI's CLIP ViT-B/16 of `turbovlm_lab.zoo.clip`, whose last block is left out, as in LLaVA. A connector,
two linear layers on each token, brings their tokens to where the words are. What reads them is a decoder as BLIP has
it (`transformers.BlipTextLMHeadModel`): four blocks of width 256 that attend to words before and to all image tokens.
A text begins with what is wanted, `[caption]`, `[question]` or `[statement]`; what follows `[answer]`
is the answer. For statements the tokens of two images stand in one sequence, marked left and right.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.apply import get_handle
from turbovlm.encoder.cross_attention import Merged, attach, merged_into
from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.zoo import clip, saliency
from turbovlm_lab.zoo.grammar import words
from turbovlm_lab.zoo.sprites import SCENE_NAMES

BLOCKS = 10
"""Of the ViT's twelve: fine-tuning changed the last two."""
CLIP_BLOCKS = 11
"""Of CLIP's twelve: after the last one only CLS is read in its training."""
CAPTION, QUESTION, STATEMENT, ANSWER, END, PAD = "[caption]", "[question]", "[statement]", "[answer]", "[end]", "[pad]"
VOCABULARY = (PAD, END, CAPTION, QUESTION, STATEMENT, ANSWER, *words(SCENE_NAMES))
WIDTH, LONGEST = 256, 64
TIED = {
    "decoder.cls.predictions.decoder.weight": "decoder.bert.embeddings.word_embeddings.weight",
    "decoder.cls.predictions.decoder.bias": "decoder.cls.predictions.bias",
}
"""What the file of weights leaves out, and where the same stands."""
_NUMBER = {word: number for number, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Eyes:
    """A pretrained encoder to look at images with.

    Attributes:
        load: makes it, in eval mode.
        preprocess: images to `[images, 3, 224, 224]`.
        width: of its tokens.
        patch: pixels a side.
        weights: file of what was trained to read its tokens.
        is_normed: whether its tokens come out of a norm.
        asks_to_resize: whether it has to be told that images may be of another size than it was trained at.
    """

    load: Callable[[], Any]
    preprocess: Callable[..., Tensor]
    width: int
    patch: int
    weights: Path
    is_normed: bool = True
    asks_to_resize: bool = False


class SceneReader(nn.Module):
    """Images and the beginning of a text to its next words.

    Attributes:
        eyes: which encoder that is.
        encoder: what looks; it stays as it was pretrained.
        connector: from the encoder's width to the decoder's.
        decoder: a `transformers.BlipTextLMHeadModel`.
        sides: what is added to the tokens of the left and of the right image where there are two, `[2, 256]`.
    """

    def __init__(self, encoder: Any, decoder: Any, eyes: str = "vit") -> None:
        super().__init__()
        self.encoder = encoder
        self.eyes = EYES[eyes]
        norm = [] if self.eyes.is_normed else [nn.LayerNorm(self.eyes.width)]
        layers = [nn.Linear(self.eyes.width, 768), nn.GELU(), nn.Linear(768, WIDTH), nn.LayerNorm(WIDTH)]
        self.connector = nn.Sequential(*norm, *layers)
        self.decoder = decoder
        self.sides = nn.Parameter(torch.zeros(2, WIDTH))

    def look(self, pixel_values: Tensor) -> Tensor:
        """The tokens of the images.

        Where tokens are merged, a thing that became one token weighs in the words' attention what it weighed before:
        those of a reader that turbovlm was applied to count by size, and where it was applied to the encoder alone,
        every position gets its token's value.

        Args:
            pixel_values: `[batch, 3, 224, 224]`, or `[batch, 2, 3, 224, 224]` for pairs, as the eyes' `preprocess` has
                it.

        Returns:
            `[batch, tokens, 256]`; of a pair, the left image's and then the right one's.
        """
        if pixel_values.ndim == 4:
            given = {"interpolate_pos_encoding": True} if self.eyes.asks_to_resize else {}
            tokens: Tensor = self.connector(self.encoder(pixel_values=pixel_values, **given).last_hidden_state)
            if merged_into(tokens) is not None:
                return tokens
            height, width = (length // self.eyes.patch for length in pixel_values.shape[2:])
            merged = tokens.shape[1] < 1 + height * width
            return get_handle(self.encoder).restore(tokens) if merged else tokens
        each = self.look(pixel_values.flatten(0, 1))
        both, known = self.join(each.reshape(*pixel_values.shape[:2], *each.shape[1:])), merged_into(each)
        if known is None:
            return both
        sizes = None if known.sizes is None else known.sizes.view(len(both), -1)
        return attach(both, Merged.of(sizes, None, known.logs is not None))

    def join(self, tokens: Tensor) -> Tensor:
        """Two images' tokens, `[batch, 2, tokens, 256]`, as one sequence."""
        return (tokens + self.sides[:, None]).flatten(1, 2)

    def forward(
        self, ids: Tensor, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits of each next word, `[batch, words, vocabulary]`.

        Args:
            ids: words, `[batch, words]`.
            tokens: as `look` gives them.
            positions: of the words in their texts, where a row holds several.
            mask: added to the attention between words, `[batch, 1, words, words]`; each sees those before it if None.
        """
        out = self.decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            encoder_hidden_states=tokens,
            use_cache=False,
        )
        logits: Tensor = out.logits
        return logits

    @torch.no_grad()
    def write(self, tokens: Tensor, beginnings: Sequence[str]) -> list[str]:
        """The likeliest next word again and again, to the end of each text.

        Args:
            tokens: as `look` gives them.
            beginnings: of the texts, one per row, of the same number of words.
        """
        ids = torch.tensor([encode(text) for text in beginnings], device=tokens.device)
        made = self.decoder.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=tokens,
            max_length=LONGEST,
            do_sample=False,
        )
        return [decode(row) for row in made[:, ids.shape[1] :].tolist()]


def encode(text: str) -> list[int]:
    """The numbers of a text's words.

    Raises:
        ConfigError: it has a word that the model does not know.
    """
    unknown = [word for word in text.split() if word not in _NUMBER]
    if unknown:
        raise ConfigError(f"{text!r}: the model does not know {', '.join(map(repr, unknown))}")
    return [_NUMBER[word] for word in text.split()]


def decode(ids: Sequence[int]) -> str:
    """The words, up to the end."""
    found = [VOCABULARY[number] for number in ids]
    return " ".join(found[: found.index(END)] if END in found else found)


def scene_encoder() -> Any:
    """The pretrained ViT's first ten blocks and its last norm, in eval mode.

    Raises:
        TurboError: see `load_saliency_vit`.
    """
    encoder: Any = saliency.load_saliency_vit().backbone
    encoder.encoder.layer = encoder.encoder.layer[:BLOCKS]
    encoder.config.num_hidden_layers = BLOCKS
    return encoder


def clip_encoder() -> Any:
    """CLIP's first eleven blocks, a `transformers.CLIPVisionModel` in eval mode; patches come out without a norm.

    Raises:
        TurboError: see `load_clip`.
    """
    encoder: Any = clip.load_clip().vision_model
    encoder.encoder.layers = encoder.encoder.layers[:CLIP_BLOCKS]
    encoder.config.num_hidden_layers = CLIP_BLOCKS
    return encoder


_WEIGHTS = Path(__file__).parent / "weights"
EYES = {
    "vit": Eyes(scene_encoder, saliency.preprocess, 384, 14, _WEIGHTS / "scene_reader.safetensors"),
    "clip": Eyes(
        *(clip_encoder, clip.preprocess, 768, clip.PATCH_SIZE, _WEIGHTS / "scene_reader_clip.safetensors"),
        is_normed=False,
        asks_to_resize=True,
    ),
}


def scene_decoder() -> Any:
    """With random weights."""
    from transformers import BlipTextConfig, BlipTextLMHeadModel

    config = BlipTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        encoder_hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        hidden_dropout_prob=0.0,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        bos_token_id=_NUMBER[CAPTION],
        eos_token_id=_NUMBER[END],
        sep_token_id=_NUMBER[END],
        pad_token_id=_NUMBER[PAD],
        is_decoder=True,
    )
    return BlipTextLMHeadModel(config)


def load_scene_reader(eyes: str = "vit", weights: Path | str | None = None) -> SceneReader:
    """The model with its weights, in eval mode, fp32, on the CPU.

    Args:
        eyes: `"vit"` or `"clip"`.
        weights: a safetensors file of the connector's, the decoder's and `sides`; those that come with these eyes if
            None.

    Raises:
        ConfigError: other eyes.
        TurboError: the weights, the pretrained ViT's or `transformers` are not there.
    """
    if importlib.util.find_spec("transformers") is None:
        raise TurboError("the scene reader needs transformers: pip install 'turbovlm[transformers]'")
    if eyes not in EYES:
        raise ConfigError(f"eyes={eyes!r}: must be one of {', '.join(EYES)}")
    file = Path(weights or EYES[eyes].weights)
    if not file.is_file():
        raise TurboError(f"{file}: there are no such weights; studies/scenes/train.py makes them")
    from safetensors.torch import load_file

    reader = SceneReader(EYES[eyes].load(), scene_decoder(), eyes)
    stored = {name: value.float() for name, value in load_file(file).items()}
    stored |= {name: stored[same] for name, same in TIED.items()}
    reader.load_state_dict({**{f"encoder.{n}": v for n, v in reader.encoder.state_dict().items()}, **stored})
    return reader.eval()
