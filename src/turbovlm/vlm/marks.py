"""Attributes that turbovlm puts on objects of other libraries, so that what it knows of them travels with them.

Here are all of those that belong to what a language model reads; an encoder's own, on the hidden states from block to
block, are in `turbovlm.encoder.state`.
"""

ATTENTION = "_turbovlm_attention"
"""On what `get_image_features` and `get_video_features` return: A of every visual token, a list with one tensor
`[tokens]` for each entry of `pooler_output`."""

CACHED_PROMPTS = "_turbovlm_prompts"
"""On a cache of keys and values: the `CachedPrompts` that it holds."""

ENCODED = "_turbovlm_encoded"
"""On a prompt's embeddings, whose placeholders are not filled yet: what is to stand there, as `mm_encoder_outputs`."""

GRIDS = "_turbovlm_grids"
"""On what `get_image_features` and `get_video_features` return, where the call says it: frames, rows and columns of
patches, 0 where it does not; a list with one tensor `[tokens, 3]`, of equal rows, for each entry of
`pooler_output`."""

STANDING = "_turbovlm_standing"
"""On what `get_image_features` and `get_video_features` return, with `pixel_tolerance`: for each visual token the one
of its image that stands for it, itself where it stays; a list with one tensor `[tokens]` for each entry of
`pooler_output`."""

IMAGE = "_turbovlm_image"
"""On the words' hidden states between two cross-attention layers, and on the image tokens that a layer gets: the
`Image` to be read."""

IMAGE_SIZES = "_turbovlm_image_sizes"
"""On a cache of cross-attention: a dict with the sizes of the image tokens that each layer's keys stand for."""
