"""The paper's own models, and the scene reader, as families of `turbovlm` whose towers hand on fewer tokens."""

from turbovlm.vlm.families import VlmFamily

FAMILIES = (
    VlmFamily(
        "BLIP for NLVR2",
        ("turbovlm_lab.models.blip_nlvr2.BlipForNLVR2",),
        "vision_model",
        cross_attention=True,
        cross_attends="layers",
    ),
    VlmFamily(
        "scene reader",
        ("turbovlm_lab.zoo.reader.SceneReader",),
        "encoder",
        cross_attention=True,
        cross_attends="decoder",
        between=("connector",),
    ),
    VlmFamily("MiniGPT-v2", ("turbovlm_lab.models.minigpt_v2.MiniGPTv2",), "vision_model", cross_attention=True),
)
