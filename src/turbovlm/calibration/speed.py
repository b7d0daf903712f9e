"""How much faster a setting makes what is measured, on this device."""

from __future__ import annotations

import torch

from turbovlm.apply import apply
from turbovlm.calibration.drift import Subject
from turbovlm.calibration.handing import some_of
from turbovlm.config import TurboConfig
from turbovlm.profile.compare import twin
from turbovlm.profile.comparison import ratios
from turbovlm.profile.timing import interleaved

ROUNDS, WARMUP = 7, 1


def speedup_of(subject: Subject, config: TurboConfig) -> float:
    """The median over interleaved rounds of one batch."""
    inputs = some_of(subject.inputs, range(min(subject.batch, subject.count)))
    plain, merged = twin(subject.model), twin(subject.model)
    apply(merged, config)

    def forward(model: torch.nn.Module) -> object:
        with torch.inference_mode():
            return subject.measure(model, inputs)

    device = next(subject.model.parameters()).device
    clock, _ = interleaved([lambda: forward(plain), lambda: forward(merged)], device, ROUNDS, WARMUP, lambda _: None)
    return ratios(clock[0], clock[1]).median
