"""More small denoisers of images, whose blocks merge whole, with inputs for 8×12 tokens and more."""

from __future__ import annotations

from typing import Any

import torch

from denoisers import Denoiser, flux_inputs, noise, words

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16}
DEPTH = {"num_layers": 2, "num_single_layers": 3}
JOINT = {**SIZE, "joint_attention_dim": 32}
AXES = {"axes_dims_rope": (4, 4, 8)}


def made(name: str, **settings: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**settings)


def sequence(batch: int, rows: int, columns: int) -> dict[str, Any]:
    """What denoisers like FLUX are given."""
    given = flux_inputs(batch, rows, columns)
    del given["pooled_projections"]
    return given


def latent(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(0, batch, 4, rows, columns),
        "encoder_hidden_states": words(batch),
        "timestep": torch.full((batch,), 500.0),
    }


def padded(batch: int) -> torch.Tensor:
    """A mask of the words, of which the last are padding."""
    return torch.arange(7).expand(batch, -1) < 5


def qwen(**settings: Any) -> Any:
    size = {**JOINT, **AXES, "in_channels": 16, "out_channels": 4, "num_layers": 3}
    return made("QwenImageTransformer2DModel", **{**size, **settings})


def qwen_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    rows, columns = rows // 2, columns // 2
    return {
        "hidden_states": noise(0, batch, rows * columns, 16),
        "encoder_hidden_states": words(batch),
        "encoder_hidden_states_mask": padded(batch),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, rows, columns)]] * batch,
    }


def qwen21() -> Any:
    size = {**SIZE, "in_channels": 16, "out_channels": 16, "num_layers": 3, "context_in_dim": 32}
    return made("QwenImage21Transformer2DModel", **size, axes_dims_rope=(4, 4, 8))


def qwen21_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    """With an image of 4×4 tokens as a reference, for which there are four among the seven words."""
    rows, columns = rows // 2, columns // 2
    slots = (torch.arange(7) > 0) & (torch.arange(7) < 5)
    places = torch.cat((slots, torch.ones(rows * columns // 4, dtype=torch.bool)))
    return {
        "hidden_states": noise(0, batch, 16 + rows * columns, 16),
        "encoder_hidden_states": words(batch),
        "encoder_hidden_states_mask": padded(batch),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, 4, 4), (1, rows, columns)]] * batch,
        "img_mask": places.expand(batch, -1),
    }


def hidream() -> Any:
    size = {**SIZE, "num_layers": 2, "num_single_layers": 3, "in_channels": 4, "patch_size": 2}
    size |= {"num_routed_experts": 2, "num_activated_experts": 1, "text_emb_dim": 32, "axes_dims_rope": (8, 4, 4)}
    text = {"caption_channels": [32, 32], "llama_layers": [0, 1, 2, 1, 0]}
    return made("HiDreamImageTransformer2DModel", **size, **text, max_resolution=(32, 32))


def hidream_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    """Square, as it fills up others."""
    side = max(rows, columns)
    return {
        "hidden_states": noise(0, batch, 4, side, side),
        "timesteps": torch.full((batch,), 500.0),
        "encoder_hidden_states_t5": words(batch),
        "encoder_hidden_states_llama3": noise(2, 3, batch, 5, 32),
        "pooled_embeds": noise(3, batch, 32),
    }


def bria() -> Any:
    return made("BriaTransformer2DModel", **JOINT, **DEPTH, **AXES, in_channels=16)


def flux2() -> Any:
    size = {**JOINT, **DEPTH, "in_channels": 16, "timestep_guidance_channels": 16, "guidance_embeds": False}
    return made("Flux2Transformer2DModel", **size, axes_dims_rope=(4, 4, 4, 4))


def flux2_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    given = sequence(batch, rows, columns)
    places = torch.nn.functional.pad(given["img_ids"], (0, 1)).expand(batch, -1, -1)
    return {**given, "img_ids": places, "txt_ids": torch.zeros(batch, 7, 4)}


def chroma() -> Any:
    size = {**JOINT, **DEPTH, **AXES, "in_channels": 16}
    approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1}
    return made("ChromaTransformer2DModel", **size, **approximator)


