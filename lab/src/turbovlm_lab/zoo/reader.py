"""A small model that reads scenes: captions, answers to questions, and whether statements about two images are true.

Its eyes are ten blocks of the pretrained ViT-S/14 of `turbovlm_lab.zoo.saliency`, unchanged. A connector, two linear
layers on each token, brings their tokens to where the words are. What reads them is a decoder as BLIP has it
(`transformers.BlipTextLMHeadModel`): four blocks of width 256 that attend to words before and to all image tokens. A
text begins with what is wanted, `[caption]`, `[question]` or `[statement]`; what follows `[answer]`
is the answer. For statements the tokens of two images stand in one sequence, marked left and right.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.apply import get_handle
from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.zoo.grammar import words
from turbovlm_lab.zoo.saliency import load_saliency_vit
from turbovlm_lab.zoo.sprites import SCENE_NAMES

WEIGHTS = Path(__file__).parent / "weights" / "scene_reader.safetensors"
BLOCKS = 10
"""Of the ViT's twelve: fine-tuning changed the last two."""
CAPTION, QUESTION, STATEMENT, ANSWER, END, PAD = "[caption]", "[question]", "[statement]", "[answer]", "[end]", "[pad]"
VOCABULARY = (PAD, END, CAPTION, QUESTION, STATEMENT, ANSWER, *words(SCENE_NAMES))
WIDTH, LONGEST = 256, 64
TIED = {
    "decoder.cls.predictions.decoder.weight": "decoder.bert.embeddings.word_embeddings.weight",
    "decoder.cls.predictions.decoder.bias": "decoder.cls.predictions.bias",
}
"""What the file of weights leaves out, and where the same stands."""
_NUMBER = {word: number for number, word in enumerate(VOCABULARY)}


class SceneReader(nn.Module):
    """Images and the beginning of a text to its next words.

    Attributes:
        encoder: a `transformers.Dinov2Model` of ten blocks; it stays as it was pretrained.
        connector: from the encoder's width to the decoder's.
        decoder: a `transformers.BlipTextLMHeadModel`.
        sides: what is added to the tokens of the left and of the right image where there are two, `[2, 256]`.
    """

    def __init__(self, encoder: Any, decoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.connector = nn.Sequential(nn.Linear(384, 768), nn.GELU(), nn.Linear(768, WIDTH), nn.LayerNorm(WIDTH))
        self.decoder = decoder
        self.sides = nn.Parameter(torch.zeros(2, WIDTH))

    def look(self, pixel_values: Tensor) -> Tensor:
        """The tokens of the images.

        Where tokens are merged, every position gets its token's value: a thing that became one token then weighs in the
        words' attention what it weighed before.

        Args:
            pixel_values: `[batch, 3, 224, 224]`, or `[batch, 2, 3, 224, 224]` for pairs, as `zoo.preprocess` has it.

        Returns:
            `[batch, tokens, 256]`; of a pair, the left image's and then the right one's.
        """
        if pixel_values.ndim == 4:
            tokens: Tensor = self.connector(self.encoder(pixel_values=pixel_values).last_hidden_state)
            height, width = (length // self.encoder.config.patch_size for length in pixel_values.shape[2:])
            merged = tokens.shape[1] < 1 + height * width
            return get_handle(self.encoder).restore(tokens) if merged else tokens
        each = self.look(pixel_values.flatten(0, 1))
        return self.join(each.reshape(*pixel_values.shape[:2], *each.shape[1:]))

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
    encoder: Any = load_saliency_vit().backbone
    encoder.encoder.layer = encoder.encoder.layer[:BLOCKS]
    encoder.config.num_hidden_layers = BLOCKS
    return encoder


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


def load_scene_reader(weights: Path | str = WEIGHTS) -> SceneReader:
    """The model with its weights, in eval mode, fp32, on the CPU.

    Args:
        weights: a safetensors file of the connector's, the decoder's and `sides`.

    Raises:
        TurboError: the weights, the pretrained ViT's or `transformers` are not there.
    """
    if importlib.util.find_spec("transformers") is None:
        raise TurboError("the scene reader needs transformers: pip install 'turbovlm[transformers]'")
    if not Path(weights).is_file():
        raise TurboError(f"{weights}: there are no such weights; studies/scenes/train.py makes them")
    from safetensors.torch import load_file

    reader = SceneReader(scene_encoder(), scene_decoder())
    stored = {name: value.float() for name, value in load_file(weights).items()}
    stored |= {name: stored[same] for name, same in TIED.items()}
    reader.load_state_dict({**{f"encoder.{n}": v for n, v in reader.encoder.state_dict().items()}, **stored})
    return reader.eval()
