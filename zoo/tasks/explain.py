"""One clear sentence for what a user got wrong, in place of a traceback."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from ..data.names import unknown_name

PACKAGE = Path(__file__).resolve().parents[2]
OURS = (ValueError, TypeError, FileNotFoundError, ImportError, NotImplementedError)


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{name}"
        yield from _keys(value, f"{prefix}{name}.")


def _known_keys(overrides: list[str]) -> list[str]:
    """Every key of the configuration that the group choices among `overrides` make."""
    choices = [item for item in overrides if re.fullmatch(r"[\w/]+=[\w/]+", item)]
    GlobalHydra.instance().clear()
    with initialize_config_module("foveal.configs", version_base="1.3"):
        for chosen in (choices, []):
            try:
                return list(_keys(OmegaConf.to_container(compose("train", overrides=chosen))))
            except (HydraException, OmegaConfBaseException):
                continue
    return []


def _explain_key(error: ConfigCompositionException) -> str:
    match = re.search(r"full_key: (\S+)", str(error.__cause__)) or re.search(r"Could not override '(.+?)'", str(error))
    if match is None:
        return str(error).splitlines()[0]
    key = match.group(1)
    hint = str(unknown_name("key", key, _known_keys(sys.argv[1:]))).split(": ", 1)[1]
    return f"{key} is not a key of this configuration: {hint} (a new key is added with +{key}=…)"


def _from_us(error: BaseException) -> bool:
    """Whether the check that failed is one of this package's own, whose messages are written for users."""
    return isinstance(error, OURS) and _raised_in(error, PACKAGE)


def _raised_in(error: BaseException, folder: Path) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(folder)


def explain(error: BaseException) -> str | None:
    """The sentence to print for `error`, or None when it is no mistake of the user that we know of."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return str(unknown_name(group, name, error.options))
    if isinstance(error, ConfigCompositionException):
        return _explain_key(error)
    if isinstance(error, MissingMandatoryValue):
        key = re.search(r"full_key: (\S+)", str(error))
        return f"{key.group(1) if key else 'a key'} has no default: set it on the command line or in the experiment"
    if isinstance(error, InstantiationException):
        cause = error.__cause__ or error
        where = re.search(r"full_key: (\S+)", str(error))
        return f"{cause}".splitlines()[0] if _from_us(cause) or not where else f"{where.group(1)}: {_first(cause)}"
    if isinstance(error, HydraException | OmegaConfBaseException | MisconfigurationException) or _from_us(error):
        return _first(error)
    if isinstance(error, ValueError) and _raised_in(error, Path(hydra.__file__).parent):
        return _first(error)
    return None


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def raise_to_us() -> None:
    """Makes Hydra raise the errors it would print in its own words, unless the user asked for tracebacks."""
    if os.environ.get("HYDRA_FULL_ERROR") != "1":
        os.environ["HYDRA_FULL_ERROR"] = os.environ["FOVEAL_ONE_SENTENCE"] = "1"


@contextmanager
def one_sentence() -> Iterator[None]:
    """A mistake of the user's inside ends the process with its sentence on stderr and exit status 2."""
    try:
        yield
    except Exception as error:
        sentence = explain(error) if os.environ.get("FOVEAL_ONE_SENTENCE") == "1" else None
        if sentence is None:
            raise
        Console(stderr=True).print(f"[bold red]foveal-train:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from error
