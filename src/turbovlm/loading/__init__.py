"""Models by name, for the command line, for calibration and for evaluation: the only place that loads any.

`spec` says what a name means and turns a library's failures into a `TurboError`; `models` builds encoders from their
config or with weights; `processors` adds what turns images into a model's input; `pipelines` builds image generation.
"""

from turbovlm.loading.spec import AddedModel, ModelSpec, library_errors, running

__all__ = ["AddedModel", "ModelSpec", "library_errors", "running"]
