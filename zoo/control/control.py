"""Control: edits at work in a generator, a context manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..sites import Call, Interception, Layout, Moment, Schedule, Site, find
from ..sites.intercept import Following
from ..sites.schedule import ContextRecorder, branch_rows
from .edit import Context, Edit
from .rows import Rows
from .terms import plain_terms, run
from .words import find_words

MULTIPLE = 8  # of the value's size, which fused attention asks for


class _Interception(Interception):
    """Tells the Control of the batch before each forward."""

    def __init__(self, control: Control, **options: Any):
        super().__init__(control.pipe_or_model, control.attend, plan=control.plan, **options)
        self.control = control

    def moment(self, component: str, arguments: dict[str, Any]) -> Moment:
        recorder = self.models[component].__dict__.get("cache_context")
        context = recorder.now if isinstance(recorder, ContextRecorder) else None
        batch = next(len(x) for x in arguments.values() if isinstance(x, Tensor | list) and len(x))
        guided = None if self.pipe is None else getattr(self.pipe, "do_classifier_free_guidance", None)
        parts = {"cond": slice(0, batch)} if self.control.only_cond else branch_rows(context, batch, guided)
        if parts is None and guided:
            raise ValueError(
                f"the pipeline guides, but a batch of {batch} does not hold cond and uncond rows equally often"
            )
        unserved = next((edit for edit in self.control.edits if edit.guidance == "uncond"), None)
        if unserved is not None and guided is False:
            raise ValueError(f"{unserved} is for the rows of guidance='uncond'; guidance is off")
        moment = replace(super().moment(component, arguments), rows=parts)
        self.control.see(moment, Rows(batch, self.control.branches, parts))
        return moment


@dataclass
class Seen:
    """Numbers of one site, for the report.

    Attributes:
        edits: steps in which each edit was at work.
        shape: of an operation: batch, queries, keys, heads, head_dim, value_dim.
        rows: rows that the edited attention had.
        calls: forwards that were edited.
    """

    edits: dict[str, set[int]] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    rows: int = 0
    calls: int = 0


def flatten(edits: Any) -> Iterator[Edit]:
    """Edits of nested sequences, in order.

    Raises:
        TypeError: something that is no edit.
    """
    for edit in edits:
        if isinstance(edit, Edit):
            yield edit
        elif isinstance(edit, Sequence) and not isinstance(edit, str):
            yield from flatten(edit)
        else:
            raise TypeError(f"edits must be edits or sequences of edits, got a {type(edit).__name__}")


class Control:
    """Steers a generator through its attention; a context manager.

    with Control(pipe, edits.KeyMean("reference", delta=1.15)) as control:
        image = pipe(image=photo, prompt="make the rose blue").images[0]
    print(control.report())

    Args:
        pipe_or_model: pipeline, transformer or UNet of diffusers, or a `VideoDiT`. Steps as fractions, guidance and
            words as text need the pipeline.
        edits: edits, or sequences of edits, such as recipes return; they compose in this order.
        branches: names of the prompts of one call, such as ("source", "target").
        words: name → token numbers, or (prompt, word), or (prompt, word, tokenizer).
        total_steps: steps of a run, for models without a pipeline.
        maps: "allow" lets edits make maps of queries x keys; "raise" refuses those that do.

    Attributes:
        edits: in order.
        sites: attentions of the generator.
        words: token numbers by name.
        grid: tokens of the last forward, along (t, h, w) or (h, w).
        at: pipeline and tensors of the callback that runs.

    Raises:
        ValueError, TypeError: an edit that the generator cannot serve; the message names it. Nothing is changed then.
    """

    def __init__(
        self,
        pipe_or_model: Any,
        *edits: Any,
        branches: Sequence[str] | None = None,
        words: Mapping[str, Any] | None = None,
        total_steps: int | None = None,
        maps: str = "raise",
    ):
        if maps not in ("raise", "allow"):
            raise ValueError(f"maps={maps!r} must be 'raise' or 'allow'")
        self.pipe_or_model, self.total_steps, self.allow_maps = pipe_or_model, total_steps, maps == "allow"
        self.sites = find(pipe_or_model)
        self.branches = tuple(branches or ())
        if len(set(self.branches)) != len(self.branches):
            raise ValueError(f"branches={self.branches} must have different names")
        self.words = {name: find_words(pipe_or_model, name, word) for name, word in (words or {}).items()}
        self.edits: list[Edit] = []
        self._sites: dict[str, list[Edit]] = {}
        self._interception: _Interception | None = None
        self._handles: list[Any] = []
        self.only_cond, self.at = False, (None, {})
        self._last: tuple[int, float] = (0, 0.0)
        self.rows = Rows(0)
        self.grid: tuple[int, ...] | None = None
        self.seen: dict[str, Seen] = {}
        self.add(*edits)

    def add(self, *edits: Any, schedule: Schedule | None = None) -> Any:
        """Add edits, at the end; before installing.

        Args:
            edits: edits, or sequences of edits.
            schedule: replaces that of the edits.

        Returns:
            The edit, or the list of edits if there are several.

        Raises:
            ValueError, TypeError: an edit that the generator cannot serve.
            RuntimeError: the Control is installed.
        """
        if self.installed:
            raise RuntimeError("this Control is installed; add edits before, or remove it first")
        new = list(flatten(edits))
        added = {path: list(found) for path, found in self._sites.items()}
        for edit in new:
            if schedule is not None:
                edit.schedule = schedule
            for path in self._check(edit):
                others = added.setdefault(path, [])
                owner = next((x for x in others if x.owner), None)
                if edit.owner and owner is not None and not (hasattr(owner, "join") and hasattr(edit, "join")):
                    raise ValueError(f"{edit} and {owner} both own the attention of {path}; a site has one owner")
                others.append(edit)
        self.edits += new
        self._sites = added
        return new[0] if len(new) == 1 else new

    def _check(self, edit: Edit) -> list[str]:
        """Paths of the sites of an edit, which the generator must be able to serve."""
        if edit.needs and not self.allow_maps:
            raise ValueError(f"{edit} makes maps ({edit.needs}); say maps='allow' to accept that")
        if missing := [name for name in edit.words if name not in self.words]:
            raise ValueError(f"{edit} uses the words {missing}; words= has {sorted(self.words)}")
        if missing := [name for name in edit.branches if name not in self.branches]:
            raise ValueError(f"{edit} uses the branches {missing}; branches= has {self.branches}")
        edit.check(self)
        found = edit.sites(self.sites)
        elsewhere = type(edit).latents is not Edit.latents or type(edit).hooks is not Edit.hooks
        if not found and not elsewhere:
            raise ValueError(f"{edit} has no site: where is {edit.where}, of {len(self.sites)} attentions")
        return [site.path for site in found]

    @property
    def installed(self) -> bool:
        """True while the Control is at work."""
        return self._interception is not None

    def install(self) -> Control:
        """Start; all or nothing.

        Raises:
            ValueError: a site that cannot be intercepted, or that somebody else owns.
            RuntimeError: it is installed already.
        """
        if self.installed:
            raise RuntimeError("this Control is installed already")
        sites = [site for site in self.sites if site.path in self._sites]
        owner = any(edit.owner for edit in self.edits)
        options = {"schedule": Schedule(steps=(None, None)), "total_steps": self.total_steps, "owner": owner}
        made = _Interception(self, sites=sites or self.sites, **options)
        made.install()
        try:
            for edit in self.edits:
                self._handles += edit.hooks(self)
        except Exception:
            self._unhook()
            made.remove()
            raise
        self._interception = made
        self.seen, self._last = {}, (0, 0.0)
        for edit in self.edits:
            edit.begin()
        return self

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def remove(self) -> None:
        """End: processors and hooks are the objects that they were. Without effect when not installed."""
        self._unhook()
        if self._interception is not None:
            self._interception.remove()
            self._interception = None

    def __enter__(self) -> Control:
        return self.install()

    def __exit__(self, *error: object) -> None:
        self.remove()

    def see(self, moment: Moment, rows: Rows) -> None:
        """Notes the batch of the forward that follows; edits begin anew with the first step of a run."""
        self.rows = rows
        step, noise = moment.step or 0, moment.noise or 0.0
        if step == 0 and noise > self._last[1]:
            for edit in self.edits:
                edit.begin()
        self._last = (step, noise)
        for edit in self.edits:
            edit.now = edit.schedule.active(moment)

    def plan(self, site: Site, layout: Layout, moment: Moment) -> tuple | None:
        """Plans of the edits that are at work at a site in the forward that follows."""
        self.grid = layout.grid
        context = Context(site, layout, moment, self.rows, self.words)
        plans = []
        for edit in self._sites.get(site.path, ()):
            if not self.rows.of(None, edit.guidance):
                continue  # the other branch of guidance, in a call of its own
            if edit.schedule.active(moment) and (plan := edit.plan(context)) is not None:
                plans.append((edit, plan))
                self.seen.setdefault(site.path, Seen()).edits.setdefault(str(edit), set()).add(moment.step or 0)
        return (self.rows.batch, tuple(plans)) if plans else None

    def attend(self, call: Call, following: Following) -> Tensor:
        """The operation with the edits of `call.plan`."""
        batch, plans = call.plan
        if call.query.shape[0] % batch:
            raise ValueError(
                f"{call.site.path} attends with {call.query.shape[0]} sequences, not a multiple of the batch of "
                f"{batch}: its rows cannot be told apart"
            )
        return attend_edited(call, batch, plans, following, self._note)

    def _note(self, call: Call, widened: Call, rows: int) -> None:
        seen = self.seen[call.site.path]
        query = call.query
        seen.shape = (*query.shape[:2], call.key.shape[1], *query.shape[2:], widened.value.shape[-1])
        seen.rows, seen.calls = rows, seen.calls + 1

    def callback(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """For `callback_on_step_end` of a pipeline: edits of the latents, in order."""
        total = getattr(pipe, "num_timesteps", None) or self.total_steps
        self.at = (pipe, kwargs)
        if "latents" in kwargs:
            for edit in self.edits:
                kwargs["latents"] = edit.latents(step, total, kwargs["latents"], self)
        return kwargs

    @contextmanager
    def conditional(self) -> Iterator[None]:
        """Inside, the generator is called with conditional rows alone, whatever its pipeline does."""
        before, self.only_cond = self.only_cond, True
        try:
            yield
        finally:
            self.only_cond = before

    def same_noise(self, seed: int = 0, device: str | torch.device = "cpu") -> list[torch.Generator]:
        """Generators of equal noise for every branch, for `generator=` of a pipeline."""
        return [torch.Generator(device).manual_seed(seed) for _ in self.branches or ("",)]

    def report(self) -> str:
        """Edits by site and step, with rows, FLOPs and bytes over the model's own attention."""
        return "\n".join(_lines(self)) or "nothing has run yet"


