"""Interception: at chosen sites, do something else in place of the attention operation, and take it back.

The processor of a site is replaced by one that runs it as it is and catches its attention operation, so that
projections, norms, rotary embeddings, LoRA and gates stay the model's own. The operation is always
`scaled_dot_product_attention` under a function mode: where a processor chooses a backend, a copy of it with the native
backend is run, and the backend that the user chose computes what is left dense. Under Ulysses the operation is
that between the exchanges, over all tokens and a part of the heads.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from .layout import Layout, complete
from .models import arguments_of, find, models_of, row
from .schedule import BRANCHES, Clock, ContextRecorder, Moment, Schedule, branch_rows, noise_level
from .site import Operation, Site, resolve_layers

OURS = (__name__.partition(".")[0], "diffusers")  # packages whose processors run one known operation


@dataclass(frozen=True)
class Call:
    """One attention operation.

    Attributes:
        site: where it is.
        index: its number among the operations of this call of the site.
        query, key, value: `[B, tokens, heads, head_dim]` after norms and rotary embeddings; keys may have fewer heads.
        mask: bool or additive, broadcastable to `[B, heads, queries, keys]`, or None.
        scale: factor on query . key; head_dim ** -0.5 when None.
        causal, dropout: as `scaled_dot_product_attention` takes them.
        plan: result of `Interception.plan` for the site before this forward.
        hidden_states: input of the site, `[B, tokens, channels]`, those of text that is projected apart not among them.
    """

    site: Site
    index: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    causal: bool = False
    dropout: float = 0.0
    plan: Any = None
    hidden_states: Tensor | None = None

    @property
    def operation(self) -> Operation:
        """Streams of queries and keys."""
        return self.site.operation(self.index)

    def even(self) -> Call:
        """The operation with zeros in the narrower of queries and values.

        Fused kernels ask for one head dim; others make the map of queries and keys.
        """
        size, wide = self.query.shape[-1], self.value.shape[-1]
        if size == wide:
            return self
        if size > wide:
            return replace(self, value=pad(self.value, (0, size - wide)))
        scale = size**-0.5 if self.scale is None else self.scale
        query, key = (pad(x, (0, wide - size)) for x in (self.query, self.key))
        return replace(self, query=query, key=key, scale=scale)

    def dense(self) -> Tensor:
        """Plain attention, `[B, tokens, heads, value_dim]`."""
        call = self.even()
        query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=call.mask,
            dropout_p=call.dropout,
            is_causal=call.causal,
            scale=call.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)
        return out if call.value is self.value else out[..., : self.value.shape[-1]]


Following = Callable[[Call], Tensor]
Attend = Callable[[Call, Following], Tensor]


class Link:
    """One interception at one site; its plan is set before every forward, None makes it absent."""

    def __init__(self, attend: Attend, owner: bool, heads: tuple[int, ...] | None):
        self.attend, self.owner, self.heads = attend, owner, heads
        self.plan: Any = None
        self.rows: slice | None = None

    def __call__(self, call: Call, following: Following) -> Tensor:
        """The operation, changed for the rows and heads that are chosen."""
        if self.rows is None and self.heads is None:
            return self.attend(replace(call, plan=self.plan), following)
        out = following(call)
        if self.heads is not None and call.query.shape[2] != call.key.shape[2]:
            raise ValueError(
                f"{call.site.path} shares keys between heads, so heads={self.heads} cannot be changed alone"
            )
        rows = slice(None) if self.rows is None else self.rows
        part = replace(call, plan=self.plan, mask=_take_rows(call.mask, rows, call.query.shape[0]))
        if call.hidden_states is not None:
            part = replace(part, hidden_states=call.hidden_states[rows])
        heads = slice(None) if self.heads is None else list(self.heads)
        chosen = (x[rows][:, :, heads] for x in (call.query, call.key, call.value))
        part = replace(part, **dict(zip(("query", "key", "value"), chosen, strict=True)))
        if self.heads is not None and part.mask is not None and part.mask.dim() == 4 and part.mask.shape[1] > 1:
            part = replace(part, mask=part.mask[:, heads])
        changed = out.clone()
        some = changed[rows].clone()
        some[:, :, heads] = self.attend(part, following).to(out.dtype)
        changed[rows] = some
        return changed


def _take_rows(mask: Tensor | None, rows: slice, batch: int) -> Tensor | None:
    return mask if mask is None or mask.dim() < 3 or mask.shape[0] != batch else mask[rows]


class Catcher(TorchFunctionMode):
    """Hands the attention operations inside it to an intercepted processor."""

    def __init__(self, processor: InterceptedProcessor, hidden_states: Tensor | None):
        super().__init__()
        self.processor, self.hidden_states, self.count = processor, hidden_states, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        out = self.processor.attend(self.count, self.hidden_states, *args, **kwargs)
        self.count += 1
        return out


class InterceptedProcessor:
    """Runs a processor as it is and catches its attention operation; see `intercepted` for how it is made.

    Attributes:
        site: whose processor it is.
        inner: the processor that it stands for; its backend and its parallelism are read and set through this one.
        links: interceptions of the operation, in order.
        may_skip: whether the processor may run without the operation.
    """

    def __init__(self, site: Site, inner: Any, may_skip: bool):
        self.site, self.may_skip = site, may_skip
        self.links: tuple[Link, ...] = ()
        self.stand_for(inner)

    def stand_for(self, inner: Any) -> None:
        """Run another processor from now on."""
        self.inner = inner
        self.native = copy.copy(inner) if hasattr(inner, "_attention_backend") else inner
        if self.native is not inner:
            from diffusers.models.attention_dispatch import AttentionBackendName

            self.native._attention_backend = AttentionBackendName.NATIVE

    @property
    def _attention_backend(self) -> Any:
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.inner._parallel_config = self.native._parallel_config = config

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The processor's own call."""
        if all(link.plan is None for link in self.links):
            return self.inner(*args, **kwargs)
        catcher = Catcher(self, args[1] if len(args) > 1 else kwargs.get("hidden_states"))
        with catcher:
            out = self.native(*args, **kwargs)
        if catcher.count == 0 and not self.may_skip:
            raise RuntimeError(
                f"{self.site.path}: {type(self.inner).__name__} ran no scaled_dot_product_attention that could be "
                "intercepted; choose the native attention backend and diffusers' default processors"
            )
        return out

    def attend(
        self, index, hidden_states, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
        enable_gqa=False,
    ) -> Tensor:  # fmt: skip
        """The operation with every link that has a plan: `[B, heads, tokens, head_dim]`, as the operation itself."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        call = Call(
            self.site,
            index,
            query,
            key,
            value,
            attn_mask,
            scale,
            is_causal,
            dropout_p,
            hidden_states=hidden_states,
        )
        active = tuple(link for link in self.links if link.plan is not None)
        return self.follow(active, call).transpose(1, 2)

    def follow(self, links: tuple[Link, ...], call: Call) -> Tensor:
        """The operation with these links."""
        if links:
            return links[0](call, lambda changed: self.follow(links[1:], changed))
        if self.native is self.inner:
            return call.dense()
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        size, call = call.value.shape[-1], call.even()
        return dispatch_attention_fn(
            call.query,
            call.key,
            call.value,
            attn_mask=call.mask,
            dropout_p=call.dropout,
            is_causal=call.causal,
            scale=call.scale,
            enable_gqa=call.query.shape[2] != call.key.shape[2],
            backend=self.inner._attention_backend,
        )[..., :size]


@lru_cache(maxsize=256)
def _class_for(inner: type) -> type:
    def call(self: InterceptedProcessor, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    # diffusers passes only the arguments that the signature names, and says so in a warning at most
    call.__signature__ = inspect.signature(inner.__call__)  # type: ignore[attr-defined]
    return type(f"Intercepted{inner.__name__}", (InterceptedProcessor,), {"__call__": call})


def intercepted(site: Site, may_skip: bool = False) -> InterceptedProcessor:
    """The intercepted processor of a site: the one that it has, or a new one, which is not set yet.

    Raises:
        ValueError: a processor whose operation cannot be caught; the message names it and says why.
    """
    processor = site.module.processor
    if isinstance(processor, InterceptedProcessor):
        return processor
    kind = type(processor)
    if kind.__module__.partition(".")[0] not in OURS:
        raise ValueError(
            f"{site.path} has {kind.__name__} of {kind.__module__}, a processor that is neither diffusers' nor ours; "
            "take it out before, or put it in after"
        )
    if isinstance(processor, nn.Module):
        raise ValueError(
            f"{site.path} has {kind.__name__}, a processor with weights (an IP-Adapter?); unload it "
            "or leave the site out"
        )
    return _class_for(kind)(site, processor, may_skip)


def check_parallel(site: Site) -> None:
    """Raises ValueError where a sequence goes around a ring, so that no rank sees all keys of its queries."""
    config = getattr(getattr(site.module.processor, "_parallel_config", None), "context_parallel_config", None)
    if (degree := getattr(config, "ring_degree", None) or 1) > 1:
        raise ValueError(
            f"{site.path} attends in a ring of ring_degree={degree}, which hands keys on piece by piece; "
            "use ulysses_degree instead"
        )


class Interception:
    """Something that is done to the attention operations of chosen sites; a context manager.

    Args:
        pipe_or_model: pipeline, transformer or UNet of diffusers, or a `VideoDiT`. Steps as fractions and branches
            need the pipeline, or `total_steps`.
        attend: `attend(call, following)` returns the output `[B, tokens, heads, value_dim]` of an operation;
            `following(call)` is that of the next interception, and of the model itself after the last. It runs inside
            blocks that may be compiled: it reads `call.plan` and no steps.
        sites: some of `find(pipe_or_model)`; all when None.
        schedule: when and where.
        plan: `plan(site, layout, moment)` is called before each forward and for each site; what it returns is
            `call.plan`, None leaves the site as it is. True when None.
        owner: whether attend decides which keys a query sees. One interception of a site may, and it comes last.
        total_steps: steps of the run, for models without a pipeline.

    Raises:
        ValueError: no site is left, or one that cannot be intercepted; nothing is changed then.
    """

    def __init__(
        self,
        pipe_or_model: Any,
        attend: Attend,
        *,
        sites: Sequence[Site] | None = None,
        schedule: Schedule | None = None,
        plan: Callable[[Site, Layout, Moment], Any] | None = None,
        owner: bool = False,
        total_steps: int | None = None,
    ):
        self.models = models_of(pipe_or_model)
        self.pipe = None if "" in self.models else pipe_or_model
        self.schedule, self.plan, self.owner = schedule or Schedule(), plan, owner
        every = find(pipe_or_model)
        sites = every if sites is None else list(sites)
        if self.schedule.layers is not None:
            layers = resolve_layers(every, self.schedule.layers)
            sites = [site for site in sites if site.layer in layers and site.kind != "refine"]
        if not sites:
            raise ValueError("no site is left to intercept: check sites= and schedule.layers")
        self.sites, self.attend = sites, attend
        self.heads = None if self.schedule.heads is None else tuple(sorted(self.schedule.heads))
        for site in sites:
            if self.heads and not 0 <= self.heads[0] <= self.heads[-1] < site.heads:
                raise ValueError(f"heads={self.heads} must be within the {site.heads} heads of {site.path}")
        self.clock = Clock(self.pipe, total_steps)
        self.links: dict[str, Link] = {}
        self.processors: dict[str, InterceptedProcessor] = {}
        self._handles: list[Any] = []
        self._recorders: list[tuple[nn.Module, ContextRecorder]] = []

    @property
    def installed(self) -> bool:
        return bool(self.links)

    def install(self) -> Interception:
        """Start. All sites are looked at before the first is changed.

        Raises:
            ValueError: a site that cannot be intercepted, or that another interception owns already.
            RuntimeError: it is installed already.
        """
        if self.installed:
            raise RuntimeError("this interception is installed already")
        found = {}
        for site in self.sites:
            check_parallel(site)
            may_skip = row(self.models[site.component]).may_skip  # type: ignore[union-attr]
            found[site.path] = intercepted(site, may_skip)
            if self.owner and any(link.owner for link in found[site.path].links):
                raise ValueError(f"{site.path} is owned by another interception already; remove that one first")
        self.processors = found
        for site in self.sites:
            processor, link = found[site.path], Link(self.attend, self.owner, self.heads)
            self.links[site.path] = link
            processor.links = tuple(sorted((*processor.links, link), key=lambda entry: entry.owner))
            if site.module.processor is not processor:
                _set_processor(site.module, processor)
        for component, model in self.models.items():
            hook = _BeforeForward(self, component)
            self._handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))
            self._record_context(model)
        return self

    def remove(self) -> None:
        """End: processors, hooks and methods are the objects that they were. Without effect when not installed."""
        for site in self.sites:
            processor, link = self.processors.get(site.path), self.links.pop(site.path, None)
            if processor is None or link is None:
                continue
            processor.links = tuple(entry for entry in processor.links if entry is not link)
            if not processor.links and site.module.processor is processor:
                _set_processor(site.module, processor.inner)
        for handle in self._handles:
            handle.remove()
        for model, recorder in self._recorders:
            recorder.users -= 1
            if recorder.users == 0 and model.__dict__.get("cache_context") is recorder:
                del model.__dict__["cache_context"]
        self._handles, self._recorders, self.processors = [], [], {}

    def __enter__(self) -> Interception:
        return self.install()

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _record_context(self, model: nn.Module) -> None:
        if not hasattr(model, "cache_context"):
            return
        recorder = model.__dict__.get("cache_context")
        if not isinstance(recorder, ContextRecorder):
            recorder = ContextRecorder(model.cache_context)  # type: ignore[arg-type]
            model.__dict__["cache_context"] = recorder
        recorder.users += 1
        self._recorders.append((model, recorder))

    def moment(self, component: str, arguments: dict[str, Any]) -> Moment:
        """Return the moment of a forward of a model.

        Raises:
            ValueError: the schedule asks for branches, and nothing tells them.
        """
        model = self.models[component]
        known = row(model)
        assert known is not None
        recorder = model.__dict__.get("cache_context")
        context = recorder.now if isinstance(recorder, ContextRecorder) else None
        timestep = arguments.get(known.timestep)
        step = total = noise = None
        if self.schedule.needs_time and timestep is not None:
            noise = noise_level(timestep, known.noise_scale, rises=known.rises)
            step, total = self.clock.see(noise, context)
        rows = None
        if self.schedule.branches is not None:
            batch = next(len(x) for x in arguments.values() if isinstance(x, Tensor | list) and len(x))
            guided = None if self.pipe is None else getattr(self.pipe, "do_classifier_free_guidance", None)
            rows = branch_rows(context, batch, guided)
            if rows is None:
                raise ValueError(
                    f"branches={tuple(self.schedule.branches)} cannot be told apart: {type(model).__name__} was called "
                    "without cache_context, and no pipeline says whether it guides"
                )
        return Moment(step, total, noise, rows)

    def before(self, component: str, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Set the plan of each site of a model for the forward that follows."""
        known = row(model)
        assert known is not None
        sites = [site for site in self.sites if site.component == component]
        for site in sites:
            if site.module.processor is not self.processors[site.path]:
                raise RuntimeError(
                    f"{site.path} was given {type(site.module.processor).__name__} after the interception "
                    "(fuse_qkv_projections, an IP-Adapter or set_attn_processor): remove the interception first, then "
                    "install it again"
                )
            check_parallel(site)
        arguments = arguments_of(model, args, kwargs)
        layout = complete(known.layout(model, arguments), arguments, known.masks)
        moment = self.moment(component, arguments)
        rows = None if moment.rows is None else _rows_of(moment.rows, self.schedule.branches or BRANCHES)
        here = self.schedule.active(moment) and rows != slice(0, 0)
        for site in sites:
            link = self.links[site.path]
            link.rows = rows
            link.plan = None
            if here:
                link.plan = True if self.plan is None else self.plan(site, layout, moment)


def _set_processor(module: Any, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:  # Mochi
        module.processor = processor


def _rows_of(rows: Any, branches: Any) -> slice | None:
    """Batch entries of some branches; None for all, an empty slice for none."""
    chosen = [rows[branch] for branch in branches if branch in rows]
    if len(chosen) == len(rows):
        return None
    return chosen[0] if chosen else slice(0, 0)


class _BeforeForward:
    """Forward pre-hook of a model; outside of what is compiled."""

    def __init__(self, interception: Interception, component: str):
        self.interception, self.component = interception, component

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.interception.before(self.component, model, args, kwargs)
