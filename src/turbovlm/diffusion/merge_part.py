"""The forwards of parts of blocks that merge by themselves, and of the blocks that have them.

A part reads merged tokens, and every position gets its token's result back behind it (Turbo, §6.2, equation 14). The
merge is chosen once for a group of blocks, on what its first part reads, and may hold for several steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.config import DenoiseConfig
from turbovlm.diffusion.attend import attend_merged
from turbovlm.diffusion.choose import Site, choice_of
from turbovlm.diffusion.families import Part
from turbovlm.diffusion.positions import beside_text, split_text
from turbovlm.diffusion.restore import check_has_operator, is_linear, restore_linear
from turbovlm.diffusion.run import RUN, THREAD, Run, check_class, current_run, run_within
from turbovlm.diffusion.whole import reason_to_leave_whole
from turbovlm.ops.merging import Merge
from turbovlm.patching import Patch


def parts_forward(patch: Patch, block: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a block, also where gradient checkpointing runs it once more in the backward pass, after its denoiser.

    The first time, its hidden states get the run as an attribute, by which the second time finds it.
    """
    check_class(patch, block)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return original(*args, **kwargs)
    hidden = args[0] if args else kwargs["hidden_states"]
    run = THREAD.run
    if run is not None and run.feature is patch.feature:
        setattr(hidden, RUN, run)
        return original(*args, **kwargs)
    first = getattr(hidden, RUN, None)
    return original(*args, **kwargs) if first is None else run_within(first, original, *args, **kwargs)


def part_forward(patch: Patch, module: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run one part of a block on merged tokens, and give every position its token's result."""
    check_class(patch, module)
    site: Site = patch.detail
    part = site.part
    x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
    run = current_run(patch)
    text, mask, *_ = (*rest, None, None)
    text, mask = kwargs.get("encoder_hidden_states", text), kwargs.get("attention_mask", mask)
    run.whole[site.name] = reason_to_leave_whole(patch, module, text, mask, kwargs)
    merge = None if run.whole[site.name] else choice_of(run, site, module, x, text, kwargs).merge
    if merge is None:
        return original(x, *rest, **kwargs)
    image, words = split_text(x, merge.weights.shape[1], part.text)
    merged = merge.merge(image, path=run.path)
    read = beside_text(x, words, merged, part.text)
    config = run.feature.config
    for cut in part.cuts:
        if cut.name in kwargs:
            kwargs[cut.name] = run.cut(site.key, merge, cut, kwargs[cut.name], {})
    if part.attending is not None and part.attending.keys_apart and config.queries_only:
        out = original(read, *rest, **{**kwargs, "encoder_hidden_states": x})
    elif part.attending is not None and config.proportional:
        biases = run.biases_of(site.key, merge, read.dtype)
        out = attend_merged(part.attending, module, original, run.path, biases, read, rest, kwargs)
    else:
        out = original(read, *rest, **kwargs)
    if isinstance(out, Tensor):
        return _restored(run, site, merge, image, merged, out)
    return tuple(
        _restored(run, site, merge, image, merged, each) if i in part.restored else each for i, each in enumerate(out)
    )


def _is_smooth(part: Part, config: DenoiseConfig) -> bool:
    """Whether restoring linearly is worth what it costs.

    It is behind feed-forwards, and behind attention of which queries alone merge. Behind other
    attention it would cost much of what merging saves, and behind one layer what the layer does.
    """
    return not part.one_layer and (part.component == "ffn" or (part.component == "attention" and config.queries_only))


def _restored(run: Run, site: Site, merge: Merge, image: Tensor, merged: Tensor, out: Tensor) -> Tensor:
    """Every position with its token's result; the text's tokens as they are."""
    found, words = split_text(out, merge.sizes.shape[1], site.part.text)
    if _is_smooth(site.part, run.feature.config) and is_linear(run.feature.config, image):
        check_has_operator(run.feature.config, site.name)
        restored = restore_linear(merge, image, merged, found, run.path)
    else:
        restored = merge.unmerge(found)
    return beside_text(out, words, restored, site.part.text)
