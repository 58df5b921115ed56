"""Errors that are of both kinds: ours, and what the other library raises."""


class OptionError(ValueError, AssertionError):
    """An option out of its range, for which segmentation_models_pytorch raises an AssertionError."""


class ShapeError(ValueError, AssertionError):
    """A target that does not fit the input, for which the other libraries raise an AssertionError."""
