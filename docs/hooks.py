"""Gives mkdocstrings a copy of the package to read: the repository root, which is the package, also holds `.venv`, and
`kernels/` has no `__init__.py`, without which modules are not looked for."""

import shutil
import tempfile
import tomllib
from pathlib import Path

from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parents[1]
COPY = tempfile.TemporaryDirectory(prefix="foveal-docs-")


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config):
    package = Path(COPY.name) / "foveal"
    for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]:
        folder = Path(*name.split(".")[1:])
        (package / folder).mkdir(parents=True, exist_ok=True)
        (package / folder / "__init__.py").touch()
        for source in (ROOT / folder).glob("*.py"):
            shutil.copy(source, package / folder)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [COPY.name]
    return config
