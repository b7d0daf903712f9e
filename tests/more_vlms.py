"""Small models of the families beside those of `vlms`, whose mechanisms are those families'."""

from __future__ import annotations

from packed_vlms import PACKED_VLMS
from projected_vlms import PROJECTED_VLMS

MORE = {**PACKED_VLMS, **PROJECTED_VLMS}
