"""Development only: lets a CUDA build of torchvision import beside a CPU build of torch.

torchvision's compiled library then does not load, and its import fails on two operators that nothing here calls.
Declaring them is enough. Where the two builds match, nothing is done.
"""

import importlib.abc
import importlib.metadata
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            self._declare()
        return

    def _declare(self):
        import torch

        if torch.version.cuda is not None or "+cpu" in importlib.metadata.version("torchvision"):
            return
        self.library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_keep"] = self.library


sys.meta_path.insert(0, _DeclareOperators())