def chroma_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    given = sequence(batch, rows, columns)
    image = torch.ones(batch, rows * columns // 4, dtype=torch.bool)
    return {**given, "attention_mask": torch.cat((padded(batch), image), dim=1)}


def longcat() -> Any:
    size = {**JOINT, **DEPTH, **AXES, "in_channels": 16, "pooled_projection_dim": 32}
    return made("LongCatImageTransformer2DModel", **size)


def ovis() -> Any:
    return made("OvisImageTransformer2DModel", **JOINT, **DEPTH, **AXES, in_channels=16, out_channels=16)


def hunyuan(patch: tuple[int, ...] = (2, 2), axes: tuple[int, ...] = (8, 8)) -> Any:
    size = {**SIZE, **DEPTH, "in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "text_embed_dim": 32}
    return made("HunyuanImageTransformer2DModel", **size, patch_size=patch, rope_axes_dim=axes)


def refiner() -> Any:
    return hunyuan((1, 1, 1), (4, 4, 8))


def hunyuan_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {**latent(batch, rows, columns), "encoder_attention_mask": padded(batch)}


def refiner_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    given = hunyuan_inputs(batch, rows, columns)
    return {**given, "hidden_states": noise(0, batch, 4, 2, rows // 2, columns // 2)}


def cogview(name: str, **settings: Any) -> Any:
    size = {**SIZE, "in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": 32, "time_embed_dim": 32}
    return made(name, **size, condition_dim=8, **settings)


def cogview_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    sizes = {"target_size": torch.full((batch, 2), 16.0), "crop_coords": torch.zeros(batch, 2)}
    return {**latent(batch, rows, columns), **sizes, "original_size": torch.full((batch, 2), 16.0)}


def cogview4_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {**cogview_inputs(batch, rows, columns), "attention_mask": padded(batch)}


def glm_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    given = cogview_inputs(batch, rows, columns)
    del given["original_size"]
    prior = torch.arange(batch * rows * columns // 4).view(batch, -1) % 16
    return {**given, "prior_token_id": prior, "prior_token_drop": torch.zeros(prior.shape, dtype=torch.bool)}


def auraflow() -> Any:
    size = {**JOINT, "num_mmdit_layers": 2, "num_single_dit_layers": 3, "caption_projection_dim": 32}
    return made("AuraFlowTransformer2DModel", **size, pos_embed_max_size=256)


def lumina2() -> Any:
    size = {"hidden_size": 32, "num_layers": 3, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8}
    axes = {"axes_dim_rope": (4, 4, 8), "axes_lens": (32, 32, 32)}
    return made("Lumina2Transformer2DModel", **size, **axes, in_channels=4, cap_feat_dim=32)


def lumina2_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {**latent(batch, rows, columns), "encoder_attention_mask": torch.ones(batch, 7, dtype=torch.int)}


def kandinsky5() -> Any:
    size = {"in_text_dim": 32, "in_text_dim2": 32, "time_dim": 32, "model_dim": 32, "ff_dim": 64}
    size |= {"num_text_blocks": 1, "num_visual_blocks": 3}
    return made("Kandinsky5Transformer3DModel", **size, axes_dims=(4, 4, 8))


def kandinsky5_inputs(batch: int, rows: int, columns: int, frames: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": noise(0, batch, frames, rows, columns, 4),
        "encoder_hidden_states": words(batch),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": noise(2, batch, 32),
        "visual_rope_pos": [torch.arange(frames), torch.arange(rows // 2), torch.arange(columns // 2)],
        "text_rope_pos": torch.arange(7),
    }


def kandinsky5_video_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return kandinsky5_inputs(batch, rows, columns, frames=3)


def prx() -> Any:
    size = {"in_channels": 4, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 3}
    return made("PRXTransformer2DModel", **size, axes_dim=[8, 8])


def prx_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {**latent(batch, rows, columns), "timestep": torch.full((batch,), 0.5), "attention_mask": padded(batch)}


def krea2() -> Any:
    text = {"text_hidden_dim": 32, "num_text_layers": 2, "text_num_attention_heads": 2}
    text |= {"text_num_key_value_heads": 2, "text_intermediate_size": 64}
    size = {**SIZE, "in_channels": 16, "num_layers": 3, "num_key_value_heads": 1, "intermediate_size": 64}
    return made("Krea2Transformer2DModel", **size, **text, **AXES, timestep_embed_dim=16)


def krea2_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    given = sequence(batch, rows, columns)
    places = torch.cat((given.pop("txt_ids"), given.pop("img_ids")))
    texts = {"encoder_hidden_states": noise(1, batch, 7, 2, 32), "encoder_attention_mask": padded(batch)}
    return {**given, **texts, "position_ids": places}


def z_image() -> Any:
    size = {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    return made("ZImageTransformer2DModel", **size, cap_feat_dim=32, axes_dims=[4, 4, 8], axes_lens=[128, 32, 32])


def z_image_inputs(batch: int, rows: int, columns: int) -> dict[str, Any]:
    """One image more row than the others have, so that there are tokens of padding behind its own; words differ."""
    captions = [noise(1 + i, 7 + 30 * i, 32) for i in range(batch)]
    latents = list(noise(0, batch, 4, 1, rows + 2, columns))
    return {"x": latents, "t": torch.full((batch,), 0.5), "cap_feats": captions}


IMAGE_DENOISERS = {
    "qwen": Denoiser(qwen, qwen_inputs),
    "qwen 2.1": Denoiser(qwen21, qwen21_inputs),
    "flux2": Denoiser(flux2, flux2_inputs),
    "chroma": Denoiser(chroma, chroma_inputs),
    "longcat": Denoiser(longcat, sequence),
    "ovis": Denoiser(ovis, sequence),
    "bria": Denoiser(bria, sequence),
    "hunyuan": Denoiser(hunyuan, hunyuan_inputs),
    "hunyuan refiner": Denoiser(refiner, refiner_inputs),
    "hidream": Denoiser(hidream, hidream_inputs),
    "cogview4": Denoiser(lambda: cogview("CogView4Transformer2DModel", rope_axes_dim=(32, 32)), cogview4_inputs),
    "cogview3": Denoiser(lambda: cogview("CogView3PlusTransformer2DModel", pos_embed_max_size=16), cogview_inputs),
    "glm": Denoiser(
        lambda: cogview("GlmImageTransformer2DModel", prior_vq_quantizer_codebook_size=16),
        glm_inputs,
    ),
    "auraflow": Denoiser(auraflow, latent),
    "lumina2": Denoiser(lumina2, lumina2_inputs),
    "kandinsky5": Denoiser(kandinsky5, kandinsky5_inputs),
    "kandinsky5 video": Denoiser(kandinsky5, kandinsky5_video_inputs),
    "prx": Denoiser(prx, prx_inputs),
    "krea2": Denoiser(krea2, krea2_inputs),
    "z-image": Denoiser(z_image, z_image_inputs),
}
