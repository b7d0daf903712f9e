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
# # Accelerate a classifier you have
#
# A vision transformer turns an image into tokens, one for each patch, and most of them say the same as their
# neighbours. turbovlm merges those inside the encoder's blocks. Nothing is trained, and the model comes back bit for
# bit.
#
# Here CLIP's image tower names photographs. With a model of `transformers`, `timm`, `torchvision` or `open_clip` the
# calls are the same: in place of `load_clip()` you have `timm.create_model(..., pretrained=True)`.

# %%
import tempfile
from pathlib import Path

import torch

import turbovlm
from turbovlm_lab.demo.photos import load_photos, load_surfaces
from turbovlm_lab.zoo.clip import embed, load_clip, preprocess
from turbovlm_lab.zoo.clip_text import load_clip_text

torch.set_grad_enabled(False)
model = load_clip()
photos = load_photos()[::2]
pixels = preprocess([photo.image for photo in photos])
labels = ["a cat", "an astronaut", "a cup of coffee", "a rocket", "a motorcycle", "a flower", "a building", "a dog"]
names = load_clip_text().names(labels)
len(photos), pixels.shape

# %% [markdown]
# ## Before


# %%
def classify() -> tuple[torch.Tensor, list[str]]:
    """Embeddings of the photographs, and the likeliest label of each."""
    embeddings = torch.cat([embed(model, batch) for batch in pixels.split(7)])
    return embeddings, [labels[i] for i in names.probabilities(embeddings).argmax(dim=1).tolist()]


whole, before = classify()
for photo, label in zip(photos, before):
    print(f"{photo.name:12} {label}")

# %% [markdown]
# ## Merge
#
# `r` is how many tokens are merged in each block, on average; `keep` says how many are left at the end, `flops` what
# share of the multiply-accumulates. Printed, the handle says what will happen, block by block.

# %%
handle = turbovlm.apply(model, flops=0.6, trace=True)
print(handle)

# %% [markdown]
# Your code stays as it is. What changed is little: the labels are the same but for a few, and the embeddings nearly.

# %%
merged, after = classify()
same = sum(a == b for a, b in zip(before, after))
cosine = torch.cosine_similarity(whole, merged)
print(f"{same} of {len(photos)} labels are the same")
print(f"cosine to the unmerged embedding: {cosine.mean():.3f}; the lowest {cosine.min():.3f}")
assert same >= 0.9 * len(photos) and cosine.mean() > 0.97

# %% [markdown]
# ## Look at what merged
#
# With `trace=True` the handle knows where each patch went. Patches that have become one token are drawn in their mean
# colour, behind the first, the second and the last block that merges: areas of one colour become a token each.

# %%
embed(model, pixels[:1])
trace = handle.trace
picture = turbovlm.visualize.groups(trace, photos[0].image, block=(4, 5, 7), cell=12)
assert trace[-1].sizes.sum() == 197  # each token counts the patches that it stands for
picture

# %% [markdown]
# ## Measure
#
# Multiply-accumulates are not time, so time it, on your device and in your batch: the versions run in turn, and the
# table has the median and what lies between the quartiles.

# %%
handle.remove()
print(turbovlm.profile.compare(model, {"pixel_values": pixels[:2]}, turbovlm.TurboConfig(flops=0.6), rounds=3))

# %% [markdown]
# ## Calibrate
#
# The defaults were chosen on photographs. `calibrate` looks for what suits your images, without labels: on half of
# them it compares settings at one cost, on the other half it measures how far the embedding drifts, and says what you
# can expect of others. Give it 64 to 256 images; here are few, and the search is short.

# %%
images = preprocess([photo.image for photo in load_photos() + load_surfaces()])
found = turbovlm.calibrate(model, images, flops=0.6, effort=1)
print(found)

# %% [markdown]
# ## Save, load, remove
#
# The settings are a small file. Applied in a `with`, they end with it.

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "turbo.json")
    found.save(file)
    with turbovlm.apply(model, turbovlm.Calibration.load(file)):
        _, calibrated = classify()
print(sum(a == b for a, b in zip(before, calibrated)), "labels are the same with the calibrated settings")

assert torch.equal(classify()[0], whole)
print("removed: the embeddings are bit for bit what they were")
