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
# # Image generation on fewer tokens
#
# A denoiser has to give every position of the image back, so its tokens are merged before a run of its blocks and
# restored behind it. The pipeline is a `StableDiffusionPipeline` whose denoiser is small and was trained on emoji: its
# shapes are rough, with and without merging. With Stable Diffusion, SDXL, FLUX or Qwen-Image the calls are the same.

# %%
import torch
from PIL import Image

import turbovlm
from turbovlm_lab.zoo.emoji import load_emoji_pipeline

pipe = load_emoji_pipeline()
pipe.set_progress_bar_config(disable=True)
prompts = [
    "red apple, noto, on white",
    "penguin, noto, on a photo",
    "hamburger, noto, on white",
    "frog, noto, on a photo",
]


def make(steps: int = 12) -> list[Image.Image]:
    """An image of each prompt, from the same noise every time."""
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, num_inference_steps=steps, guidance_scale=3.0, generator=seeds).images


def row(images: list[Image.Image], side: int = 128) -> Image.Image:
    """Images beside each other."""
    sheet = Image.new("RGB", (side * len(images), side))
    for i, image in enumerate(images):
        sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (side * i, 0))
    return sheet


whole = make()
row(whole)

# %% [markdown]
# ## Keep half of the tokens
#
# Printed, the handle says which blocks merge together and how many tokens they read.

# %%
handle = turbovlm.apply(pipe, keep=0.5)
half = make()
print(handle)
row(half)

# %% [markdown]
# ## How much is right
#
# Each row is a `keep`: 1.0, 0.7, 0.5, 0.3. What is drawn stays; what drifts first is its detail. `drift` is the
# mean difference of pixels, of 255.

# %%
handle.remove()


def difference(a: list[Image.Image], b: list[Image.Image]) -> float:
    """The mean difference of pixels."""
    both = [
        torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).float() for i in x]) for x in (a, b)
    ]
    return float((both[0] - both[1]).abs().mean())


rows, drift = [row(whole)], {}
for keep in (0.7, 0.5, 0.3):
    with turbovlm.apply(pipe, keep=keep):
        made = make()
    drift[keep] = difference(whole, made)
    rows.append(row(made))
    print(f"keep={keep}: drift {drift[keep]:.1f}")
assert drift[0.7] < drift[0.5] < drift[0.3]
sheet = Image.new("RGB", (rows[0].width, rows[0].height * len(rows)))
for i, each in enumerate(rows):
    sheet.paste(each, (0, i * rows[0].height))
sheet

# %% [markdown]
# ## Over the steps
#
# The first steps decide what is where, and take merging well; the last ones draw detail. A mapping from progress to
# `keep` follows that: half of the tokens up to 60 % of the steps, and all behind.

# %%
with turbovlm.apply(pipe, keep={0: 0.5, 0.6: 1.0}):
    early = make()
print(f"merged in the first 60 % of the steps: drift {difference(whole, early):.1f}, in all: {drift[0.5]:.1f}")
assert difference(whole, early) < drift[0.5]
row(early)

# %% [markdown]
# ## What it costs
#
# Multiply-accumulates of the denoiser at this size of image, and time on this machine. This one reads 1,024 tokens at
# most, so there is not much to save, and time can go either way; what is saved grows with the image, as self-attention
# becomes most of the work.

# %%
unet = pipe.unet
latent, words = torch.randn(2, 12, 32, 32), torch.randn(2, 16, 384)
inputs = {"sample": latent, "timestep": torch.tensor(500), "encoder_hidden_states": words}
print(
    turbovlm.profile.compare(
        unet, inputs, {"keep=0.7": turbovlm.DenoiseConfig(0.7), "keep=0.5": turbovlm.DenoiseConfig(0.5)}, rounds=3
    )
)
for side in (32, 64, 96):
    given = inputs | {"sample": torch.randn(1, 12, side, side), "encoder_hidden_states": words[:1]}
    before = turbovlm.profile.macs(unet, **given)
    with turbovlm.apply(unet, keep=0.5):
        share = turbovlm.profile.macs(unet, **given) / before
    print(f"{2 * side}×{2 * side} pixels: {share:.0%} of the multiply-accumulates at keep=0.5")
assert share < 0.8

# %% [markdown]
# ## Remove

# %%
assert all(a.tobytes() == b.tobytes() for a, b in zip(make(), whole))
print("the images are bit for bit what they were")
