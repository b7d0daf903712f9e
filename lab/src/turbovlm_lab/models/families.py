"""The paper's own models as families of `turbovlm`, whose image tokens are read by cross-attention."""

from turbovlm.vlm.families import VlmFamily

FAMILIES = (
    VlmFamily("BLIP for NLVR2", ("turbovlm_lab.models.blip_nlvr2.BlipForNLVR2",), "vision_model", cross_attention=True),
    VlmFamily("MiniGPT-v2", ("turbovlm_lab.models.minigpt_v2.MiniGPTv2",), "vision_model", cross_attention=True),
)
