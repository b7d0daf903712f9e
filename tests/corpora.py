"""Small corpora of drawn images, and small models saved as folders, for tests of `turbovlm embed`."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

WORDS = ("<pad>", "<eos>", "<unk>", "a", "photo", "of", "cat", "dog", "red", "blue")
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 4}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": len(WORDS), "max_position_embeddings": 32}
SMALL = {"shortest_edge": 32}, {"height": 32, "width": 32}


def drawn(index: int) -> bytes:
    """A JPEG of a few coloured fields, of a size of its own; of the same index the same."""
    generator = np.random.default_rng(index)
    width, height = (int(side) for side in generator.integers(24, 80, 2))
    fields = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(fields).resize((width, height)).save(out, "JPEG", quality=85)
    return out.getvalue()


def in_folder(folder: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    """Images as files, every third in a folder of its own; those of `bad` are no images."""
    (folder / "sub").mkdir(parents=True)
    for index in range(count):
        name = f"sub/{index:04d}.jpg" if index % 3 == 0 else f"{index:04d}.jpg"
        (folder / name).write_bytes(b"no image" if index in bad else drawn(index))
    return folder


def in_tar(path: Path, indices: range) -> Path:
    """Images in a tar file, as WebDataset has them, a text beside each."""
    with tarfile.open(path, "w") as tar:
        for index in indices:
            for suffix, content in (("jpg", drawn(index)), ("txt", b"a red cat")):
                member = tarfile.TarInfo(f"{index:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def in_parquet(path: Path, indices: range, group: int = 8, struct: bool = True) -> Path:
    """Images in a Parquet file as `datasets` writes them, or as bytes with a column of names."""
    import pyarrow
    from pyarrow import parquet

    contents = [drawn(index) for index in indices]
    names = [f"{index:04d}.jpg" for index in indices]
    held: list[Any] = [{"bytes": each, "path": name} for each, name in zip(contents, names)] if struct else contents
    table = pyarrow.table({"image": held, "title": [f"drawing {name}" for name in names], "views": range(len(names))})
    parquet.write_table(table, path, row_group_size=group)
    return path


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=16
    )


def save_clip(folder: Path) -> str:
    """A small CLIP with its processor."""
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**TEXT, "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0},
        vision_config=VISION,
        projection_dim=24,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size=SMALL[0], crop_size=SMALL[1])
    transformers.CLIPProcessor(images, _tokenizer()).save_pretrained(folder)
    return str(folder)


def save_classifier(folder: Path) -> str:
    """A small ViT that knows three classes."""
    import transformers

    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "house"}
    config = transformers.ViTConfig(**VISION, id2label=names, label2id={name: place for place, name in names.items()})
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size=SMALL[1]).save_pretrained(folder)
    return str(folder)


def save_dino(folder: Path) -> str:
    """A small DINOv2, whose processor leaves images of many sizes."""
    import transformers

    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**VISION)).save_pretrained(folder)
    transformers.BitImageProcessor(size=SMALL[0], do_center_crop=False).save_pretrained(folder)
    return str(folder)


def save_captioner(folder: Path) -> str:
    """A small BLIP that writes captions."""
    import transformers

    torch.manual_seed(0)
    special = {"bos_token_id": 3, "eos_token_id": 1, "sep_token_id": 1, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config={**TEXT, "encoder_hidden_size": 64, **special}, vision_config=VISION, projection_dim=24
    )
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.BlipImageProcessor(size=SMALL[1])
    transformers.BlipProcessor(images, _tokenizer()).save_pretrained(folder)
    return str(folder)
