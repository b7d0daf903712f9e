"""Small models saved to folders with their processors, laid out as the published ones are."""

from __future__ import annotations

import json

import pytest
import torch

from denoisers import unet
from vlms import CLIP, TEXT, blip, llava, seeded

transformers = pytest.importorskip("transformers")

WORDS = ["<pad>", "</s>", "<s>", "<unk>", "what", "is", "a", "dog", "temple", "flower", "user", "assistant", ":"]
TEMPLATE = (
    "{% for message in messages %}user : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}assistant :"
)


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    names = [*WORDS, *(f"w{i}" for i in range(len(WORDS), 90)), "<image>", *(f"v{i}" for i in range(91, 100))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special, model_max_length=64)
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def saved(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def blip_folder(tmp_path, task):
    model = seeded(lambda: blip(task))
    image_processor = transformers.BlipImageProcessor(size={"height": 48, "width": 48})
    return saved(tmp_path / "blip", model, transformers.BlipProcessor(image_processor, tokenizer()))


def clip_folder(tmp_path):
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    config = transformers.CLIPConfig(vision_config=CLIP, text_config=text, projection_dim=16)
    size = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(**size), tokenizer())
    return saved(tmp_path / "clip", seeded(lambda: transformers.CLIPModel(config)), processor)


def llava_folder(tmp_path):
    size = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**size),
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )
    return saved(tmp_path / "llava", seeded(llava), processor)


def blip2_folder(tmp_path):
    """BLIP-2 with an OPT, whose tokenizer pads behind, as the published one's does."""
    text = {k: v for k, v in TEXT.items() if k in ("vocab_size", "hidden_size", "num_attention_heads", "bos_token_id")}
    opt = transformers.OPTConfig(
        **text, ffn_dim=48, num_hidden_layers=2, word_embed_proj_dim=32, pad_token_id=0, eos_token_id=1
    )
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.Blip2Config(
        vision_config=CLIP,
        qformer_config={**size, "vocab_size": 100, "encoder_hidden_size": 32},
        text_config=opt.to_dict(),
        num_query_tokens=4,
        image_token_index=90,
    )
    image_processor = transformers.BlipImageProcessor(size={"height": 48, "width": 48})
    processor = transformers.Blip2Processor(image_processor, tokenizer(), num_query_tokens=4)
    return saved(tmp_path / "blip2", seeded(lambda: transformers.Blip2ForConditionalGeneration(config)), processor)


def siglip2_folder(tmp_path):
    """SigLIP 2 of any aspect ratio, whose tokenizer does not know how long sentences may be."""
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"} | {"max_position_embeddings": 16}
    vision = {k: v for k, v in CLIP.items() if k != "image_size"} | {"num_patches": 16}
    config = transformers.Siglip2Config(vision_config=vision, text_config=text | {"projection_size": 32})
    words = tokenizer()
    words.model_max_length = 10**30
    image_processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    processor = transformers.Siglip2Processor(image_processor, words)
    return saved(tmp_path / "siglip2", seeded(lambda: transformers.Siglip2Model(config)), processor)


def stable_diffusion_folder(where):
    """A whole Stable Diffusion of 64×64 pixels, saved: tokenizer, CLIP, UNet, VAE and scheduler."""
    diffusers = pytest.importorskip("diffusers")
    letters = list("abcdefghijklmnopqrstuvwxyz,.")
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (where / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (where / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(where / "vocab.json"), str(where / "merges.txt"), model_max_length=16)
    text = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    text.update({"max_position_embeddings": 16, "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1})
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(4,) * 3, norm_num_groups=2, layers_per_block=1, **kinds),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(where / "whole")
    return where / "whole"
