"""One clear sentence for what a user got wrong, in place of a traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ...weights.errors import WeightsError
from ...weights.transfer import NO_SPACE
from ..data.foreign import reason
from ..data.names import unknown_name
from .console import tell

PACKAGE = Path(__file__).resolve().parents[2]
# a checkout holds more: .venv, build, scripts of users
HOUSES = ("cli", "kernels", "layers", "weights", "zoo", "train.py")
OURS = (ValueError, TypeError, FileNotFoundError, ImportError, NotImplementedError)
# of these the path and the system's reason say it all, whoever ran into them
OF_FILES = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG})


class JobError(Exception):
    """A job of a sweep failed.

    Args:
        sentence: what to say, again, at the end of the sweep.
        table: what the other jobs measured, if any ends well.
        status: exit status of the sweep.
    """

    def __init__(self, sentence: str, *, table: Path, status: int):
        super().__init__(sentence)
        self.table, self.status = table, status


@dataclass(frozen=True)
class Remote:
    """An error of another process (a loader's worker, a spawned rank), which comes here as the text of its traceback.

    Args:
        where: the process.
        trace: the traceback, error included.
        file, line: of the last frame, and its source.
        kind, message: of the error.
    """

    where: str
    trace: str
    file: str
    line: str
    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Remote | None:
        """The error inside `error`, or None when it is one of this process."""
        heads = r"Caught \w+ in (?P<worker>[^\n]+?)\.\nOriginal |-- (?P<rank>Process \d+) terminated[^\n]*:\n"
        found = re.search(rf"(?:{heads})(?P<trace>Traceback \(most recent call last\):\n.*)", str(error), re.DOTALL)
        if found is None:
            return None
        trace = found["trace"].strip()
        frames = list(re.finditer(r'^  File "(.+?)", line \d+, in .*\n(?:    (.*)\n)?(?:    [ ^~]+\n)?', trace, re.M))
        if not frames:
            return None
        kind, _, message = trace[frames[-1].end() :].partition(": ")
        file, line = frames[-1].groups(default="")
        return cls(found["worker"] or found["rank"], trace, file, line, kind.rpartition(".")[2], message.strip())


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
        return reason(error)
    key = match.group(1)
    hint = str(unknown_name("key", key, _known_keys(sys.argv[1:]))).split(": ", 1)[1]
    return f"{key} is not a key of this configuration: {hint} (a new key is added with +{key}=…)"


def _is_check_of_ours(file: str, line: str | None) -> bool:
    """Return whether an error comes from a `raise` of this package, whose messages are written for users.

    Other errors come from a line of ours that failed, or from an installed library.
    """
    path = Path(file).resolve()
    here = path.is_relative_to(PACKAGE) and path.relative_to(PACKAGE).parts[0] in HOUSES
    return here and (line or "").lstrip().startswith("raise ")


def _last_frame(error: BaseException) -> traceback.FrameSummary | None:
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1] if frames else None


def _from_us(error: BaseException) -> bool:
    frame = _last_frame(error)
    return isinstance(error, OURS) and frame is not None and _is_check_of_ours(frame.filename, frame.line)


def _from_hydra(error: BaseException) -> bool:
    frame, folder = _last_frame(error), Path(hydra.__file__).resolve().parent
    return frame is not None and Path(frame.filename).resolve().is_relative_to(folder)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and the ones that led to it: on a full disk closing a log fails as well, and hides the first one."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _explain_remote(remote: Remote) -> str | None:
    if remote.kind in {kind.__name__ for kind in OURS} and _is_check_of_ours(remote.file, remote.line):
        return remote.message.splitlines()[0]
    number = re.match(r"\[Errno (\d+)\] ", remote.message)
    return remote.message[number.end() :] if number and int(number[1]) in OF_FILES | NO_SPACE else None


def _explain_file(error: BaseException) -> str | None:
    full = [link for link in _chain(error) if isinstance(link, OSError) and link.errno in NO_SPACE and link.filename]
    if full:  # the first failure
        return (
            f"no space is left to write {full[-1].filename} ({full[-1].strerror}): free some, then go on with "
            "ckpt_path=auto"
        )
    if isinstance(error, OSError) and error.errno in OF_FILES and error.filename:
        return f"{error.filename} cannot be used: {reason(error)}"
    return None


def _explain_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration"
    return f"{where} is no YAML: {getattr(error, 'problem', None) or reason(error)}"


def _explain_instantiation(error: InstantiationException) -> str | None:
    cause, where = error.__cause__, re.search(r"full_key: (\S+)", str(error))
    if cause is not None and (sentence := explain(cause)) is not None:
        return sentence
    # a wrong argument is told by a signature or by the library's own check of it; anything else is a fault
    if cause is not None and not isinstance(cause, OURS):
        return None
    return f"{where.group(1)}: {reason(cause or error)}" if where else reason(cause or error)


def explain(error: BaseException) -> str | None:
    """The sentence to print for `error`, or None when it is no mistake of the user that we know of."""
    remote = Remote.of(error)
    if remote is not None:
        return _explain_remote(remote)
    if isinstance(error, JobError):
        return f"{error}" + (f"; what the others measured is in {error.table}" if error.table.is_file() else "")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return str(unknown_name(group, name, error.options))
    if isinstance(error, ConfigCompositionException):
        return _explain_key(error)
    if isinstance(error, MissingMandatoryValue):
        key = re.search(r"full_key: (\S+)", str(error))
        return f"{key.group(1) if key else 'a key'} has no default: set it on the command line or in the experiment"
    if isinstance(error, InstantiationException):
        return _explain_instantiation(error)
    if isinstance(error, yaml.YAMLError):
        return _explain_yaml(error)
    known = (HydraException, OmegaConfBaseException, MisconfigurationException, WeightsError)
    if isinstance(error, known) or _from_us(error) or (isinstance(error, ValueError) and _from_hydra(error)):
        return reason(error)
    return _explain_file(error)


def raise_to_us() -> None:
    """Makes Hydra raise the errors it would print in its own words, unless the user asked for tracebacks."""
    if os.environ.get("HYDRA_FULL_ERROR") != "1":
        os.environ["HYDRA_FULL_ERROR"] = os.environ["FOVEAL_ONE_SENTENCE"] = "1"


def wants_sentences() -> bool:
    """Return whether errors are shown as sentences: the user did not ask for tracebacks."""
    return os.environ.get("FOVEAL_ONE_SENTENCE") == "1"


def print_trace(error: BaseException) -> None:
    """Prints the traceback of an error, of one in another process that process's own."""
    remote = Remote.of(error)
    if remote is None:
        traceback.print_exception(error)
    else:
        sys.stderr.write(f"In {remote.where}:\n{remote.trace}\n")


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the process after a mistake of the user inside with its sentence on stderr and exit status 2, after a fault
    in another process with the traceback of that process and status 1."""
    try:
        yield
    except Exception as error:
        sentence = explain(error) if wants_sentences() else None
        if sentence is not None:
            tell(sentence)
            raise SystemExit(error.status if isinstance(error, JobError) else 2) from error
        if not wants_sentences() or Remote.of(error) is None:
            raise
        print_trace(error)
        raise SystemExit(1) from error