def attend_edited(
    call: Call,
    batch: int,
    plans: Sequence[tuple[Edit, Any]],
    following: Following,
    note: Callable[[Call, Call, int], None] | None = None,
) -> Tensor:
    """An operation with edits.

    Args:
        call: the operation.
        batch: rows of the forward; the operation may hold several sequences of each.
        plans: edits with their plans, in order.
        following: attends.
        note: is told of the operation, what is attended to, and the rows of it.
    """
    for edit, plan in plans:
        call = edit.qkv(call, plan)
    terms = plain_terms(batch)
    for edit, plan in plans:
        terms = edit.edit_terms(terms, call, plan)
    observed = [(edit, plan, x) for edit, plan in plans if (x := edit.columns(call, plan)) is not None]
    widened = _widen(call, [x for *_, x in observed])
    owners = [(edit, plan) for edit, plan in plans if edit.owner]

    def attend(part: Call, rows: Sequence[int]) -> Tensor:
        if not owners:
            return following(part)
        (edit, plan), *others = owners
        for other, other_plan in others:
            plan = edit.join(plan, other, other_plan)  # type: ignore[attr-defined]
        return edit.attend(part, plan, rows, following)

    out = run(terms, widened, attend, batch)
    if note is not None and not torch.compiler.is_compiling():
        note(call, widened, sum(len(term.write) for term in terms) * call.query.shape[0] // batch)
    first = size = call.value.shape[-1]
    for edit, plan, x in observed:
        edit.read(call, plan, out[..., first : first + x.shape[-1]])
        first += x.shape[-1]
    out = out[..., :size]
    for edit, plan in plans:
        out = edit.out(call, plan, out)
    return out


def _widen(call: Call, columns: list[Tensor]) -> Call:
    """The operation with observed columns beside its values."""
    if not columns:
        return call
    value = call.value
    ones = torch.cat([x.to(value) for x in columns], dim=-1)
    size = value.shape[-1] + ones.shape[-1]
    ones = pad(ones, (0, -size % MULTIPLE))[None, :, None].expand(*value.shape[:3], -1)
    return replace(call, value=torch.cat([value, ones], dim=-1))


def cost(seen: Seen) -> tuple[float, float, int]:
    """FLOPs of the model's own attention, of the edited one, and bytes that the latter holds more in float16."""
    assert seen.shape is not None
    batch, queries, keys, heads, size, value = seen.shape
    plain = 2 * batch * queries * keys * heads * 2 * size
    edited = 2 * seen.rows * queries * keys * heads * (size + value)
    more = seen.rows - batch
    held = 2 * heads * (more * (queries + keys) * size + more * keys * value + seen.rows * keys * (value - size))
    return plain, edited, max(held, 0)


def _lines(control: Control) -> Iterator[str]:
    groups: dict[tuple, list[str]] = {}
    for path, seen in control.seen.items():
        if seen.shape is None:
            continue
        edits = tuple(f"{name} in {_ranges(steps)}" for name, steps in seen.edits.items())
        groups.setdefault((edits, seen.shape, seen.rows), []).append(path)
    for (edits, shape, rows), paths in groups.items():
        plain, edited, held = cost(Seen(shape=shape, rows=rows))
        first = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]} ({len(paths)})"
        yield f"{first}: {', '.join(edits)}"
        yield (
            f"    rows {shape[0]} → {rows}, FLOPs {plain / 1e9:.3g} → {edited / 1e9:.3g} G, "
            f"{held / 2**20:.3g} MiB more, queries x keys {shape[1]} x {shape[2]}"
        )
    for edit in control.edits:
        if edit.needs:
            yield f"{edit} makes maps: {edit.needs}"


def _ranges(steps: set[int]) -> str:
    """Steps as "0-4, 7"."""
    runs: list[list[int]] = []
    for step in sorted(steps):
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return "steps " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def explain(control: Control) -> str:
    """Sites, steps and rows of each edit of a Control before anything runs, and why it makes maps where it does."""
    lines = []
    for edit in control.edits:
        sites = edit.sites(control.sites)
        place = f"{len(sites)} of {len(control.sites)} attentions" if sites else "latents"
        steps = "all steps" if edit.schedule.steps is None else f"steps {edit.schedule.steps}"
        lines.append(f"{edit}: {place} ({edit.where}), {steps}, {edit.guidance} rows; " + _why(edit))
    return "\n".join(lines)


def _why(edit: Edit) -> str:
    return f"makes maps: {edit.needs}" if edit.needs else "no map"
