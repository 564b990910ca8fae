"""Downloading one file over https: resumed, retried where that can help, and complete when it returns.

Nothing here knows what the file should be; `fetch.py` checks size and hash before the file gets its name.
"""

import contextlib
import errno
import http.client
import ipaddress
import json
import os
import random
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .errors import Unavailable, WeightsError

Progress = Callable[[int, int | None], None]

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
TRANSIENT_ERRNO = frozenset(
    {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ETIMEDOUT, errno.EPIPE}
)
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
CHUNK = 1 << 18
LONGEST_WAIT = 60.0
MOST_BYTES = 1 << 36  # for a file of unknown size: 64 GiB
_COUNT = "[0-9]{1,18}"


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Options of requests to servers.

    Args:
        timeout: seconds without an answer or a byte before an attempt counts as failed.
        attempts: tries in a row that bring nothing (1 MiB or the rest of the file resets the count).
        backoff: seconds before the second attempt; doubles with each, with jitter, to 60 at most.
        loopback_http: allow plain http to this machine (127.0.0.0/8, ::1, localhost). For test servers only.
        hub_endpoint: base URL of the Hugging Face hub; None for its own default.
    """

    timeout: float = 30.0
    attempts: int = 5
    backoff: float = 0.5
    loopback_http: bool = False
    hub_endpoint: str | None = None


def check_url(url: str, transfer: Transfer) -> None:
    """Raises WeightsError unless the URL is https, or http to this machine with the opt-in."""
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and transfer.loopback_http and _is_loopback(parts.hostname)):
        return
    raise WeightsError(f"refused to fetch {url}: expected https, got {parts.scheme}; nothing was downloaded from there")


def download(
    url: str, partial: Path, *, size: int | None, hash_known: bool, transfer: Transfer, progress: Progress
) -> bool:
    """Makes `partial` the complete content of `url`; returns whether it continued an earlier, interrupted download.

    An interrupted download is continued if the server's validator (ETag or date) still holds, or, where the server
    gives none, if a known hash will tell. `size` is the expected number of bytes, or None.

    Raises:
        Unavailable: the server does not deliver: a permanent refusal such as 404, or too many failed attempts.
        WeightsError: not https, another length than `size`, or the file cannot be written (disk full: the partial
            file is removed).
    """
    check_url(url, transfer)
    opener = urllib.request.build_opener(_HttpsRedirects(transfer))
    resumed = _resume_offset(partial, url, hash_known) > 0
    failures = reached = 0
    while True:
        start = _resume_offset(partial, url, hash_known)
        if start and start == _read_note(partial).get("total"):
            return resumed
        try:
            _receive(opener, url, partial, start=start, size=size, transfer=transfer, progress=progress)
            return resumed
        except _TransientError as error:
            # Only bytes never had before count, else a server that cuts and cannot resume would be asked for ever.
            before, reached = max(reached, start), max(reached, _length(partial))
            failures = 1 if reached - before >= 1 << 20 else failures + 1
            if failures >= transfer.attempts:
                raise Unavailable(
                    f"could not fetch {url}: {error} ({failures} failed attempts in a row); check the connection and "
                    "try again"
                ) from error
            time.sleep(_wait(failures, error.retry_after, transfer))


def cannot_write(error: OSError, path: Path, url: str) -> WeightsError:
    """The exception for a local write error; removes the unfinished file where the disk is full."""
    if error.errno not in NO_SPACE:
        return WeightsError(
            f"could not fetch {url}: cannot write {path} ({error.strerror}); set FOVEAL_HOME or pass cache_dir= to a "
            "folder that can be written"
        )
    discard(path)
    return WeightsError(
        f"could not fetch {url}: no space left to write {path} ({error.strerror}); free some, or set FOVEAL_HOME or "
        "pass cache_dir= to a larger disk; the unfinished file was removed"
    )


def discard(partial: Path) -> None:
    """Removes an unfinished download."""
    for path in (partial, _note_path(partial)):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


class _TransientError(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, reason: str, retry_after: float = 0.0):
        super().__init__(reason)
        self.retry_after = retry_after


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, transfer: Transfer):
        self.transfer = transfer

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        try:
            check_url(newurl, self.transfer)
        except WeightsError as error:
            raise WeightsError(f"could not fetch {req.full_url}: it redirects to another place; {error}") from None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _receive(
    opener: urllib.request.OpenerDirector,
    url: str,
    partial: Path,
    *,
    start: int,
    size: int | None,
    transfer: Transfer,
    progress: Progress,
) -> None:
    """One attempt: asks for the rest from `start`, appends what comes, and checks that it is all."""
    with _open(opener, url, partial, start, transfer) as response:
        if response.status == 206:
            total = _continued_total(response, partial, start)
        else:
            start, total = 0, _content_length(response)
        if size is not None and total is not None and total != size:
            discard(partial)
            raise WeightsError(
                f"could not fetch {url}: the server offers {total} bytes, expected {size}; the file was replaced "
                "upstream or the address answers something else; nothing was kept"
            )
        _check_space(url, partial, (total or size or 0) - start)
        limit = total if total is not None else size if size is not None else MOST_BYTES
        done = _copy(response, url, partial, start=start, total=total, limit=limit, progress=progress)
    if total is not None and done < total:
        raise _TransientError(f"the connection closed after {done} of {total} bytes")
    if size is not None and done != size:
        discard(partial)
        raise WeightsError(f"could not fetch {url}: it has {done} bytes, expected {size}; nothing was kept")


def _open(
    opener: urllib.request.OpenerDirector, url: str, partial: Path, start: int, transfer: Transfer
) -> http.client.HTTPResponse:
    headers = {"User-Agent": "foveal", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        validator = _read_note(partial).get("validator")
        headers |= {"If-Range": validator} if validator else {}
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=transfer.timeout)
    except urllib.error.HTTPError as error:
        with error:
            raise _status_error(error, url, partial, start) from error
    except urllib.error.URLError as error:
        raise _network_error(error.reason, url) from error
    except (http.client.HTTPException, OSError) as error:
        raise _network_error(error, url) from error
    if response.status not in (200, 206) or response.headers.get("Content-Encoding", "identity") != "identity":
        encoding = response.headers.get("Content-Encoding")
        response.close()
        raise Unavailable(
            f"could not fetch {url}: status {response.status}, encoding {encoding}; expected a plain file"
        )
    return response


def _status_error(error: urllib.error.HTTPError, url: str, partial: Path, start: int) -> Exception:
    if error.code == 416 and start:  # what is here is no beginning of what is there
        discard(partial)
        return _TransientError("the server cannot continue the interrupted download, starting over")
    if error.code in TRANSIENT_STATUS:
        return _TransientError(f"the server answers {error.code} {error.reason}", _retry_after(error.headers))
    return Unavailable(
        f"could not fetch {url}: the server answers {error.code} {error.reason}; it may have moved or need a login"
    )


def _network_error(reason: object, url: str) -> Exception:
    """Timeouts, broken connections and a resolver that says "try again" may pass; a wrong name or certificate not."""
    if isinstance(reason, ssl.SSLCertVerificationError):
        return Unavailable(f"could not fetch {url}: its certificate is not valid ({reason.verify_message})")
    if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
        return Unavailable(f"could not fetch {url}: unknown host ({reason.strerror}); is this machine online?")
    transient = (TimeoutError, ConnectionError, http.client.HTTPException, socket.gaierror, ssl.SSLError)
    if isinstance(reason, transient) or getattr(reason, "errno", None) in TRANSIENT_ERRNO:
        return _TransientError(str(reason) or type(reason).__name__)
    return Unavailable(f"could not fetch {url}: {reason}")


def _continued_total(response: http.client.HTTPResponse, partial: Path, start: int) -> int | None:
    """Size of the whole file, from an answer that continues exactly where the partial file ends."""
    found = re.fullmatch(rf"bytes ({_COUNT})-{_COUNT}/({_COUNT}|\*)", response.headers.get("Content-Range", "").strip())
    then, now = _read_note(partial).get("validator"), _validator(response)
    if found is None or int(found[1]) != start or (then and now and then != now):
        discard(partial)
        raise _TransientError("the server continues another file than the one begun, starting over")
    return None if found[2] == "*" else int(found[2])


def _copy(response, url: str, partial: Path, *, start: int, total: int | None, limit: int, progress: Progress) -> int:
    mode = os.O_APPEND if start else os.O_TRUNC
    flags = os.O_WRONLY | os.O_CREAT | mode | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    done = start
    try:
        if not start:
            discard(partial)
            _write_note(partial, {"url": url, "validator": _validator(response), "total": total})
        with open(os.open(partial, flags, 0o644), "wb") as file:
            progress(done, total)
            while chunk := _read(response, url):
                done += len(chunk)
                if done > limit:
                    break
                file.write(chunk)
                progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # only local ones: `_read` turns those of the network into other exceptions
        raise cannot_write(error, partial, url) from error
    if done > limit:
        discard(partial)
        raise WeightsError(f"could not fetch {url}: it sends more than the expected {limit} bytes; nothing was kept")
    return done


def _read(response: http.client.HTTPResponse, url: str) -> bytes:
    try:
        return response.read1(CHUNK)
    except (http.client.HTTPException, OSError, ValueError) as error:
        failure = _network_error(error, url)
        raise failure if isinstance(failure, _TransientError) else _TransientError(str(error)) from error


def _check_space(url: str, partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        discard(partial)
        raise WeightsError(
            f"could not fetch {url}: no space left in {partial.parent}, {needed} bytes are needed and {free} are free; "
            "free some, or set FOVEAL_HOME or pass cache_dir= to a larger disk"
        )


def _resume_offset(partial: Path, url: str, hash_known: bool) -> int:
    """Bytes that can be kept of an interrupted download of this URL."""
    note = _read_note(partial)
    keep = note.get("url") == url and (note.get("validator") or hash_known) and not partial.is_symlink()
    if not keep:
        discard(partial)
    return _length(partial)


def _validator(response: http.client.HTTPResponse) -> str | None:
    """Value for If-Range: a strong ETag, else the date of the last change."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _content_length(response: http.client.HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if re.fullmatch(_COUNT, length) else None


def _retry_after(headers) -> float:
    value = headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


def _wait(failures: int, retry_after: float, transfer: Transfer) -> float:
    backoff = transfer.backoff * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
    return min(max(backoff, retry_after), LONGEST_WAIT)


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _note_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _write_note(partial: Path, note: dict) -> None:
    _note_path(partial).write_text(json.dumps(note), encoding="utf-8")


def _read_note(partial: Path) -> dict:
    try:
        note = json.loads(_note_path(partial).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
