"""The list of known weights, one JSON file per family in `manifest/`, as typed, validated entries.

An entry is one set of weights, named as timm names them (`architecture.tag`). It has one or more mirrors: places that
hold these weights as a file, each with its own format, size and hash. Hashes and sizes that upstream does not publish
are null and never guessed; see `cache.py` for what stands in for them.
"""

import difflib
import functools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .digest import sha256_of, write_atomic
from .errors import WeightsError

MANIFEST_PATH = Path(__file__).with_name("manifest")
FORMATS = ("official", "transformers", "foveal")

_NAME = re.compile(r"[a-z0-9][a-z0-9_]*\.[a-z0-9][a-z0-9_]*")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*\.(safetensors|pth|pt|bin)")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[0-9a-f]{40})?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """One file that holds the weights of an entry; exactly one of `url`, `hub` and `package` is set.

    Args:
        format: whose parameter names the file has: "official" (the authors' code), "transformers", "foveal".
        file: plain file name in the cache; one of `.safetensors`, `.pth`, `.pt`, `.bin`.
        url: https address.
        hub: Hugging Face id, `owner/name` or `owner/name@commit` (40 hex digits).
        package: name of a file that ships inside the wheel, next to the manifest. Needs `sha256` and `bytes`.
        sha256: hash of the whole file, 64 lower-case hex digits, or None where upstream publishes none.
        bytes: size of the file, or None where unknown.
        container: key under which the file holds the state dict, or None for a flat file.
    """

    format: str
    file: str
    url: str | None = None
    hub: str | None = None
    package: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    container: str | None = None

    def __post_init__(self) -> None:
        _require(self.format in FORMATS, "format", self.format, f"one of {FORMATS}")
        _require(_matches(_FILE, self.file), "file", self.file, "a plain .safetensors, .pth, .pt or .bin file name")
        places = [key for key in ("url", "hub", "package") if getattr(self, key) is not None]
        _require(len(places) == 1, "location", places, "exactly one of url, hub and package")
        if self.url is not None:
            _require(_plain_url(self.url), "url", self.url, "an https URL without user, query or fragment")
        if self.hub is not None:
            _require(_matches(_HUB, self.hub), "hub", self.hub, "'owner/name' or 'owner/name@<40 hex digits>'")
        if self.sha256 is not None:
            _require(_matches(_SHA256, self.sha256), "sha256", self.sha256, "64 lower-case hex digits or null")
        if self.bytes is not None:
            _require(type(self.bytes) is int and self.bytes > 0, "bytes", self.bytes, "a positive integer or null")
        _require(self.container is None or _text(self.container), "container", self.container, "a key or null")
        if self.package is not None:
            _require(self.package == self.file, "package", self.package, f"the file's own name {self.file!r}")
            _require(self.sha256 is not None, "sha256", self.sha256, "a hash, because the file is packaged")
            _require(self.bytes is not None, "bytes", self.bytes, "a size, because the file is packaged")

    @property
    def location(self) -> str:
        """The URL, `hf://owner/name[@commit]/file` or `package:file`; identifies the mirror in messages and pins."""
        if self.hub is not None:
            return f"hf://{self.hub}/{self.file}"
        return self.url if self.url is not None else f"package:{self.package}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One set of weights.

    Args:
        name: `architecture.tag`.
        mirrors: where to get it, best first.
        license: SPDX identifier of the weights' license.
        source: https page of the authors' project.
        metrics: reported numbers, e.g. `{"top1": 83.8}` in percent.
        img_size: square input size, pixels, at which the metrics hold.
        num_classes: rows of the classifier, or None where upstream does not say.
        params: parameters of the model, counted in the authors' own code, or None where that was not done.
        notes: anything a user should know.
    """

    name: str
    mirrors: tuple[Mirror, ...]
    license: str
    source: str
    img_size: int
    num_classes: int | None = None
    params: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: str = ""

    def __post_init__(self) -> None:
        _require(_matches(_NAME, self.name), "name", self.name, "'architecture.tag' in lower case, digits and _")
        _require(len(self.mirrors) > 0, "mirrors", self.mirrors, "at least one mirror")
        files = [mirror.file for mirror in self.mirrors]
        _require(len(set(files)) == len(files), "mirrors", files, "a different file name for each mirror")
        packaged = [mirror.package is not None for mirror in self.mirrors]
        _require(not any(packaged) or len(packaged) == 1, "mirrors", files, "a packaged file to be the only mirror")
        _require(_text(self.license), "license", self.license, "an SPDX identifier")
        _require(_plain_url(self.source), "source", self.source, "an https URL")
        _require(type(self.img_size) is int and self.img_size > 0, "img_size", self.img_size, "pixels")
        for key in ("num_classes", "params"):
            count = getattr(self, key)
            _require(count is None or (type(count) is int and count > 0), key, count, "a count or null")
        numbers = all(_text(key) and _finite(value) for key, value in self.metrics.items())
        _require(numbers, "metrics", self.metrics, "names with numbers")
        _require(isinstance(self.notes, str), "notes", self.notes, "text")

    @classmethod
    def from_json(cls, name: str, data: Any) -> "Entry":
        """The entry that `to_json` wrote; raises WeightsError that names the entry and the field."""
        try:
            _require(isinstance(data, dict) and isinstance(data.get("mirrors"), list), "entry", data, "fields, mirrors")
            _require(isinstance(data.get("metrics", {}), dict), "metrics", data.get("metrics"), "names with numbers")
            mirrors = tuple(_mirror_from_json(mirror) for mirror in data["mirrors"])
            _known_keys(data, cls)
            return cls(name=name, **{**data, "mirrors": mirrors})
        except TypeError as error:  # a required field is missing
            raise WeightsError(f"weights manifest: entry {name!r}: {error}") from None
        except WeightsError as error:
            raise WeightsError(f"weights manifest: entry {name!r}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest file, without the name."""
        data = asdict(self)
        del data["name"]
        data["metrics"] = dict(self.metrics)
        data["mirrors"] = [_mirror_to_json(mirror) for mirror in self.mirrors]
        return data


@dataclass(frozen=True)
class Manifest:
    """Entries by name, and the folder that holds the manifest and its packaged files."""

    entries: Mapping[str, Entry]
    folder: Path


def family_of(name: str) -> str:
    """First word of a name, such as "agent" of "agent_swin_t.leap_in1k"; names the family's manifest file."""
    return re.split(r"[_.]", name, maxsplit=1)[0]


def load_manifest(path: str | os.PathLike | None = None) -> Manifest:
    """Reads and validates a manifest, by default the bundled one.

    Args:
        path: a JSON file of name → entry, or a folder of such files, each named after its family: `agent.json` holds
            the names that begin with "agent". Packaged files lie next to the file or the folder.

    Raises:
        WeightsError: anything malformed, an entry in the file of another family, a folder without a manifest.
    """
    path = MANIFEST_PATH if path is None else Path(path)
    if not path.is_dir():
        return Manifest(_read_entries(path), path.parent)
    files = sorted(path.glob("*.json"))
    if not files:
        raise WeightsError(f"cannot read the weights manifest {path}: expected <family>.json in this folder")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in _read_entries(file).items():
            _require(family_of(name) == file.stem, "name", name, f"a name of the family {file.stem!r} in {file.name}")
            entries[name] = entry
    return Manifest(entries, path.parent)


def _read_entries(path: Path) -> dict[str, Entry]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"cannot read the weights manifest {path}: {error}") from error
    if not isinstance(data, dict):
        raise WeightsError(f"cannot read the weights manifest {path}: expected an object of name → entry")
    return {name: Entry.from_json(name, value) for name, value in data.items()}


@functools.cache
def bundled_manifest() -> Manifest:
    """The manifest that ships with foveal."""
    return load_manifest()


def lookup(name: str, manifest: Manifest | None = None) -> Entry:
    """The entry called `name`, by default of the bundled manifest; raises WeightsError that gives the nearest names."""
    entries = (bundled_manifest() if manifest is None else manifest).entries
    if isinstance(name, str) and name in entries:
        return entries[name]
    if not isinstance(name, str) or not (_matches(_NAME, name) or _matches(_NAME, f"{name}.tag")):
        raise WeightsError(f"{name!r} is not a weights name: expected 'architecture.tag', e.g. natten_dinat_s.shi_in1k")
    same_model = [known for known in entries if known.startswith(f"{name}.")]
    near = same_model or difflib.get_close_matches(name, entries, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`foveal weights list` shows all names"
    raise WeightsError(f"there are no weights called {name!r}; {hint}")


def write_packaged_entry(
    path: str | os.PathLike,
    *,
    name: str,
    metrics: Mapping[str, float],
    license: str,
    source: str,
    img_size: int,
    num_classes: int,
    notes: str = "",
    manifest_path: str | os.PathLike = MANIFEST_PATH,
) -> Entry:
    """Adds or updates the manifest entry of a file that ships inside the wheel; hash and size are taken from the file.

    The file must already be `<name>.safetensors` next to the manifest, so that the wheel holds both. For the command
    that trains such weights; other entries are written by hand. Where `manifest_path` is a folder, the entry goes into
    the file of its family.
    """
    path, manifest_path = Path(path), Path(manifest_path)
    wanted = manifest_path.parent / f"{name}.safetensors"
    if path.resolve() != wanted.resolve() or not path.is_file():
        raise WeightsError(f"cannot package {path} as {name!r}: expected an existing file at {wanted}")
    digest, size = sha256_of(path), path.stat().st_size
    mirror = Mirror(format="foveal", file=path.name, package=path.name, sha256=digest, bytes=size)
    entry = Entry(
        name=name,
        mirrors=(mirror,),
        license=license,
        source=source,
        img_size=img_size,
        num_classes=num_classes,
        metrics=dict(metrics),
        notes=notes,
    )
    file = manifest_path / f"{family_of(name)}.json" if manifest_path.is_dir() else manifest_path
    entries = {**(_read_entries(file) if file.exists() else {}), name: entry}
    data = {key: value.to_json() for key, value in entries.items()}
    write_atomic(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    bundled_manifest.cache_clear()
    return entry


def _mirror_from_json(data: Any) -> Mirror:
    _require(isinstance(data, dict), "mirror", data, "fields")
    _known_keys(data, Mirror)
    return Mirror(**({**data, "file": data["package"]} if "package" in data else data))


def _mirror_to_json(mirror: Mirror) -> dict[str, Any]:
    data = asdict(mirror)
    implied = [key for key in ("url", "hub", "package") if data[key] is None]
    implied += ["file"] if mirror.package is not None else []
    return {key: value for key, value in data.items() if key not in implied}


def _known_keys(data: dict, cls: type) -> None:
    known = {item.name for item in fields(cls)}
    unknown = sorted(set(map(str, data)) - known)
    _require(not unknown, "fields", unknown, f"only {sorted(known)}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"repeated keys {repeated}")
    return dict(pairs)


def _require(holds: bool, what: str, value: object, accepted: str) -> None:
    if not holds:
        raise WeightsError(f"{what} is {value!r}; expected {accepted}")


def _matches(pattern: re.Pattern, value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _plain_url(value: object) -> bool:
    """https, or http to this machine (which `transfer.check_url` refuses unless it is asked for)."""
    if not isinstance(value, str) or not value.isprintable() or " " in value:
        return False
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018 - raises for a malformed port
    except ValueError:
        return False
    if not parts.hostname or parts.username is not None or parts.fragment:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost"))
