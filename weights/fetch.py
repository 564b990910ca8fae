"""From a name to a verified local file."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from .cache import cached_path, check, default_cache_dir, pin, pinned, pinned_commit, pins_path, stamp_file
from .digest import sha256_of
from .errors import Unavailable, WeightsError
from .hub import download_from_hub, find_in_hub_cache
from .load import load
from .manifest import Manifest, Mirror, bundled_manifest, lookup
from .progress import reporter
from .transfer import Progress, Transfer, cannot_write, discard, download

_logger = logging.getLogger(__name__)
BY_HAND = "if a browser gets the file, give its path: create_model(..., pretrained_cfg_overlay=dict(file=PATH))"


def fetch(
    name: str,
    *,
    format: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    offline: bool | None = None,
    progress: bool | Progress = True,
    manifest: Manifest | None = None,
    transfer: Transfer = Transfer(),  # noqa: B008 - frozen
) -> Path:
    """Returns the path of a local file with these weights, downloading it if need be.

    What is returned has the expected size and SHA-256 and reads as tensors only; see `docs/weights.md` for what is
    checked when. Mirrors are tried in the manifest's order: one that does not answer gives way to the next, one that
    answers something else than expected is an error. Processes that fetch the same name wait for one another.

    Args:
        name: `architecture.tag`, e.g. "natten_dinat_s.shi_in1k".
        format: only mirrors of this format ("official", "transformers"). None: any.
        cache_dir: where to keep files. None: `$FOVEAL_HOME/weights`, or the user's cache folder.
        offline: use nothing but what is cached. None: as FOVEAL_OFFLINE or HF_HUB_OFFLINE says.
        progress: True for a bar on a terminal, False for none, or a function of bytes done and total (or None).
        manifest: other entries than the bundled ones.
        transfer: timeouts, attempts and the like.

    Raises:
        WeightsError: unknown name, nothing delivers, wrong size or hash, not weights, offline and not cached, no space.
    """
    manifest = bundled_manifest() if manifest is None else manifest
    entry = lookup(name, manifest)
    mirrors = [mirror for mirror in entry.mirrors if format in (None, mirror.format)]
    if not mirrors:
        there = sorted({mirror.format for mirror in entry.mirrors})
        raise WeightsError(f"{name} has no file of format {format!r}; expected one of {there}")
    if mirrors[0].package is not None:
        return _packaged(mirrors[0], manifest.folder)
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser().absolute()
    hit, corrupt = _find(root, name, mirrors)
    if hit is not None:
        return hit
    if _is_offline() if offline is None else offline:
        return _from_hub_cache(root, name, mirrors, corrupt)
    with _locked(root, name):
        hit, corrupt = _find(root, name, mirrors)  # another process may have been faster
        if hit is not None:
            return hit
        for path, reason in corrupt.items():
            _logger.warning("the cached file %s is damaged: %s; fetching it again", path, reason)
        path = _from_mirrors(root, name, mirrors, transfer=transfer, progress=progress)
        for damaged in corrupt.keys() - {path}:
            damaged.unlink(missing_ok=True)
    return path


def _find(root: Path, name: str, mirrors: list[Mirror]) -> tuple[Path | None, dict[Path, str]]:
    """The first verified file in the cache, else the damaged ones and what is wrong with them."""
    corrupt = {}
    for mirror in mirrors:
        path = cached_path(root, name, mirror.file)
        found = check(path, mirror)
        if found.state == "verified":
            return path, {}
        if found.state == "corrupt":
            corrupt[path] = found.detail
    return None, corrupt


def _from_mirrors(
    root: Path, name: str, mirrors: list[Mirror], *, transfer: Transfer, progress: bool | Progress
) -> Path:
    failures = []
    for mirror in mirrors:
        path = cached_path(root, name, mirror.file)
        try:
            if mirror.hub is not None:
                _fetch_from_hub(mirror, path, transfer=transfer, progress=progress)
            else:
                with reporter(progress, name) as report:
                    _fetch_from_url(mirror, path, transfer=transfer, report=report)
            return path
        except Unavailable as error:
            _logger.info("%s", error)
            failures.append(str(error))
    raise WeightsError(f"no source delivers {name}: {' | '.join(failures)}; {BY_HAND}") from None


def _fetch_from_url(mirror: Mirror, path: Path, *, transfer: Transfer, report: Progress) -> None:
    url, partial = str(mirror.url), path.with_name(f"{path.name}.partial")
    expected = _expected(mirror)

    def receive() -> bool:
        return download(
            url, partial, size=mirror.bytes, hash_known=expected is not None, transfer=transfer, progress=report
        )

    if receive() and expected is not None and sha256_of(partial) != expected:
        discard(partial)  # the interrupted download was of another file
        receive()
    try:
        _admit(partial, path, mirror, expected)
    except WeightsError:
        discard(partial)
        raise
    discard(partial)


def _fetch_from_hub(mirror: Mirror, path: Path, *, transfer: Transfer, progress: bool | Progress) -> None:
    scratch, commit = path.parent / ".hub", pinned_commit(mirror.location)
    found = download_from_hub(mirror, scratch, commit=commit, transfer=transfer, bar=progress is True)
    try:
        _admit(found.path, path, mirror, _expected(mirror) or found.sha256, commit=found.commit)
        if callable(progress):  # the client has only its own bar; tell at least the end
            progress(path.stat().st_size, path.stat().st_size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _admit(candidate: Path, path: Path, mirror: Mirror, expected: str | None, *, commit: str | None = None) -> None:
    """Gives a finished download its name, once size, hash and content are as they should be."""
    size = candidate.stat().st_size
    if mirror.bytes is not None and size != mirror.bytes:
        raise WeightsError(f"{mirror.location} has {size} bytes, expected {mirror.bytes}; nothing was kept")
    digest = sha256_of(candidate)
    if expected is not None and digest != expected:
        raise WeightsError(
            f"{mirror.location} has SHA-256 {digest}, expected {expected}{_whose(mirror)}; nothing was kept"
        )
    try:
        load(candidate, container=mirror.container, suffix=path.suffix)
    except WeightsError as error:
        raise WeightsError(f"{mirror.location} does not give weights; nothing was kept: {error}; {BY_HAND}") from error
    try:
        if mirror.sha256 is None:
            pin(mirror.location, digest, size, commit)
        os.replace(candidate, path)
    except OSError as error:
        raise cannot_write(error, candidate, mirror.location) from error
    with contextlib.suppress(OSError):  # without a stamp the file is hashed again at its next use
        stamp_file(path, digest)


def _expected(mirror: Mirror) -> str | None:
    return mirror.sha256 or pinned(mirror.location)


def _whose(mirror: Mirror) -> str:
    if mirror.sha256 is not None or pinned(mirror.location) is None:
        return ""
    return f" as recorded at the first download; if upstream changed it on purpose, remove it from {pins_path()}"


def _from_hub_cache(root: Path, name: str, mirrors: list[Mirror], corrupt: dict[Path, str]) -> Path:
    """Offline, and not in our cache: the hub client's own cache may still have it."""
    for mirror in mirrors:
        commit = pinned_commit(mirror.location)
        found = find_in_hub_cache(mirror, commit=commit) if mirror.hub is not None else None
        if found is not None:
            with _locked(root, name):
                path = cached_path(root, name, mirror.file)
                copy = path.with_name(f"{path.name}.partial")
                try:
                    shutil.copyfile(found, copy)
                    _admit(copy, path, mirror, _expected(mirror))
                except OSError as error:
                    raise cannot_write(error, copy, mirror.location) from error
                finally:
                    discard(copy)
            return path
    damaged = "".join(f"; {path} is damaged: {reason}" for path, reason in corrupt.items())
    where = ", ".join(mirror.location for mirror in mirrors)
    raise WeightsError(
        f"{name} is not in the cache {root} and offline mode is on (FOVEAL_OFFLINE, HF_HUB_OFFLINE or offline=True)"
        f"{damaged}; go online once, or put the file from {where} at {root / name / mirrors[0].file}"
    )


def _packaged(mirror: Mirror, folder: Path) -> Path:
    path = folder / mirror.file
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise WeightsError(f"cannot read the packaged file {path} ({error.strerror}); install foveal again") from error
    if digest != mirror.sha256:
        raise WeightsError(f"{path} has SHA-256 {digest}, expected {mirror.sha256}; install foveal again")
    return path


@contextlib.contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """One process at a time for each name."""
    folder = root / name
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise WeightsError(
            f"{name} has to be fetched, but {folder} cannot be written ({error.strerror}); set FOVEAL_HOME or pass "
            "cache_dir= to a folder that can be"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _is_offline() -> bool:
    return any(
        os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE") for key in ("FOVEAL_OFFLINE", "HF_HUB_OFFLINE")
    )
