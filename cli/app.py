"""`foveal`: its commands. What a command needs beside its options is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable

import typer

from ..weights.cli import weights
from .demo import demo
from .evaluate import evaluate
from .explain import explain
from .export import export
from .plot import plot
from .predict import predict
from .profile import profile
from .sample import sample
from .train import train

HELP = """foveal: vision backbones and video generators on efficient attention.

From your images to a model in use: foveal train, eval, predict, export."""
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
COMMANDS: dict[str, Callable] = {
    "eval": evaluate,
    "predict": predict,
    "sample": sample,
    "export": export,
    "profile": profile,
    "demo": demo,
}

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("train", context_settings=PASSED_ON)(train)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(plot, name="plot")
app.command("explain", context_settings=PASSED_ON)(explain)
app.add_typer(weights, name="weights")


def main() -> None:
    """Console entry point."""
    app(prog_name="foveal")
