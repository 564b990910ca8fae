"""The order of arguments in each release of NATTEN, and functions and modules that take it.

An order is a list of names, each with its default if it has one. Names that our function does not know choose among
NATTEN's kernels: they are accepted and change nothing.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, Signature, signature
from typing import Any

from torch import nn

from . import functional, modules, pairs

Version = tuple[int, ...]
RELEASES = (
    "0.14.1", "0.14.2", "0.14.4", "0.14.5", "0.14.6", "0.15.0", "0.15.1", "0.17.0", "0.17.1", "0.17.3", "0.17.4",
    "0.17.5", "0.20.0", "0.20.1", "0.21.0", "0.21.1", "0.21.5", "0.21.6", "0.21.7",
)  # fmt: skip


def as_version(text: str) -> Version:
    """Numbers of a release: "0.17.5" is (0, 17, 5)."""
    return tuple(int(part) for part in text.split("."))


_TILES = "q_tile_shape=None kv_tile_shape=None backward_q_tile_shape=None backward_kv_tile_shape=None"
_BACKEND = (
    f"backend=None {_TILES} backward_kv_splits=None backward_use_pt_reduction=False run_persistent_kernel=True "
    "kernel_schedule=None torch_compile=False"
)
_NA_20 = (
    "query key value kernel_size stride=1 dilation=1 is_causal=False scale=None additional_keys=None "
    f"additional_values=None attention_kwargs=None {_BACKEND}"
)
_NA_17 = "query key value kernel_size dilation=1 is_causal=False rpb=None scale=None"
_FMHA = _BACKEND.replace("_shape", "_size")
NA = {
    "0.17.0": _NA_17,
    "0.17.4": f"{_NA_17} additional_keys=None additional_values=None xformers_kwargs=None",
    "0.20.0": f"{_NA_20} try_fuse_additional_kv=False",
    "0.21.0": _NA_20,
    "0.21.5": f"{_NA_20} return_lse=False",
}
ATTENTION = {
    "0.20.0": f"query key value scale=None {_FMHA} return_lse=False",
    "0.21.5": (
        "query key value is_causal=False scale=None seqlens_Q=None seqlens_KV=None cumulative_seqlen_Q=None "
        f"cumulative_seqlen_KV=None max_seqlen_Q=None max_seqlen_KV=None {_FMHA} return_lse=False"
    ),
}
MERGE = {
    "0.20.0": "outputs lse_tensors torch_compile=True",
    "0.21.5": "outputs lse_tensors torch_compile=True use_autograd_fix=True",
}
_QK_17 = "query key kernel_size dilation=1 additional_keys=None is_causal=False rpb=None"
_AV_17 = "attn value kernel_size dilation=1 additional_values=None is_causal=False"
_CUBE = "kernel_size_d kernel_size dilation_d dilation"


def _pair_orders(rank: int) -> dict[str, dict[str, str | None]]:
    """Orders of the functions on logits and weights, by name and first release; None: gone."""
    sizes = _CUBE if rank == 3 else "kernel_size dilation"
    first = "0.15.0" if rank == 3 else "0.14.5"
    old = f"natten{rank}d"
    found: dict[str, dict[str, str | None]] = {
        f"{old}qkrpb": {first: f"query key rpb {sizes}", "0.17.5": None},
        f"{old}qk": {first if rank == 3 else "0.14.6": f"query key {sizes}", "0.17.5": None},
        f"{old}av": {first if rank == 3 else "0.14.6": f"attn value {sizes}", "0.17.5": None},
        f"na{rank}d_qk": {"0.15.0": f"query key {sizes}", "0.15.1": f"query key {sizes} additional_keys=None"},
        f"na{rank}d_qk_with_bias": {
            "0.15.0": f"query key bias {sizes}",
            "0.15.1": f"query key bias {sizes} additional_keys=None",
            "0.17.0": None,
        },
        f"na{rank}d_av": {"0.15.0": f"attn value {sizes}", "0.15.1": f"attn value {sizes} additional_values=None"},
    }
    found[f"na{rank}d_qk"] |= {"0.17.0": _QK_17, "0.20.0": None}
    found[f"na{rank}d_av"] |= {"0.17.0": _AV_17, "0.20.0": None}
    if rank < 3:
        found[f"{old}qkrpb"]["0.14.1"] = "query key rpb dilation"
        found[f"{old}av"]["0.14.1"] = "attn value dilation"
    return found


_DROPS = "qkv_bias=True qk_scale=None attn_drop=0.0 proj_drop=0.0"
_MODULE_20 = "num_heads kernel_size stride=1 dilation=1 is_causal=False qkv_bias=True qk_scale=None proj_drop=0.0"
_MODULE_17 = f"dim num_heads kernel_size dilation=1 is_causal=False rel_pos_bias=False {_DROPS}"
MODULES = {
    "0.14.1": f"dim kernel_size num_heads {_DROPS} dilation=None",
    "0.14.5": f"dim num_heads kernel_size dilation=1 bias=True {_DROPS}",
    "0.17.0": _MODULE_17,
    "0.17.4": f"{_MODULE_17} use_experimental_ops=False",
    "0.20.0": f"dim {_MODULE_20}",
    "0.20.1": f"embed_dim {_MODULE_20}",
}
MODULES_3D = {
    "0.15.0": f"dim num_heads kernel_size kernel_size_d=None dilation=1 dilation_d=None bias=True {_DROPS}"
} | {since: order for since, order in MODULES.items() if as_version(since) >= (0, 17)}
RENAMED = {"bias": "rpb"}  # arguments of functions, whose own names stand on the right
RENAMED_IN_MODULES = {"bias": "rel_pos_bias", "embed_dim": "dim"}


def find_release(version: str) -> str:
    """The newest known release of a series, such as "0.17", or up to a release of it, such as "0.17.2".

    Raises:
        ValueError: no release of NATTEN that is known here.
    """
    parts = version.removeprefix("v").split("+")[0].split(".") if isinstance(version, str) else []
    known = []
    if len(parts) in (2, 3) and all(part.isdecimal() for part in parts):
        wanted = tuple(map(int, parts))
        known = [x for x in RELEASES if as_version(x)[:2] == wanted[:2] and as_version(x)[: len(wanted)] <= wanted]
    if not known:
        series = sorted({x.rpartition(".")[0] for x in RELEASES})
        raise ValueError(f"version={version!r} must be of NATTEN's series {', '.join(series)}, such as '0.17'")
    return known[-1]


def _at(history: Mapping[str, Any], release: str) -> Any:
    """The entry of the newest release up to this one; None before the first."""
    found = [since for since in history if as_version(since) <= as_version(release)]
    return history[max(found, key=as_version)] if found else None


def _parameters(order: str) -> list[Parameter]:
    found = []
    for word in order.split():
        name, has_default, default = word.partition("=")
        value = literal_eval(default) if has_default else Parameter.empty
        found.append(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value))
    return found


def _bind(name: str, parameters: list[Parameter], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults included.

    Raises:
        TypeError: too many, unknown or missing arguments.
    """
    names = [p.name for p in parameters]
    if len(args) > len(names):
        raise TypeError(f"{name}() takes {len(names)} arguments, {', '.join(names)}; got {len(args)}")
    given = dict(zip(names, args, strict=False))
    for key, value in kwargs.items():
        if key not in names:
            raise TypeError(f"{name}() has no argument {key!r} in this release of NATTEN; it takes {', '.join(names)}")
        if key in given:
            raise TypeError(f"{name}() got {key!r} by place and by name")
        given[key] = value
    for p in parameters:
        if p.name not in given:
            if p.default is Parameter.empty:
                raise TypeError(f"{name}() needs {p.name!r}; it takes {', '.join(names)}")
            given[p.name] = p.default
    return given


