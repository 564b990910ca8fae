"""The pages of README and docs keep their word: code blocks run, commands compose, and nothing else is promised.

Python blocks of a page run in order in one namespace, shrunken where they are big. A block that cannot run here carries
a comment of Markdown with the reason on the line before it: `<!-- not run: … -->`.
"""

import functools
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import foveal.cli
import pytest
import timm
import torch
import typer
from hydra import compose, initialize_config_module

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?"
    r"(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)\n *```",
    re.DOTALL,
)
SHRUNKEN = {  # what a block says -> what runs here
    "docs/video.md": {
        '"b", in_channels=16': '"nano", in_channels=16',
        "torch.randn(1, 16, 5, 30, 52)": "torch.randn(1, 16, 4, 8, 8)",
    },
    "docs/steer.md": {
        "from diffusers import StableDiffusionPipeline": "from tiny_pipeline import TinyPipeline",
        'StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")': "TinyPipeline()",
    },
    "README.md": {"torch.randn(1, 8, 28, 28, 2, 32)": "torch.randn(1, 4, 9, 9, 2, 32)"},
}
PACKAGED = "natten_dinat_pico"  # its weights are in the wheel; others are built without
STANDS_FOR = {"FOLDER": "folder", "NAME": "digits_dinat", "LATENTS": "folder"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, str | None]]:
    """Code of each block in one of these languages, and the reason why it does not run, if it says one."""
    for match in BLOCK.finditer(page.read_text()):
        if match["language"] in languages:
            indent = match["indent"]
            yield "\n".join(line.removeprefix(indent) for line in match["code"].splitlines()), match["reason"]


def with_blocks(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(True for _ in blocks(page, *languages))]


@pytest.mark.parametrize("page", with_blocks("python"), ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    create_model = timm.create_model

    @functools.wraps(create_model)
    def without_download(model, *, pretrained=False, **kwargs):
        here = model == PACKAGED or model.startswith("local-dir:")
        return create_model(model, pretrained=pretrained and here, **kwargs)

    monkeypatch.setattr(timm, "create_model", without_download)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict = {"__name__": "page"}
    for code, reason in blocks(page, "python"):
        if reason is not None:
            continue
        for said, runs in SHRUNKEN.get(name(page), {}).items():
            code = code.replace(said, runs)
        exec(compile(code, f"{name(page)} in a test", "exec"), namespace)


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command line that a page shows, without comments; variables and placeholders stay."""
    for code, reason in blocks(page, "console", "bash", "sh"):
        text = code.replace("\\\n", " ")
        for line in text.splitlines():
            shown = line.strip().removeprefix("$ ")
            if reason is None and shown and not shown.startswith("#"):
                yield shlex.split(shown, comments=True)


def test_training_commands_compose():
    wrong, composed = [], 0
    for page in PAGES:
        for words in commands(page):
            if words[:2] == ["foveal", "train"]:
                words = ["foveal-train", *words[2:]]
            train = next((i for i, word in enumerate(words) if word in ("foveal-train", "train.py")), None)
            if train is None:
                continue
            overrides = [
                word for word in words[train + 1 :] if "=" in word and not word.startswith("-") and "…" not in word
            ]
            if "-m" in words:  # the first of the values that a sweep takes
                overrides = [first_of_sweep(word) for word in overrides]
            overrides = [f"{key}={STANDS_FOR.get(value, value)}" for key, value in (o.split("=", 1) for o in overrides)]
            try:
                with initialize_config_module("foveal.configs", version_base="1.3"):
                    compose("train", overrides=overrides)
                composed += 1
            except Exception as error:  # every command is tried, the faults are shown together
                wrong.append(f"{name(page)}: {' '.join(words)}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
    assert composed > 20


def first_of_sweep(override: str) -> str:
    key, value = override.split("=", 1)
    if value.startswith("{"):
        return f"{key}={value[: value.index('}') + 1]}"
    return f"{key}={value.split(',')[0]}"


def test_commands_take_these_options():
    app, parsed = typer.main.get_command(foveal.cli.app), 0
    for page in PAGES:
        for words in commands(page):
            if words[:1] != ["foveal"] or "…" in words:
                continue
            command, rest = app, words[1:]
            while hasattr(command, "commands"):
                assert rest and rest[0] in command.commands, f"{name(page)}: {' '.join(words)}"
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_context(words[1], list(rest))  # raises for options that are not there
            parsed += 1
    assert parsed > 15


def test_modules_of_commands_exist():
    wrong = []
    for page in PAGES:
        for words in commands(page):
            if words[:2] == ["python", "-m"] and find_spec(words[2]) is None:
                wrong.append(f"{name(page)}: {' '.join(words)}")
    assert not wrong, "\n".join(wrong)


def test_reasons_are_few():
    """A block that does not run is an exception with a reason that says why."""
    reasons = [f"{name(page)}: {reason}" for page in PAGES for _, reason in blocks(page, "python") if reason]
    assert len(reasons) <= 8, "\n".join(reasons)
    assert all(len(reason.split()) >= 4 for reason in reasons), reasons
    assert sys.version_info >= (3, 11)


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "design.md"], ids=name)
def test_files_that_newcomers_are_sent_to_exist(page):
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    named = set(re.findall(rf"`((?:{folders})/[\w./*-]*)`", page.read_text()))
    assert len(named) > 15
    assert not sorted(path for path in named if not any(ROOT.glob(path.rstrip("/"))))


def test_the_design_names_every_folder_of_kernels():
    text = (ROOT / "docs" / "design.md").read_text()
    packages = {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")}
    assert not sorted(folder for folder in packages if not re.search(rf"`(kernels/)?{folder}/", text))
