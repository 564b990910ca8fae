"""Modules called `natten`, made for one release and put where imports look first."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from types import ModuleType, TracebackType
from typing import Any, cast

from ...common.calling import per_axis
from . import functional, settings
from .orders import RELEASES, as_version, find_release, functions_of, modules_of

NAME = "natten"
MARK = "__foveal__"  # an attribute of our modules
EVERYTHING = importlib.metadata.DistributionFinder.Context()


class _Metadata(importlib.metadata.Distribution):
    """What `importlib.metadata.version("natten")` reads."""

    def __init__(self, release: str):
        self.release = release

    def read_text(self, filename: str) -> str | None:
        text = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {self.release}\nSummary: foveal in the place of NATTEN\n"
        return text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return PurePosixPath(path)


class _Finder(importlib.metadata.DistributionFinder):
    """Finds no module, since those are there, but the metadata."""

    def __init__(self, release: str):
        self.release = release

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context = EVERYTHING
    ) -> Iterator[importlib.metadata.Distribution]:
        if context.name == NAME:
            yield _Metadata(self.release)


def _refuse(name: str, release: str) -> Callable[[str], Any]:
    def missing(attribute: str) -> Any:
        raise AttributeError(
            f"foveal's stand-in for NATTEN {release} has no {name}.{attribute}; see docs/from-natten.md for what it has"
        )

    return missing


def _make_module(name: str, release: str, content: dict[str, Any]) -> ModuleType:
    module = ModuleType(name, f"`{name}` of NATTEN {release} on foveal's operators.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=name in (NAME, f"{NAME}.utils"))
    if module.__spec__.submodule_search_locations is not None:
        module.__path__ = []
    module.__dict__.update(content, __version__=release, __getattr__=_refuse(name, release), **{MARK: True})
    module.__dict__["__all__"] = sorted(key for key in content if not key.startswith("_"))
    return module


def _settings_of(release: str) -> dict[str, Any]:
    found = {}
    for since, names in settings.SETTINGS.items():
        if as_version(since) <= as_version(release):
            found |= names
    for since, names in settings.GONE.items():
        if as_version(since) <= as_version(release):
            found = {name: value for name, value in found.items() if name not in names}
    return found


def _check_all_args(release: str) -> Callable[..., tuple]:
    """NATTEN's check of the arguments of a neighborhood, each as a tuple with one value per axis."""
    kinds = {"kernel_size": int, "stride": int, "dilation": int, "is_causal": bool}
    names = [name for name in kinds if name != "stride" or as_version(release) >= (0, 20)]
    defaults = {"stride": 1, "dilation": 1, "is_causal": False}

    def check_all_args(na_dim: int, *args: Any, **kwargs: Any) -> tuple:
        given = dict(zip(names, args, strict=False)) | kwargs
        values = {name: defaults.get(name) if given.get(name) is None else given[name] for name in names}
        return tuple(per_axis(name, value, na_dim, kinds[name]) for name, value in values.items())

    return check_all_args


def _types() -> dict[str, Any]:
    """Names for annotations."""
    found: dict[str, Any] = {}
    for kind, prefix in ((int, "Dimension"), (bool, "CausalArg")):
        for rank in (1, 2, 3):
            found[f"{prefix}{rank}DType"] = tuple[(kind,) * rank]
            found[f"{prefix}{rank}DTypeOrDed"] = kind | tuple[(kind,) * rank]
        found[f"{prefix}Type"] = tuple[kind, ...]
        found[f"{prefix}TypeOrDed"] = kind | tuple[kind, ...]
    return found


def _make_modules(release: str) -> dict[str, ModuleType]:
    """Every module of the stand-in by its name."""
    version = as_version(release)
    functions, classes, switches = functions_of(release), modules_of(release), _settings_of(release)
    contexts = {"NattenContext": settings.NattenContext, "AutotunerContext": settings.AutotunerContext}
    top = {**classes, **switches}
    content: dict[str, dict[str, Any]] = {"functional": dict(functions)}
    if version < (0, 17):
        content["functional"] |= switches
        content |= {f"natten{rank}d": classes for rank in (1, 2, 3)}
    else:
        checks = {"check_all_args": _check_all_args(release)}
        content |= {"context": switches | contexts, "types": _types(), "utils": checks, "utils.checks": checks}
    if (0, 17) <= version < (0, 20):
        content |= {f"na{rank}d": classes for rank in (1, 2, 3)}
        content["utils"] = checks | {"get_device_cc": settings.get_device_cc}
    if version >= (0, 20):
        content["modules"] = dict(classes)
        public = ("na1d", "na2d", "na3d", "attention", "merge_attentions")
        top |= {name: functions[name] for name in public} | {"HAS_LIBNATTEN": True}
    if version >= (0, 21, 5):
        content["utils.varlen"] = {"generate_varlen_parameters": functional.generate_varlen_parameters}
    found = {NAME: _make_module(NAME, release, top)}
    for name, names in content.items():
        found[f"{NAME}.{name}"] = module = _make_module(f"{NAME}.{name}", release, names)
        parent, _, child = name.rpartition(".")
        setattr(found[f"{NAME}.{parent}" if parent else NAME], child, module)
    return found


class Installed:
    """The stand-in in place. As a context it is taken away at the end; `module` is what `import natten` gives."""

    def __init__(self, module: ModuleType):
        self.module = module

    def __enter__(self) -> ModuleType:
        return self.module

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        uninstall()

    def __repr__(self) -> str:
        return f"<foveal in the place of NATTEN {self.module.__version__}>"


def install(version: str = RELEASES[-1]) -> Installed:
    """Let `import natten` resolve to our operators, in this process and from now on.

    Arguments are taken in the order of that release of NATTEN, by place or by name. Code that has imported the stand-in
    keeps what it has imported, also after `uninstall`. An installed NATTEN is not touched: once the stand-in is taken
    away, it is imported again.

    Args:
        version: a release of NATTEN such as "0.17.5", or a series, "0.14", "0.15", "0.17", "0.20" or "0.21", for its
            newest; the orders differ between releases.

    Returns:
        an `Installed`, for `with install("0.17") as natten:`.

    Raises:
        ValueError: an unknown version.
        RuntimeError: NATTEN itself is imported already, or the stand-in of another version is in place.
    """
    release = find_release(version)
    there = sys.modules.get(NAME)
    if there is not None:
        if not hasattr(there, MARK):
            raise RuntimeError("NATTEN itself is imported already: call install() before anything imports natten")
        if there.__version__ != release:
            raise RuntimeError(f"the stand-in for NATTEN {there.__version__} is in place: call uninstall() first")
        return Installed(there)
    found = _make_modules(release)
    sys.modules.update(found)
    sys.meta_path.insert(0, cast(Any, _Finder(release)))
    return Installed(found[NAME])


def uninstall() -> None:
    """Take the stand-in away; nothing happens if there is none."""
    for name, module in list(sys.modules.items()):
        if (name == NAME or name.startswith(f"{NAME}.")) and hasattr(module, MARK):
            del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
