import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# on CPUs with tiles (AMX), PyTorch 2.13 reads memory it never wrote in small bfloat16 products: plain models give NaN
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """What takes minutes comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("timeout", "slow")])
