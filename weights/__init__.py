"""Weights: a manifest of known checkpoints, verified download, safe loading."""

from .errors import WeightsError
from .fetch import fetch
from .load import check_state_dict, load, save
from .manifest import (
    MANIFEST_PATH,
    Entry,
    Manifest,
    Mirror,
    bundled_manifest,
    load_manifest,
    lookup,
    write_packaged_entry,
)
from .transfer import Transfer

__all__ = [
    "MANIFEST_PATH",
    "Entry",
    "Manifest",
    "Mirror",
    "Transfer",
    "WeightsError",
    "bundled_manifest",
    "check_state_dict",
    "fetch",
    "load",
    "load_manifest",
    "lookup",
    "save",
    "write_packaged_entry",
]
