"""Exceptions of other people's code as ours, with the file that they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def reason(error: BaseException) -> str:
    """The first line of an exception's message; without errno and path where the system says why, without a message
    the name of its class."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def about(key: str, path: str | Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turns an exception of the `kinds` inside into a ValueError that names the file and gives its reason.

    Args:
        key: what the file is to the user, such as `ckpt_path` or `data.captions`.
        path: of the file.
        kinds: what the code inside raises for a file that is damaged, unreadable or of another kind.
    """
    try:
        yield
    except kinds as error:
        raise ValueError(f"{key}={str(path)!r} cannot be read: {reason(error)}") from error
