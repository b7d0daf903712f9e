"""The ViT-S/14 of turbovlm_lab.zoo with weights in 4 bits by GPTQ, as benchmarks/compression.py measures it.

    pip install llmcompressor                  # in an environment of its own: it asks for older transformers
    python studies/photos/prepare.py           # 256 photographs, fetched
    python studies/compression/quantise.py     # a few minutes; writes studies/compression/data/model.safetensors

Every linear layer, in groups of 128 weights, symmetric, calibrated on the half of the photographs that nothing is
measured on. `--quick` takes the demo's images. The format is compressed-tensors' (pack-quantized).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import BitImageProcessor, Dinov2Model

from turbovlm_lab.zoo import load_saliency_vit

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from compressed import CHECKPOINT, photographs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="calibrate on 14 images of the demo")
    given, _ = photographs(parser.parse_args().quick)
    with tempfile.TemporaryDirectory() as folder:  # llmcompressor reads the config of a saved model, twice
        load_saliency_vit().backbone.save_pretrained(folder)
        model = Dinov2Model.from_pretrained(folder)
        oneshot(
            model=model,
            processor=BitImageProcessor(),
            dataset=DataLoader([{"pixel_values": photograph} for photograph in given], batch_size=4),
            recipe=[GPTQModifier(targets="Linear", scheme="W4A16")],
            pipeline="basic",
            num_calibration_samples=len(given),
        )
        model.save_pretrained(CHECKPOINT, save_compressed=True)
    print(CHECKPOINT)


if __name__ == "__main__":
    main()
