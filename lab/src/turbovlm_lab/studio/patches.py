"""What the page needs to draw which patches have become one token, block by block, as JSON."""

from __future__ import annotations

import base64
import io
import json
import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from turbovlm_lab.studio.subjects import View

if TYPE_CHECKING:
    from PIL.Image import Image

    from turbovlm.encoder.state import BlockTrace


def payload(view: View | None) -> dict[str, Any]:
    """The drawing's data; empty where there is nothing to draw.

    Per block: `source`, for every patch its token behind the block; `before`, its token in front of the block; `sizes`
    of the tokens behind; `r`, `a`, `e` of the tokens in front, None where there is no such value.
    """
    if view is None:
        return {}
    rows, columns = view.grid
    blocks, before = [], list(range(rows * columns))
    for trace in view.traces:
        entry = _block(trace, before, rows * columns)
        before = entry["source"]
        blocks.append(entry)
    return {
        "image": data_uri(view.image),
        "rows": rows,
        "columns": columns,
        "unit": view.unit,
        "colors": _colors(view.image, rows, columns),
        "blocks": blocks,
    }


def as_json(values: Any) -> str:
    """JSON that no HTML parser takes for a tag."""
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


def data_uri(image: Image, *, sharp: bool = False) -> str:
    """The image inside an address: PNG where it has sharp edges, else JPEG."""
    buffer = io.BytesIO()
    if sharp:
        image.save(buffer, "PNG")
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=88)
    return f"data:image/{'png' if sharp else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _block(trace: BlockTrace, before: list[int], count: int) -> dict[str, Any]:
    """Numbers of tokens count from the first patch: what never merges is left out, and patches that are not drawn."""
    patches = slice(trace.prefix, trace.prefix + count)
    source = (trace.source[0, patches] - trace.prefix).tolist()
    end = trace.sizes.shape[1] - trace.suffix
    values = {
        name: _rounded(found[0, trace.prefix : found.shape[1] - trace.suffix])
        for name, found in (("r", trace.redundancy), ("a", trace.semantic), ("e", trace.degree))
    }
    sizes = [round(size) for size in trace.sizes[0, trace.prefix : end].tolist()]
    return {"block": trace.block, "source": source, "before": before, "sizes": sizes, **values}


def _rounded(values: Tensor) -> list[float | None]:
    return [None if not math.isfinite(value) else float(f"{value:.4g}") for value in values.tolist()]


def _colors(image: Image, rows: int, columns: int) -> list[list[int]]:
    """The mean colour of each patch."""
    from PIL.Image import Resampling

    small = image.convert("RGB").resize((columns, rows), Resampling.BOX)
    found = small.tobytes()
    return [list(found[place : place + 3]) for place in range(0, len(found), 3)]
