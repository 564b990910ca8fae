"""`foveal profile`: parameters, multiply-adds and time of a model, or where the time of a generator goes."""

from typing import Annotated

import typer

from .common import AsJson, Device, ImgSize, mistakes, pick_device, print_json, print_rows


def profile(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model name of timm, a run, an exported folder, or a pipeline's.")
    ],
    img_size: ImgSize = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images of a step.")] = 1,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = None,
    repeats: Annotated[int, typer.Option(help="Measured steps.")] = 10,
    operators: Annotated[int, typer.Option(help="List so many operators that take most time.")] = 0,
    call: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Of pipelines, an argument of the call: --set prompt=cat --set num_inference_steps=4."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the size and the speed of a model.

    Example: foveal profile natten_dinat_t --batch-size 8 --operators 10

    Names of timm are built without weights. Numbers are named as in timm's benchmark. Of a pipeline of diffusers or of
    a video run, one call: time, FLOPs, tokens and memory by class of operator and by step.
    """
    with mistakes():
        if _is_pipeline(model):
            _profile_pipeline(model, call or [], device, dtype, as_json)
            return
        if call:
            raise ValueError(f"--set is for pipelines, and {model} is none")
        found = _measure(model, img_size, batch_size, train, dtype, device, repeats, operators)
        slowest = found.pop("operators", [])
        if as_json:
            print_json(found | ({"operators": slowest} if slowest else {}))
            return
        kind = "train" if train else "infer"
        typer.echo(
            f"{model} at {found['img_size']} pixels, batch {batch_size}, {dtype}, {found['device']}\n"
            f"  {found['param_count']:.2f} M parameters, {found['infer_gmacs']:.3f} GMACs an image\n"
            f"  {found[f'{kind}_step_time']:.2f} ms a step, {found[f'{kind}_samples_per_sec']:.1f} images/s"
            + (f", {found['memory_mb']:.0f} MB" if "memory_mb" in found else "")
        )
        if slowest:
            print_rows(
                [["operator", "ms", "calls"]] + [[e["name"], f"{e['ms']:.3f}", str(e["calls"])] for e in slowest],
                right=(1, 2),
            )


def _is_pipeline(model: str) -> bool:
    from pathlib import Path

    return any((folder / "model_index.json").is_file() for folder in (Path(model), Path(model) / "pipeline"))


def _profile_pipeline(model: str, call: list[str], device: str | None, dtype: str, as_json: bool) -> None:
    from ..zoo.inference.profile import DTYPES
    from ..zoo.inference.profile_pipeline import profile_pipeline, table_of, tokens_of
    from ..zoo.inference.sample import open_pipeline

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    pipe = open_pipeline(model).to(pick_device(device), DTYPES[dtype])
    found = profile_pipeline(pipe, **dict(map(_argument, call)))
    if as_json:
        tokens = [{"site": s, "queries": q, "keys": k, "calls": n} for (s, q, k), n in found.tokens.items()]
        print_json(
            {"operators": found.rows(), "steps": found.steps(), "tokens": tokens, "peak_bytes": found.peak_bytes}
        )
        return
    steps = found.steps()
    peak = f", {found.peak_bytes / 2**20:.0f} MB at most" if found.peak_bytes else ""
    typer.echo(
        f"{model}: {found.total.ms:.0f} ms operator by operator, {found.total.flops / 1e9:.2f} GFLOP, "
        f"{len(steps)} steps{peak}"
    )
    print_rows(table_of(found), right=(2, 3, 4, 5, 6))
    rows = [[str(s["step"]), f"{s['ms']:.1f}", f"{s['gflops']:.2f}", f"{s['mb']:.1f}"] for s in steps]
    print_rows([["step", "ms", "GFLOP", "MB"], *rows], right=(0, 1, 2, 3))
    for (queries, keys), paths in tokens_of(found).items():
        more = "" if len(paths) == 1 else f" … {paths[-1]} ({len(paths)})"
        typer.echo(f"{queries} queries x {keys} keys: {paths[0]}{more}")


def _argument(word: str) -> tuple[str, object]:
    """Name and value of NAME=VALUE; a value that is no Python literal is text."""
    from ast import literal_eval

    name, equals, value = word.partition("=")
    if not (name and equals):
        raise ValueError(f"--set {word!r} must be NAME=VALUE")
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _measure(model, img_size, batch_size, train, dtype, device, repeats, operators) -> dict:
    from pathlib import Path

    import timm

    from .. import zoo  # noqa: F401
    from ..zoo.inference.profile import profile_model
    from ..zoo.inference.source import open_model
    from ..zoo.tasks.model import make_model

    options = {"batch_size": batch_size, "device": pick_device(device), "dtype": dtype, "train": train}
    options |= {"repeats": repeats, "operators": operators}
    if not Path(model).exists() and timm.is_model(model.split(".")[0]):
        cfg = timm.get_pretrained_cfg(model)
        channels, side = (cfg.input_size[0], cfg.input_size[-1]) if cfg else (3, 224)
        side = img_size or side
        classes = cfg.num_classes if cfg else 1000
        built = make_model({"name": model}, num_classes=classes, in_chans=channels, img_size=side)
        return profile_model(built, (channels, side, side), **options)
    opened = open_model(model, img_size=img_size)
    return profile_model(opened.model, tuple(opened.preprocessing["input_size"]), **options)