def _accepted(function: Callable) -> set[str] | None:
    """Names that a function takes; None for any."""
    parameters = signature(function).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}


def in_order(name: str, function: Callable[..., Any], order: str) -> Callable[..., Any]:
    """A function that takes arguments in this order, by place or by name, and hands them to `function` by name."""
    parameters = _parameters(order)
    accepted = _accepted(function)
    own = {p.name: RENAMED.get(p.name, p.name) for p in parameters}
    own = {key: value for key, value in own.items() if accepted is None or value in accepted}

    def ordered(*args: Any, **kwargs: Any) -> Any:
        given = _bind(name, parameters, args, kwargs)
        return function(**{value: given[key] for key, value in own.items()})

    ordered.__name__ = ordered.__qualname__ = name
    ordered.__doc__ = function.__doc__
    ordered.__signature__ = Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return ordered


def _pair_functions(release: str) -> dict[str, Callable]:
    found = {}
    for rank in (1, 2, 3):
        for name, history in _pair_orders(rank).items():
            order = _at(history, release)
            if order is None:
                continue
            function: Callable = partial(pairs.qk if "qk" in name else pairs.av, rank)
            if "kernel_size_d" in order:
                function = functional.with_depth(function)
            elif "kernel_size" not in order:
                function = functional.without_size(function)
            found[name] = in_order(name, function, order)
    return found


def _module(name: str, base: type[nn.Module], order: str, release: str) -> type[nn.Module]:
    parameters = _parameters(order)
    accepted = _accepted(base.__init__) or set()
    pads = as_version(release) < (0, 17)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = _bind(name, parameters, args, kwargs)
        given = {RENAMED_IN_MODULES.get(key, key): value for key, value in given.items()}
        given |= {"pad": True} if pads else {}
        given |= {"rel_pos_bias": True} if as_version(release) < (0, 14, 5) else {}
        base.__init__(self, **{key: value for key, value in given.items() if key in accepted})

    __init__.__signature__ = Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), *parameters]
    )
    return type(name, (base,), {"__init__": __init__, "__module__": "natten", "__doc__": base.__doc__})


def functions_of(release: str) -> dict[str, Callable]:
    """Functions of `natten.functional` in a release."""
    found = _pair_functions(release)
    if (order := _at(NA, release)) is not None:
        for rank in (1, 2, 3):
            found[f"na{rank}d"] = in_order(f"na{rank}d", _of_rank(rank), order)
    if (order := _at(ATTENTION, release)) is not None:
        found["neighborhood_attention_generic"] = in_order(
            "neighborhood_attention_generic", functional.neighborhood_attention, _at(NA, release)
        )
        found["attention"] = in_order("attention", functional.attention, order)
        merge = partial(functional.merge_attentions, with_lse=as_version(release) >= (0, 21, 5))
        merge.__doc__ = functional.merge_attentions.__doc__
        found["merge_attentions"] = in_order("merge_attentions", merge, _at(MERGE, release))
    return found


def _of_rank(rank: int) -> Callable:
    return partial(functional.neighborhood_attention, rank=rank)


def modules_of(release: str) -> dict[str, type[nn.Module]]:
    """Classes of `natten` in a release."""
    found = {}
    for rank, history in ((1, MODULES), (2, MODULES), (3, MODULES_3D)):
        if (order := _at(history, release)) is not None:
            name = f"NeighborhoodAttention{rank}D"
            found[name] = _module(name, getattr(modules, name), order, release)
    if as_version(release) < (0, 14, 5):
        found["NeighborhoodAttention"] = found["NeighborhoodAttention2D"]
    return found
