"""Cache of fetched weights: its folder and the state of the files in it.

    <home>/weights/<name>/<file>          verified weights; a file has this name only once it has passed every check
    <home>/weights/<name>/<file>.stamp    its size, time of change and hash, to hash it again only when it changed
    <home>/weights/<name>/<file>.partial  a download that can be resumed
    <home>/pins.json                      hashes recorded at the first download, where upstream publishes none

`home` is $FOVEAL_HOME, or the user's cache folder; pins then live in the user's data folder, because clearing a cache
should not forget what the files ought to be.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from .digest import sha256_of, write_atomic
from .errors import WeightsError
from .load import load
from .manifest import Mirror


def default_cache_dir() -> Path:
    """`$FOVEAL_HOME/weights`, or `weights` in the user's cache folder for foveal."""
    home = os.environ.get("FOVEAL_HOME")
    return (Path(home).expanduser() if home else platformdirs.user_cache_path("foveal", appauthor=False)) / "weights"


def pins_path() -> Path:
    """The user's lock file of recorded hashes: `$FOVEAL_HOME/pins.json`, or `pins.json` in the user's data folder."""
    home = os.environ.get("FOVEAL_HOME")
    return (Path(home).expanduser() if home else platformdirs.user_data_path("foveal", appauthor=False)) / "pins.json"


def cached_path(root: Path, name: str, file: str) -> Path:
    """The place of a file below `root`; raises WeightsError where links lead out of the cache."""
    path = root / name / file
    if not path.resolve().is_relative_to(root.resolve()):
        raise WeightsError(f"{path} leads out of the cache to {path.resolve()}; remove that link")
    return path


@dataclass(frozen=True)
class Check:
    """State of a cached file: `state` is "missing", "verified" or "corrupt", `detail` gives the reason."""

    state: str
    detail: str = ""


def check(path: Path, mirror: Mirror, *, rehash: bool = False) -> Check:
    """Compares a cached file with its expected size and hash; hashes it only if it changed or `rehash` asks for it.

    The expected hash is the manifest's, else the pinned one, else that of the stamp. A file with none of them was put
    there by hand: it is accepted if it reads as weights, and pinned.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return Check("missing")
    except OSError as error:
        raise WeightsError(f"cannot look at the cached file {path}: {error.strerror}; check its permissions") from error
    if mirror.bytes is not None and status.st_size != mirror.bytes:
        return Check("corrupt", f"it has {status.st_size} bytes, expected {mirror.bytes}")
    stamp = _read_json(_stamp_path(path))
    expected = mirror.sha256 or pinned(mirror.location) or stamp.get("sha256")
    unchanged = stamp.get("size") == status.st_size and stamp.get("mtime_ns") == status.st_mtime_ns
    if unchanged and not rehash and expected == stamp.get("sha256"):
        return Check("verified")
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise WeightsError(f"cannot read the cached file {path}: {error.strerror}; check its permissions") from error
    if expected is not None and digest != expected:
        return Check("corrupt", f"its SHA-256 is {digest}, expected {expected}")
    if expected is None:
        try:
            load(path, container=mirror.container)
        except WeightsError as error:
            return Check("corrupt", str(error))
    with contextlib.suppress(OSError):  # a read-only cache serves hits all the same, only slower
        if mirror.sha256 is None:
            pin(mirror.location, digest, status.st_size)
        stamp_file(path, digest)
    return Check("verified")


def stamp_file(path: Path, digest: str) -> None:
    """Remembers that the file as it is now has this hash."""
    status = path.stat()
    stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}
    write_atomic(_stamp_path(path), json.dumps(stamp) + "\n")


def pinned(location: str) -> str | None:
    """The hash recorded for a location, or None."""
    return _read_pins().get(location, {}).get("sha256")


def pinned_commit(location: str) -> str | None:
    """The commit of the hub that a recorded hash belongs to, or None."""
    return _read_pins().get(location, {}).get("commit")


def pin(location: str, digest: str, size: int, commit: str | None = None) -> None:
    """Records the hash of a location that has none yet; never changes a recorded one."""
    path = pins_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        pins = _read_pins()
        if location not in pins:
            today = datetime.now(UTC).date().isoformat()
            known = {"sha256": digest, "bytes": size, "commit": commit, "recorded": today}
            pins[location] = {key: value for key, value in known.items() if value is not None}
            write_atomic(path, json.dumps(pins, indent=2, sort_keys=True) + "\n")


def _read_pins() -> dict[str, Any]:
    """The recorded hashes. Unlike a stamp this is not a hint, so a file that cannot be understood is an error."""
    path = pins_path()
    try:
        pins = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(pins, dict) and all(isinstance(pin, dict) for pin in pins.values())):
            raise ValueError("expected an object of location → {sha256, …}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read the recorded hashes in {path}: {error}; repair or remove that file") from error
    return pins


def _stamp_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.stamp")


def _read_json(path: Path) -> dict[str, Any]:
    """A small hint file; anything unreadable counts as absent."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
