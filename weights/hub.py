"""Getting one file from the Hugging Face hub, through its own client (tokens, mirrors and its cache work as usual)."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .errors import Unavailable, WeightsError
from .manifest import Mirror
from .transfer import NO_SPACE, Transfer, check_url


@dataclass(frozen=True)
class HubFile:
    """A downloaded file, its commit, and the SHA-256 that the hub states for it, if any."""

    path: Path
    commit: str | None
    sha256: str | None


def download_from_hub(mirror: Mirror, scratch: Path, *, commit: str | None, transfer: Transfer, bar: bool) -> HubFile:
    """Downloads below `scratch`, at the mirror's commit, else at `commit`, else at what "main" is now.

    The client resumes and checks the length but does not hash what it downloaded; the caller does. `bar` lets it show
    its progress bar.

    Raises:
        Unavailable: the hub does not deliver.
        WeightsError: its address, or where it sends us, is not https, or the disk is full.
    """
    repo, _, named = str(mirror.hub).partition("@")
    endpoint = transfer.hub_endpoint or constants.ENDPOINT
    check_url(endpoint, transfer)
    try:
        address = hf_hub_url(repo, mirror.file, revision=named or commit, endpoint=endpoint)
        metadata = get_hf_file_metadata(address, timeout=transfer.timeout, endpoint=endpoint)
        check_url(urljoin(address, metadata.location), transfer)
        revision = named or commit or metadata.commit_hash  # so that hash and file belong together
        with contextlib.nullcontext() if bar else _without_bars():
            path = hf_hub_download(repo, mirror.file, revision=revision, local_dir=scratch, endpoint=endpoint)
    except WeightsError:
        raise
    except Exception as error:  # the client's own, and those of whichever HTTP library its version uses
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            shutil.rmtree(scratch, ignore_errors=True)
            raise WeightsError(
                f"could not fetch {mirror.location}: no space left in {scratch}; free some, or set FOVEAL_HOME or pass "
                "cache_dir= to a larger disk"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unavailable(f"could not fetch {mirror.location}: {reason}") from error
    # Large files are stored under their SHA-256, which the hub sends as their ETag; small ones under a git hash.
    etag = metadata.etag or ""
    return HubFile(Path(path), revision, etag if re.fullmatch("[0-9a-f]{64}", etag) else None)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """The client's bars can only be switched for the whole process."""
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def find_in_hub_cache(mirror: Mirror, *, commit: str | None) -> Path | None:
    """The file in the hub client's own cache (another program may have fetched it), or None."""
    repo, _, named = str(mirror.hub).partition("@")
    found = try_to_load_from_cache(repo, mirror.file, revision=named or commit)
    return Path(found) if isinstance(found, str) else None
