"""Every error turbovlm raises on purpose. All are `TurboError`, which is a `ValueError`."""


class TurboError(ValueError):
    """Base class of the errors below."""


class ConfigError(TurboError):
    """A setting is wrong: the message names the field, the value given and what is allowed."""


class UnsupportedModelError(TurboError):
    """Nothing in the model can be accelerated: the message names the blocks found and the reason."""


class StateError(TurboError):
    """A call came at a moment when it means nothing, such as a trace before the first forward."""


class DataError(TurboError):
    """Data to evaluate on are missing or wrong: the message names the file and, where it has lines, the line."""
