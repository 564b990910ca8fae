"""`foveal train`: the training command, `foveal-train`, under the name of the others."""

import sys
from pathlib import Path

import typer


def train(context: typer.Context) -> None:
    """Train what a Hydra configuration describes.

    Example: foveal train experiment=finetune data.root=photos model.name=natten_dinat_s

    Arguments are those of foveal-train: experiment=NAME, group=choice, key=value, -m for sweeps, --cfg job to show the
    configuration, --help for its groups.
    """
    from .. import train as command

    # Hydra reads the arguments, and the processes of several devices are started again by the first of them
    sys.argv = [str(Path(command.__file__).resolve()), *context.args]
    command.main()
