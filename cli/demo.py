"""`foveal demo`: a web page to look at the library with."""

from typing import Annotated

import typer

from .common import mistakes


def demo(
    model: Annotated[str, typer.Option(help="An image model of ten digits.")] = "natten_dinat_pico",
    generator: Annotated[
        str, typer.Option(help="A pipeline or a run that makes clips of digits; none: no clips.")
    ] = "digits",
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other devices of the network in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
) -> None:
    """Serve a page: draw a digit and see what the model sees, let a digit move, choose a neighborhood.

    Example: foveal demo --port 8080

    Everything is computed on this machine and nothing is loaded from elsewhere. Ctrl-C ends it.
    """
    with mistakes():
        from .. import zoo  # noqa: F401
        from ..zoo.demo import Panels, make_server

        panels = Panels(model, None if generator == "none" else generator)
        panels.about()  # a model that does not fit is refused before anybody looks
        try:
            server = make_server(panels, host=host, port=port)
        except (OSError, OverflowError) as error:
            raise ValueError(f"--host {host} --port {port} cannot be listened at: {error}") from error
        with server:
            typer.echo(f"{server.url} (Ctrl-C ends it)")
            if show:
                import webbrowser

                webbrowser.open(server.url)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                typer.echo("")
