"""Plan of an acceleration: which keys the queries of each layer see, and in which steps and layers all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..sites.schedule import Bound, check_bound, step_number

Sizes = tuple[int | None, ...]
# fields that layers may override
RULE = ("window", "stride", "dilation", "mask", "options", "budget", "flat", "gated", "skip_threshold")


@dataclass(frozen=True)
class Plan:
    """Sparse self-attention of a generator.

    Attributes:
        window: tokens that a query sees along each axis, for `foveal.kernels.ops.na3d`: an integer for all axes, one
            per axis (t, h, w), None for a whole axis, or a list with one such window per head. Windows are cut to
            shorter axes; on images the entry of t is ignored.
        stride, dilation: of windows, an integer or one per axis.
        mask: instead of a window the blocks that queries see: a name in `foveal.kernels.masks`, "package.module:name",
            or a function `(query, key, grid) -> BlockMask`, with query and key `[B, *grid, heads, head_dim]`.
        options: keyword arguments of the mask.
        budget: share of the keys that a query sees, in (0, 1], for masks that take one; 1 is dense.
        flat: the mask is given tokens as one sequence in raster order, `[B, tokens, heads, head_dim]`.
        gated: add the coarse branch of VSA by the `to_gate_compress` of each layer (`load_gates`).
        skip_threshold: in (0, 1], leaves out blocks of a mask whose weights are below this share of the largest (skip
            softmax, see `foveal.kernels.ops.block_sparse_attention`); None for none.
        dense_steps: steps that stay dense: the first ones, or (first ones, last ones), integers or shares of the run
            in 0..1 as floats.
        dense_layers: layers that stay dense, negative ones from the last.
        noise: lowest and highest level of the noise in 0..1 between which attention is sparse; all when None.
        min_tokens: fewest tokens of the grid for which attention is sparse.
        layers: per layer, a mapping with some of window, stride, dilation, mask, options, budget, flat, gated and
            skip_threshold that replaces them, or "dense".
        name, source: title, and origin of the settings.

    Raises:
        ValueError, TypeError: a value outside of what is accepted; the message names it.
    """

    window: Any = None
    stride: Any = 1
    dilation: Any = 1
    mask: str | Callable[..., Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    flat: bool = False
    gated: bool = False
    skip_threshold: float | None = None
    dense_steps: Bound | tuple[Bound, Bound] = 0
    dense_layers: Sequence[int] = ()
    noise: tuple[float, float] | None = None
    min_tokens: int = 0
    layers: Mapping[int, Any] = field(default_factory=dict)
    name: str = "custom"
    source: str = ""

    def __post_init__(self) -> None:
        if (self.window is None) == (self.mask is None) and not self.layers:
            raise ValueError(f"window={self.window!r}, mask={self.mask!r}: a plan has one of them")
        if self.window is not None and self.mask is not None:
            raise ValueError(f"window={self.window!r}, mask={self.mask!r}: a plan has one of them")
        if self.mask is not None and not (callable(self.mask) or isinstance(self.mask, str)):
            raise TypeError(f"mask={self.mask!r} must be a name or a function (query, key, grid) -> BlockMask")
        for name in ("window", "stride", "dilation"):
            check_sizes(name, getattr(self, name), whole=name == "window")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget={self.budget!r} must be in (0, 1]")
        if self.skip_threshold is not None and (self.window is not None or not 0 < self.skip_threshold <= 1):
            raise ValueError(
                f"skip_threshold={self.skip_threshold!r} must be in (0, 1], with a mask instead of a window"
            )
        for bound in self.dense_first_and_last:
            check_bound("dense_steps", bound)
            if bound is None or bound < 0:
                raise ValueError(f"dense_steps={self.dense_steps!r} must be numbers of steps or shares of the run")
        if isinstance(self.dense_layers, int) or not all(isinstance(n, int) for n in self.dense_layers):
            raise ValueError(f"dense_layers={self.dense_layers!r} must be a list of integers")
        if not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise ValueError(f"min_tokens={self.min_tokens!r} must be an integer of at least 0")
        if self.noise is not None and not (len(self.noise) == 2 and 0 <= self.noise[0] <= self.noise[1] <= 1):
            raise ValueError(f"noise={self.noise!r} must be a lowest and a highest level in 0..1")
        object.__setattr__(self, "layers", {int(n): entry for n, entry in self.layers.items()})  # JSON has strings
        for number, entry in self.layers.items():
            if entry != "dense" and (not isinstance(entry, Mapping) or set(entry) - set(RULE)):
                raise ValueError(f'layers[{number}]={entry!r} must be "dense" or a mapping with some of {RULE}')
            self.of_layer(number)

    @property
    def dense_first_and_last(self) -> tuple[Bound, Bound]:
        steps = self.dense_steps
        return tuple(steps) if isinstance(steps, tuple | list) else (steps, 0)  # type: ignore[return-value]

    @property
    def needs_time(self) -> bool:
        """True if the timestep matters."""
        return self.noise is not None or any(self.dense_first_and_last)

    def is_sparse(self, step: int | None, total: int | None, noise: float | None) -> bool:
        """Return True if attention is sparse in a step.

        Raises:
            ValueError: shares of a run whose number of steps is unknown.
        """
        if self.noise is not None and noise is not None and not self.noise[0] <= noise <= self.noise[1]:
            return False
        first, last = self.dense_first_and_last
        if step is None or not (first or last):
            return True
        after = step_number(first, total) or 0
        if not last:
            return step >= after
        if total is None:
            raise ValueError(f"dense_steps={self.dense_steps!r} counts from the end of a run: give total_steps=")
        return after <= step < total - (step_number(last, total) or 0)

    def of_layer(self, layer: int) -> Plan | None:
        """The plan of one layer, None where it is dense."""
        entry = self.layers.get(layer, {} if self.window is not None or self.mask is not None else "dense")
        if entry == "dense":
            return None
        changes = dict(entry)
        if "window" in changes:
            changes = {"mask": None, "skip_threshold": None} | changes
        if "mask" in changes and changes["mask"] is not None:
            changes.setdefault("window", None)
        return replace(self, **changes, layers={}) if changes else replace(self, layers={})

    @property
    def words(self) -> str:
        """Visible keys of a query, in a few words."""
        if self.window is None:
            mask = self.mask if isinstance(self.mask, str) else getattr(self.mask, "__name__", "a function")
            rest = {"budget": self.budget, "skip_threshold": self.skip_threshold}
            rest = dict(self.options) | {name: value for name, value in rest.items() if value is not None}
            return f"mask {mask}" + "".join(f" {name}={value}" for name, value in rest.items())
        text = f"window {_by_axis(self.window)}"
        for name in ("stride", "dilation"):
            value = getattr(self, name)
            text += "" if value in (1, (1, 1, 1), [1, 1, 1]) else f" {name} {_by_axis(value)}"
        return text

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            TypeError: a mask that is a function and has no name in a module.
        """
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Fields that differ from their defaults; a function becomes "package.module:name"."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if callable(self.mask):
            place = f"{self.mask.__module__}:{getattr(self.mask, '__qualname__', '')}"
            if "<" in place or place.startswith("__main__"):
                raise TypeError(f"mask={self.mask!r} is not in a module, so a file cannot name it")
            values["mask"] = place
        default = asdict(Plan(window=1))
        default["window"] = None
        return {name: value for name, value in values.items() if value != default[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """A plan of a mapping.

        Raises:
            ValueError: an unknown field, or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"a plan has no {unknown}; its fields are {sorted(known)}")
        return cls(**values)


def read_plan(path: str | Path) -> Plan:
    """A plan of a JSON or YAML file.

    Raises:
        ValueError: not a mapping, or fields that a plan has not.
    """
    text = Path(path).read_text()
    if Path(path).suffix in (".yaml", ".yml"):
        import yaml

        values = yaml.safe_load(text)
    else:
        values = json.loads(text)
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected a mapping with the fields of a plan")
    return Plan.from_dict(values)


def is_per_head(sizes: Any) -> bool:
    """Return True if sizes are a list of one entry per head."""
    return isinstance(sizes, Sequence) and not isinstance(sizes, str) and isinstance(sizes[0], Sequence)


def check_sizes(name: str, sizes: Any, *, whole: bool) -> None:
    """Raises ValueError unless sizes are as `Plan` describes them."""
    if sizes is None and whole:
        return
    entries = sizes if isinstance(sizes, Sequence) and not isinstance(sizes, str) else [sizes]
    if len(entries) and isinstance(entries[0], Sequence):
        for entry in entries:
            check_sizes(name, entry, whole=whole)
        return
    good = ((isinstance(n, int) and not isinstance(n, bool) and n >= 1) or (whole and n is None) for n in entries)
    if not entries or len(entries) > 3 or not all(good):
        raise ValueError(f"{name}={sizes!r} must be an integer from 1 on, or one per axis (t, h, w)")


def _by_axis(sizes: Any) -> str:
    if is_per_head(sizes):
        return f"of {len(sizes)} heads"
    return "x".join("all" if n is None else str(n) for n in (sizes if isinstance(sizes, Sequence) else [sizes]))


def on_axes(name: str, sizes: Any, grid: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
    """Sizes of one head on a grid: entries of the axes that the grid has, whole axes in numbers.

    Raises:
        ValueError: another number of entries than axes.
    """
    rank = len(grid)
    entries = tuple(sizes) if isinstance(sizes, Sequence) else (sizes,) * rank
    if axes is not None and len(entries) == 3 and rank < 3:
        entries = tuple(entries[axis] for axis in axes)
    elif len(entries) == 3 and rank == 2:
        entries = entries[1:]
    if len(entries) != rank:
        raise ValueError(f"{name}={sizes!r} must have an entry for each of the {rank} axes of the grid {grid}")
    return tuple(n if size is None else size for size, n in zip(entries, grid, strict=True))


def fit_window(plan: Plan, grid: tuple[int, ...], axes: tuple[int, ...] | None) -> dict[str, Any] | None:
    """Arguments of a neighborhood on a grid; None if every head sees all of it.

    An axis that is shorter than the window is seen whole; stride and dilation give way to the window.
    """

    def fit(window: Any, stride: Any, dilation: Any) -> dict[str, tuple[int, ...]]:
        window, stride, dilation = (
            on_axes(name, x, grid, axes) for name, x in (("window", window), ("stride", stride), ("dilation", dilation))
        )
        window = tuple(min(w, n) for w, n in zip(window, grid, strict=True))
        return {
            "window": window,
            "stride": tuple(min(s, w) for s, w in zip(stride, window, strict=True)),
            "dilation": tuple(min(d, n // w) for d, n, w in zip(dilation, grid, window, strict=True)),
        }

    sizes = (plan.window, plan.stride, plan.dilation)
    heads = next((len(x) for x in sizes if is_per_head(x)), None)
    if heads is None:
        one = fit(*sizes)
        return None if one["window"] == grid else one
    fitted = [fit(*(x[head] if is_per_head(x) else x for x in sizes)) for head in range(heads)]
    if all(entry["window"] == grid for entry in fitted):
        return None
    return {name: tuple(entry[name] for entry in fitted) for name in ("window", "stride", "dilation")}
