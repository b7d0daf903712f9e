"""Encoders that turbovlm knows, as data. A new family is a new `Layout` in one of these files' `LAYOUTS`."""

from turbovlm.encoder.families import audio, mha, multimodal, packed, text, timm, transformers, variants

FAMILIES = (
    *transformers.LAYOUTS,
    *multimodal.LAYOUTS,
    *packed.LAYOUTS,
    *variants.LAYOUTS,
    *timm.LAYOUTS,
    *mha.LAYOUTS,
    *text.LAYOUTS,
    *audio.LAYOUTS,
)
