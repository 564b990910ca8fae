"""The exception of this package."""


class WeightsError(RuntimeError):
    """Weights could not be found, fetched, verified or read.

    The message says what failed, for which URL or file, what was expected and what to do about it.
    """


class Unavailable(WeightsError):
    """A source did not deliver (unreachable, 404, too many failed attempts); another mirror still may."""
