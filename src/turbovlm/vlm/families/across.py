"""Language models that read visual tokens by cross-attention: no prompt has placeholders for them."""

from __future__ import annotations

from turbovlm.vlm.families.family import VlmFamily, library

BLIP = VlmFamily(
    "BLIP",
    library(
        "blip",
        *(f"BlipFor{task}" for task in ("ConditionalGeneration", "QuestionAnswering", "ImageTextRetrieval")),
    ),
    "vision_model",
    cross_attention=True,
    cross_attends="text_encoder|text_decoder",
    cross_layers="text_encoder.encoder.layer|text_decoder.bert.encoder.layer",
)
BLIP_2 = VlmFamily(
    "BLIP-2",
    library("blip_2", *(f"Blip2{name}" for name in ("Model", "ForConditionalGeneration", "ForImageTextRetrieval"))),
    "vision_model",
    cross_attention=True,
    cross_attends="qformer",
)
INSTRUCT_BLIP = VlmFamily(
    "InstructBLIP",
    library("instructblip", *(f"InstructBlip{name}" for name in ("Model", "ForConditionalGeneration"))),
    "vision_model",
    cross_attention=True,
    cross_attends="qformer",
)
VISION_ENCODER_DECODER = VlmFamily(
    "VisionEncoderDecoderModel",
    library("vision_encoder_decoder", "VisionEncoderDecoderModel"),
    "encoder",
    cross_attention=True,
    cross_attends="decoder",
    between=("enc_to_dec_proj",),
)

FAMILIES = (BLIP, BLIP_2, INSTRUCT_BLIP, VISION_ENCODER_DECODER)
