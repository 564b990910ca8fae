"""`foveal explain`: which implementation a call of an attention operator takes, and what the call costs."""

import typer


def explain(context: typer.Context) -> None:
    """Say which implementation an attention call takes, and what it costs.

    Example: foveal explain --op na2d --shape 56 56 --heads 2 --head-dim 32 --window 7

    --device cuda need not be there. Every other --name with its values is an argument of the operator.
    """
    from ..kernels.tools.explain import main

    main(context.args, prog="foveal explain")
