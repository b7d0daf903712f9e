"""Whether data can be used, before hours are spent on them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from turbovlm.errors import DataError
from turbovlm_lab.evaluate.data import Data, LazyImage, Sample

THREADS = 8
INSIDE = 128
"""From which grey on a mask holds a pixel: half of the brightest."""


def check(data: Data, on_progress: Callable[[int], object] = lambda done: None) -> tuple[Data, list[str]]:
    """Decodes every image, once, and mask. A mask of nothing or of everything is wrong too: nothing compares with it.

    Args:
        data: from a reader.
        on_progress: given 1 for every sample and every real image.

    Returns:
        The data without what cannot be used, and what is wrong, a line each, what the reader left out first.
    """
    images = {image.name: image for sample in data.samples for image in sample.images}
    with contextlib.ExitStack() as ending:
        threads = ThreadPoolExecutor(THREADS)
        ending.callback(threads.shutdown, cancel_futures=True)  # at Ctrl-C the rest need not be decoded
        wrong = {name: threads.submit(_wrong_image, image) for name, image in images.items()}
        masks = threads.map(_wrong_mask, (sample.mask for sample in data.samples))

        def reason(sample: Sample, mask: str) -> str:
            first = next(filter(None, (*(wrong[image.name].result() for image in sample.images), mask)), "")
            return first and f"{sample.id}: {first}"

        reasons = list(_counted(map(reason, data.samples, masks), on_progress))
        wrong_real = list(_counted(threads.map(_wrong_image, data.real), on_progress))
    samples = tuple(sample for sample, reason in zip(data.samples, reasons) if not reason)
    real = tuple(image for image, reason in zip(data.real, wrong_real) if not reason)
    bad = [*data.left_out, *filter(None, reasons), *filter(None, wrong_real)]
    return dataclasses.replace(data, samples=samples, real=real), bad


def _counted(reasons: Iterable[str], on_progress: Callable[[int], object]) -> Iterable[str]:
    for reason in reasons:
        on_progress(1)
        yield reason


def _wrong_image(image: LazyImage) -> str:
    try:
        image.open()
    except DataError as error:
        return str(error)
    return ""


def _wrong_mask(mask: LazyImage | None) -> str:
    if mask is None:
        return ""
    try:
        darkest, brightest = mask.open("L").getextrema()
    except DataError as error:
        return str(error)
    if brightest < INSIDE or darkest >= INSIDE:
        return f"{mask.name}: the mask is {'everywhere' if darkest >= INSIDE else 'empty'}"
    return ""
