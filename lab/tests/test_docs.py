"""The snippets of docs/families.md run as they stand, on small models; docs/evidence.md shows what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import turbovlm
from families import SPECTROGRAM, WAVE, WHISPER
from more_vlms import MORE
from test_joint import inputs as vilt_inputs
from test_joint import make as vilt
from test_models import conversation, minigpt, nlvr2, pairs
from vlms import CLIP, TEXT, VLMS, blip, blip2, noise, seeded, vision_encoder_decoder

transformers = pytest.importorskip("transformers")
PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)

IMAGE = noise(0, 1, 3, 48, 48)
WORDS = {"pixel_values": IMAGE, "input_ids": torch.tensor([[2, 5, 6, 7]])}
QUERIES = {"pixel_values": IMAGE, "input_ids": torch.tensor([[90] * 4 + [2, 5]])}


def clip():
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=CLIP, text_config=text, projection_dim=16))


def sentence_encoder():
    size = {k: v for k, v in TEXT.items() if k in ("vocab_size", "hidden_size", "intermediate_size")}
    return transformers.BertModel(transformers.BertConfig(**size, num_hidden_layers=4, num_attention_heads=4))


def sound(name, config, settings):
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**settings))


def whisper():
    model = sound("WhisperForConditionalGeneration", "WhisperConfig", WHISPER)()
    model.generation_config.lang_to_id, model.generation_config.max_length = {"<|en|>": 5}, 20
    model.generation_config.is_multilingual, model.generation_config.no_timestamps_token_id = True, 58
    model.generation_config.task_to_id = {"transcribe": 6}
    return model


def prompt(name):
    family = (VLMS | MORE)[name]
    return family.make, family.inputs([5, "image", 6, 7])


MODELS = {
    "llava-hf/llava-1.5-7b-hf": prompt("llava"),
    "Qwen/Qwen2.5-VL-7B-Instruct": prompt("qwen2_5_vl"),
    "OpenGVLab/InternVL3-8B-hf": prompt("internvl"),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": prompt("smolvlm"),
    "google/paligemma2-3b-mix-448": prompt("paligemma"),
    "google/gemma-3-4b-it": prompt("gemma3"),
    "zai-org/GLM-4.1V-9B-Thinking": prompt("glm4v"),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": prompt("mistral3"),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": prompt("llama4"),
    "google/gemma-3n-E2B-it": prompt("gemma3n"),
    "Salesforce/blip-image-captioning-base": (lambda: blip("ConditionalGeneration"), WORDS),
    "Salesforce/blip-vqa-base": (lambda: blip("QuestionAnswering"), WORDS),
    "Salesforce/blip-itm-base-coco": (lambda: blip("ImageTextRetrieval"), WORDS),
    "Salesforce/blip2-opt-2.7b": (blip2, QUERIES),
    "dandelin/vilt-b32-finetuned-vqa": (vilt, vilt_inputs()),
    "openai/clip-vit-large-patch14-336": (clip, {"pixel_values": IMAGE}),
    "nlpconnect/vit-gpt2-image-captioning": (vision_encoder_decoder, {"pixel_values": IMAGE}),
    "openai/whisper-base": (whisper, {"input_features": noise(0, 1, 8, 80)}),
    "facebook/wav2vec2-base-960h": (
        sound("Wav2Vec2ForCTC", "Wav2Vec2Config", WAVE),
        {"input_values": noise(0, 1, 9000)},
    ),
    "MIT/ast-finetuned-audioset-10-10-0.4593": (
        sound("ASTForAudioClassification", "ASTConfig", SPECTROGRAM),
        {"input_values": noise(0, 1, 72, 32)},
    ),
    "sentence-transformers/all-MiniLM-L6-v2": (sentence_encoder, {"input_ids": torch.arange(30).unsqueeze(0)}),
    "meta-llama/Llama-2-7b-chat-hf": (lambda: minigpt().language_model, {}),
}
RESULTS = ("answer", "caption", "match", "similarity", "scores", "features", "tokens")
ASKED = re.compile(r'(\w+)\.from_pretrained\(\s*"([^"]+)",?\s*\)')


class Named:
    """A class of `transformers` whose `from_pretrained` makes a small model."""

    @staticmethod
    def from_pretrained(name):
        return seeded(MODELS[name][0])


class Processor:
    """A processor whose `from_pretrained` gives a small model's inputs, and words for what it generates."""

    def __init__(self, name):
        self.inputs = MODELS[name][1]

    @classmethod
    def from_pretrained(cls, name):
        return cls(name)

    def apply_chat_template(self, chat, *, add_generation_prompt, tokenize, return_dict, return_tensors):
        assert [part["type"] for part in chat[0]["content"]] == ["image", "text"]
        return self.inputs

    def batch_decode(self, sequences, skip_special_tokens):
        return [" ".join(map(str, sequence)) for sequence in sequences.tolist()]


def test_every_family_has_a_snippet_and_every_model_is_asked_for():
    assert {name for snippet in SNIPPETS for _, name in ASKED.findall(snippet)} == set(MODELS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: "-".join(name for _, name in ASKED.findall(snippet)))
def test_snippet_runs(snippet, monkeypatch):
    from turbovlm_lab import models

    monkeypatch.setattr(models.BlipForNLVR2, "from_checkpoint", lambda path: nlvr2())
    monkeypatch.setattr(models.MiniGPTv2, "from_checkpoint", lambda path, eva, llama: minigpt())
    names = {"turbovlm": turbovlm}
    for cls, name in ASKED.findall(snippet):
        assert hasattr(transformers, cls)
        small = Processor if cls == "AutoProcessor" else Named
        if "from transformers import" in snippet:
            monkeypatch.setattr(f"transformers.{cls}", small)
        names |= {cls: small, "inputs": MODELS[name][1]}
    if "BlipForNLVR2" in snippet:
        names["pairs"], names["input_ids"] = pairs()
        names["attention_mask"] = torch.ones_like(names["input_ids"])
    if "MiniGPTv2" in snippet:
        names["images"], names["input_ids"], _ = conversation()
    with torch.no_grad():
        exec(snippet, names)
    results = [names[name] for name in RESULTS if name in names]
    values = [value if isinstance(value, torch.Tensor) else value.pooler_output for value in results]
    assert values and all(value.isfinite().all() for value in values)
    model = next(value for value in names.values() if isinstance(value, torch.nn.Module))
    assert "with turbovlm" in snippet or turbovlm.get_handle(model).active


MEASURED = ("reproduce/report", "clip_tasks", "seeds", "speech", "cross_attention", "choices")


def test_the_evidence_is_what_was_measured():
    root = Path(__file__).parents[2]
    results = root / "benchmarks" / "results"
    report = [row for name in MEASURED for row in (results / f"{name}.md").open()]
    rows = [line for line in (root / "docs" / "evidence.md").open() if line.startswith("|")]
    assert len(rows) > 5 and not [row for row in rows if row not in report]
