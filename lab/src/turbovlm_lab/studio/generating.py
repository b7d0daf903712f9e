"""Subjects that write or draw: a reader of scenes, a pipeline that draws emoji, and Whisper."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import turbovlm
from turbovlm.config import Config, TurboConfig
from turbovlm.encoder.state import BlockTrace
from turbovlm.errors import ConfigError
from turbovlm.sharing import share_weights, twin
from turbovlm_lab.studio.measuring import Times, counted, drift_of, timed_in_turn
from turbovlm_lab.studio.subjects import (
    ENCODER_SETTINGS,
    IMAGE,
    RECORDING,
    WORDS,
    Answer,
    Loaded,
    Outcome,
    Photo,
    Sample,
    Subject,
    View,
    packages,
)
from turbovlm_lab.studio.uploads import spectrogram
from turbovlm_lab.zoo import minilm, saliency, whisper

KEPT = 8
"""Samples of which the unmerged result is kept."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What is looked at beside the answer.

    Attributes:
        tokens: of the sequence before the first block and after each.
        output: what drift is measured on; None where it is not.
        view: to draw what was merged, of a merged model.
    """

    tokens: tuple[int, ...]
    output: Tensor | None = None
    view: View | None = None


@dataclass(frozen=True, eq=False)
class Generating(Loaded):
    """A model that writes or draws, with its weights.

    Attributes:
        twin: a copy of it that shares its weights, to merge in.
        make: runs a model as it is now on a sample; fields of `Answer`.
        look: looks at a sample again; the handle is that of a traced model, or None of an unmerged one.
        measured: what `make` runs; `counted`: where the tokens are that are counted; `notes`: see `Outcome`.
    """

    model: Any
    twin: Any
    depth: int
    make: Callable[[Any, Sample], Mapping[str, Any]]
    look: Callable[[Any, Sample, turbovlm.Handle | None], Seen]
    measured: str
    counted: str
    notes: tuple[str, ...]
    wholes: OrderedDict[tuple[Any, ...], tuple[Mapping[str, Any], float, Seen]] = field(default_factory=OrderedDict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @torch.inference_mode()
    def run(self, sample: Sample, configs: Sequence[Config]) -> Outcome:
        answer, gmacs, seen = self._whole(sample)
        with turbovlm.apply(self.twin, *configs) as handle:
            merged, merged_gmacs = counted(lambda: self.make(self.twin, sample))
            said = repr(handle)
            traces = any(isinstance(each, TurboConfig) for each in configs)
            looked = None if traces else self.look(self.twin, sample, handle)
        if looked is None:
            traced = [each.changed(trace=True) if isinstance(each, TurboConfig) else each for each in configs]
            with turbovlm.apply(self.twin, *traced) as handle:
                looked = self.look(self.twin, sample, handle)
        together = seen.output is not None and looked.output is not None
        return Outcome(
            unmerged=Answer(gmacs, seen.tokens, **answer),
            merged=Answer(merged_gmacs, looked.tokens, **merged),
            measured=self.measured,
            time=lambda: self._time(sample, configs),
            said=said,
            drift=drift_of(looked.output, seen.output) if together else None,  # type: ignore[arg-type]
            view=looked.view,
            counted=self.counted,
            notes=self.notes,
        )

    @torch.inference_mode()
    def _time(self, sample: Sample, configs: Sequence[Config]) -> list[Times]:
        with turbovlm.apply(self.twin, *configs):
            self.make(self.twin, sample)  # the first forward plans
            return timed_in_turn([lambda: self.make(self.model, sample), lambda: self.make(self.twin, sample)], (2, 5))

    def _whole(self, sample: Sample) -> tuple[Mapping[str, Any], float, Seen]:
        key = (sample.key, sample.words, sample.steps)
        if key not in self.wholes:
            answer, gmacs = counted(lambda: self.make(self.model, sample))
            self.wholes[key] = answer, gmacs, self.look(self.model, sample, None)
            while len(self.wholes) > KEPT:
                self.wholes.popitem(last=False)
        return self.wholes[key]


def _traced_tokens(handle: turbovlm.Handle) -> tuple[int, ...]:
    traces = handle.trace
    return traces[0].source.shape[1], *(trace.sizes.shape[1] for trace in traces)


def _load_reader() -> Generating:
    from turbovlm_lab.zoo.reader import BLOCKS, CAPTION, QUESTION, load_scene_reader

    reader = load_scene_reader()

    def pixels(sample: Sample) -> Tensor:
        if sample.image is None:
            raise ConfigError("image: choose one, or upload one")
        found: Tensor = reader.eyes.preprocess([sample.image])
        return found

    def make(model: Any, sample: Sample) -> Mapping[str, Any]:
        question = " ".join(sample.words.lower().replace("?", " ?").replace(",", " ,").split())
        beginning = f"{QUESTION} {question} [answer]" if question else CAPTION
        tokens = model.look(pixels(sample))
        try:
            return {"text": model.write(tokens, [beginning])[0]}
        except ConfigError as error:
            raise ConfigError(f"question: {error}; leave it empty for a caption") from error

    def look(model: Any, sample: Sample, handle: turbovlm.Handle | None) -> Seen:
        if handle is not None and "visual_keep" in handle.configs[0].amount:
            read = model.look(pixels(sample)).shape[1]
            return Seen((read,), view=_read_view(sample, handle))
        output = model.encoder(pixel_values=pixels(sample)).last_hidden_state
        if handle is None:
            return Seen((output.shape[1],), output)
        assert sample.image is not None
        shown = saliency.centre_square(sample.image).resize((saliency.IMAGE_SIZE, saliency.IMAGE_SIZE))
        side = saliency.IMAGE_SIZE // saliency.PATCH_SIZE
        return Seen(_traced_tokens(handle), handle.restore(output), View(shown, (side, side), tuple(handle.trace)))

    notes = ("It knows about 300 words: things, colours, numbers and places in scenes like the built-in ones.",)
    measured = "the whole: the encoder, and the decoder that writes"
    return Generating(reader, twin(reader), BLOCKS, make, look, measured, "that the words attend to", notes)


def _read_view(sample: Sample, handle: turbovlm.Handle) -> View:
    """What a language model reads of an image, as a block that merges without R, A and E."""
    selection = handle.visual[0].of_image(0)
    side = saliency.IMAGE_SIZE // saliency.PATCH_SIZE
    destination = selection.destination
    front = destination.shape[1] - side * side
    sizes = torch.bincount(destination[0], minlength=selection.kept.shape[1])[None].float()
    nothing = torch.full((1, side * side), torch.nan)
    trace = BlockTrace("what is read", 0, 0, 0, destination[:, front:], sizes, nothing, nothing, nothing)
    assert sample.image is not None
    shown = saliency.centre_square(sample.image).resize((saliency.IMAGE_SIZE, saliency.IMAGE_SIZE))
    return View(shown, (side, side), (trace,))


def _scenes() -> list[Photo]:
    from turbovlm_lab.evaluate.builtin_data import captioning_data

    samples = captioning_data(6).samples
    return [Photo(f"scene-{i}", f"scene {i}", sample.images[0].open()) for i, sample in enumerate(samples)]


def _load_emoji() -> Generating:
    from turbovlm_lab.zoo.emoji import load_emoji_pipeline

    pipe: Any = load_emoji_pipeline()
    pipe.set_progress_bar_config(disable=True)
    drawn: dict[str, Tensor] = {}

    def make(model: Any, sample: Sample) -> Mapping[str, Any]:
        from PIL import Image
        from PIL.Image import Resampling

        prompt = " ".join(sample.words.split())
        if not prompt:
            raise ConfigError("prompt: say what to draw, as in: red apple, noto, on white")
        made = model(
            prompt,
            num_inference_steps=sample.steps,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        drawn["last"] = made
        pixels = (made[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        return {"picture": Image.fromarray(pixels).resize((256, 256), Resampling.NEAREST)}

    def look(model: Any, sample: Sample, handle: turbovlm.Handle | None) -> Seen:
        """Of the picture that was made just before."""
        last = None if handle is None else handle.features[0].last
        tokens = 1024 if last is None else min(each.left for each in last.values() if each.tokens == 1024)
        return Seen((tokens,), drawn["last"] - 0.5)

    notes = ("Pictures of 64×64 pixels, from the same noise. Drift is that of the pixels.",)
    where = "in the blocks of highest resolution"
    return Generating(pipe, share_weights(pipe), 7, make, look, "the whole pipeline, all steps", where, notes)


def _spoken() -> list[Photo]:
    waves = {name: whisper.read_spoken(name) for name in whisper.SPOKEN}
    return [
        Photo(name, whisper.SPOKEN[name], spectrogram(wave), whisper.SPOKEN_BY, wave) for name, wave in waves.items()
    ]


def _load_whisper() -> Generating:
    loaded = whisper.load_whisper()

    def wave(sample: Sample) -> Tensor:
        if sample.wave is None:
            raise ConfigError("recording: drop a WAV file of speech in English, of up to 30 seconds")
        return sample.wave

    def make(model: Any, sample: Sample) -> Mapping[str, Any]:
        return {"text": replace(loaded, model=model).transcribe([wave(sample)], max_new_tokens=120)[0]}

    def look(model: Any, sample: Sample, handle: turbovlm.Handle | None) -> Seen:
        output = model.model.encoder(loaded.features([wave(sample)])).last_hidden_state
        if handle is None:
            return Seen((output.shape[1],), output)
        assert sample.image is not None
        frames = min(max(round(50 * len(wave(sample)) / whisper.SAMPLING_RATE), 1), output.shape[1])
        view = View(sample.image, (1, frames), tuple(handle.trace), "frame")
        return Seen(_traced_tokens(handle), handle.restore(output), view)

    notes = ("Whisper always hears 30 seconds: of a short recording most tokens are silence.",)
    measured = "the whole: the encoder, and the decoder that writes"
    where = "behind the encoder's last block"
    return Generating(loaded.model, twin(loaded.model), 6, make, look, measured, where, notes)


READER = Subject(
    key="scenes",
    title="Scene reader · captions and answers",
    about="A small model that looks through ten blocks of a ViT-S/14 and says what stands where.",
    takes=IMAGE,
    load=_load_reader,
    words="A question; empty for a caption",
    amounts={"keep": 0.5, "flops": 0.6, "r": 12.0, "visual_keep": 0.5},
    needs=packages(saliency.FILE),
    photos=_scenes,
)
EMOJI = Subject(
    key="emoji",
    title="Emoji pipeline · draws",
    about="A small Stable Diffusion: what there is, a style (noto, twemoji, fluent), and on white or on a photo.",
    takes=WORDS,
    load=_load_emoji,
    words="Prompt",
    default_words="red apple, noto, on a photo",
    amounts={"keep": 0.5},
    settings=("alpha", "degree"),
    steps=8,
    denoises=True,
    needs=packages(minilm.FILE),
)
WHISPER = Subject(
    key="whisper",
    title="Whisper base · writes down speech",
    about="OpenAI's Whisper. Choose a sentence, or drop a WAV file of up to 30 seconds, in English.",
    takes=RECORDING,
    load=_load_whisper,
    amounts={"keep": 0.5, "flops": 0.7, "r": 100.0},
    settings=ENCODER_SETTINGS,
    needs=packages(*whisper.PARTS),
    photos=_spoken,
)
BUILT_IN = (READER, EMOJI, WHISPER)
