"""The house keeps its shape: layers import downwards, the wheel holds the package, importing costs little."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "kernels": set(),
    "layers": {"kernels"},
    "weights": set(),
    "zoo": {"layers", "kernels", "weights"},
    "cli": {"zoo", "layers", "kernels", "weights", "train"},
    "configs": set(),
}
LAZILY = {"triton", "matplotlib", "rich"}  # what kernels may use beside torch, never on import
SOURCES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "runs", "site", "*.egg-info", "__pycache__")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Every import statement of a file and what it names: `.kernels.ops` for ours, `torch.utils` for others."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node, "." + ".".join((*base, name))) for name in names)


def test_imports_point_down():
    wrong = []
    for path in SOURCES:
        house = path.relative_to(ROOT).parts[0]
        allowed = {house, *MAY_IMPORT[house], "__version__"}
        for node, name in imports(path):
            if name.startswith(".") and name[1:].split(".")[0] not in allowed:
                wrong.append(f"{relative(path)}:{node.lineno} imports {name[1:]}")
            if name.split(".")[0] == "foveal":
                wrong.append(f"{relative(path)}:{node.lineno} imports {name}: relative imports between our folders")
    assert not wrong, "\n".join(wrong)


def test_families_of_backbones_know_layouts_and_no_other_family():
    shelves = {"zoo/backbones": (".zoo.builder", ".zoo.conversion", ".zoo.hosts"), "zoo/hosts": (".zoo.hosts",)}
    wrong = []
    for shelf, allowed in shelves.items():
        for path in sorted((ROOT / shelf).glob("*.py")):
            names = [name for _, name in imports(path) if name.startswith(".zoo") and not name.startswith(allowed)]
            wrong += [f"{relative(path)} imports {name[1:]}" for name in names]
    assert not wrong, "\n".join(wrong)


def test_train_imports_only_the_zoo():
    ours = {name for _, name in imports(ROOT / "train.py") if name.split(".")[0] == "foveal" or name.startswith(".")}
    assert all(name.startswith("foveal.zoo") for name in ours), ours


def test_kernels_depend_on_torch_only():
    wrong = []
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for node, name in imports(path):
            package = name.split(".")[0]
            known = package in sys.stdlib_module_names or package in {"", "torch"} | LAZILY
            if not known:
                wrong.append(f"{relative(path)}:{node.lineno} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_root_holds_two_python_files_and_imports_nothing():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "train.py"]
    assert not list(imports(ROOT / "__init__.py"))


def test_kernels_is_no_regular_package():
    """With an `__init__.py`, whatever runs in the root would find our folder instead of Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_package_list_equals_the_disk():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    on_disk = ["foveal", *sorted(".".join(("foveal", *folder.parts)) for folder in folders)]
    assert listed == on_disk
    for folder in folders - {Path("kernels")}:
        assert (ROOT / folder / "__init__.py").exists(), folder


def test_files_stay_short_and_finished():
    wrong = []
    for path in [*SOURCES, ROOT / "train.py", *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        lines = path.read_text().splitlines()
        if len(lines) > 600:
            wrong.append(f"{relative(path)} has {len(lines)} lines; split it past 600")
        for number, line in enumerate(lines, 1):
            if re.search(r"#.*\b(TO" r"DO|FIX" r"ME|XX" r"X)\b", line):
                wrong.append(f"{relative(path)}:{number} is unfinished: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def python(code: str, cwd: Path, **environment: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_stays_light(tmp_path):
    code = """
import sys

def load(module, *, known=()):
    for name in known:
        __import__(name)
    before = set(sys.modules)
    __import__(module)
    print(*set(sys.modules) - before)

load("foveal")
# torch's FLOP counter, where formulas are registered, imports triton wherever it is installed
load("foveal.kernels.ops", known=["torch.utils.flop_counter"])
load("foveal.zoo", known=["timm"])
"""
    package, kernels, zoo = (set(line.split()) for line in python(code, tmp_path).splitlines())
    assert not {"torch", "timm"} & package
    assert not {"triton", "timm", "matplotlib", "rich", "lightning"} & kernels
    assert "foveal.kernels.neighborhood.api" in kernels
    assert "foveal.kernels.neighborhood.forward" not in kernels, "kernels are imported when they first run"
    assert not {"matplotlib", "lightning", "hydra", "diffusers", "sklearn"} & zoo


@pytest.mark.slow
def test_the_root_does_not_hide_the_kernels_of_hugging_face():
    assert python("from diffusers import LattePipeline; print(LattePipeline.__name__)", ROOT) == "LattePipeline\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources, so that nothing built earlier can slip into the wheel."""
    folder = tmp_path_factory.mktemp("wheel") / "tree"
    return shutil.copytree(ROOT, folder, ignore=NOT_COPIED)


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree.parent)]
    run = subprocess.run([*build, str(tree)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = tree.parent.glob("foveal-*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(tree, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"foveal", info}
    shipped = [*tree.glob("*.py"), *(tree / "configs").rglob("*.yaml")]
    shipped += [path for kind in ("*.json", "*.safetensors") for path in (tree / "weights").rglob(kind)]
    shipped += [path for folder in MAY_IMPORT for path in (tree / folder).rglob("*.py")]
    shipped += (tree / "zoo").rglob("*.html")
    expected = {f"foveal/{path.relative_to(tree).as_posix()}" for path in shipped}
    assert {name for name in names if name.startswith("foveal/")} == expected
    assert f"{info}/licenses/LICENSE" in names


def test_the_installed_wheel_works(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    code = """
import foveal, foveal.zoo, torch
from importlib.resources import files
from foveal.kernels.ops import na2d
print(foveal.__file__, foveal.__version__)
x = torch.randn(1, 9, 9, 2, 8)
assert na2d(x, x, x, window=3).shape == x.shape
assert files("foveal.configs").joinpath("train.yaml").is_file()
"""
    where, version = python(code, tmp_path, PYTHONPATH=str(target)).split()
    assert Path(where).is_relative_to(target)
    assert f"foveal-{version}-" in wheel.name
