"""The two halves of neighborhood attention, logits and weighted values, with what users do in between.

NATTEN before 0.20 attends in two calls and hands the weights out. Where only a softmax lies between, nobody needs them:
the first call returns a tensor that is not computed yet, the second runs the fused operator. Whatever else is done to
that tensor computes it (`gathered`), with its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from ...common.calling import PerAxis, is_plain_call
from ...neighborhood.geometry import Axis
from . import gathered
from .functional import OPERATORS
from .geometry import check_axes, check_tensor

SOFTMAX = {torch.softmax, torch.special.softmax, Tensor.softmax, F.softmax}
DROPOUT = {F.dropout, torch.dropout}
PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
QUOTIENTS = {torch.div, torch.divide, Tensor.div, Tensor.divide, Tensor.__truediv__}
METADATA = {  # what is known of weights that are not computed
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_complex,
    Tensor.is_floating_point,
    Tensor.__len__,
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "itemsize")),
    *(
        getattr(Tensor, name).__get__
        for name in ("is_cpu", "is_cuda", "is_meta", "is_nested", "is_sparse", "requires_grad")
    ),
}


@dataclass(frozen=True)
class Recipe:
    """How deferred weights are made: (query . key + bias) * factor, and a softmax if `normalized`."""

    query: Tensor
    key: Tensor
    bias: Tensor | None
    additional_keys: Tensor | None
    axes: tuple[Axis, ...]
    factor: float = 1.0
    normalized: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.query, self.key, self.bias, self.additional_keys) if x is not None]

    def of(self, tensors: Sequence[Tensor]) -> Recipe:
        """The same recipe of other tensors, which stand in the order of `tensors`."""
        given = iter(tensors)
        names = ("query", "key", "bias", "additional_keys")
        return replace(self, **{name: None if getattr(self, name) is None else next(given) for name in names})

    def weights(self) -> Tensor:
        found = gathered.logits(self.query, self.key, self.axes, self.bias)
        if self.additional_keys is not None:
            found = torch.cat((found, _products(self.query, self.additional_keys)), -1)
        if self.factor != 1:
            found = found * self.factor
        return found.softmax(-1) if self.normalized else found


def _products(query: Tensor, additional_keys: Tensor) -> Tensor:
    """`[B, heads, *spatial, tokens]`: every query sees every additional token."""
    flat = query.flatten(2, -2) @ additional_keys.transpose(-1, -2)
    return flat.unflatten(2, query.shape[2:-1])


def _versions(tensors: Sequence[Tensor]) -> list[int | None]:
    return [None if x.is_inference() else x._version for x in tensors]


class _Placeholder(torch.autograd.Function):
    """NaN in the shape of weights, with their gradient: for functions in C++ and for another `torch.autograd.Function`,
    whose graph knows nothing of Python's subclasses."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.recipe = recipe
        width = gathered.count(recipe.axes)
        width += 0 if recipe.additional_keys is None else recipe.additional_keys.shape[2]
        return recipe.query.new_full((), torch.nan).expand(*recipe.query.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        tensors = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        with torch.enable_grad():
            weights = ctx.recipe.of(tensors).weights()
        wanted = [x for x in tensors if x.requires_grad]
        found = iter(torch.autograd.grad(weights, wanted, grads[0]))
        return None, *(next(found) if x.requires_grad else None for x in tensors)


class DeferredWeights(Tensor):
    """Attention weights `[B, heads, *spatial, keys]` that are computed when somebody asks for more than a softmax."""

    recipe: Recipe
    computed: Tensor | None
    records: bool
    versions: list[int | None]

    @staticmethod
    def make(recipe: Recipe) -> DeferredWeights:
        self = _Placeholder.apply(recipe, *recipe.tensors).as_subclass(DeferredWeights)
        self.recipe, self.computed = recipe, None
        self.records, self.versions = torch.is_grad_enabled(), _versions(recipe.tensors)
        return self

    def check(self) -> None:
        """Refuse tensors that were written to since: the weights would be others."""
        if self.versions != _versions(self.recipe.tensors):
            raise RuntimeError(
                "query, key or bias was changed in place after its logits were asked for and before they were used; "
                "change a copy instead"
            )

    def compute(self) -> Tensor:
        """The weights as an ordinary tensor, the same one each time."""
        if self.computed is None:
            self.check()
            with torch.set_grad_enabled(self.records):  # as if it had been computed at once
                self.computed = self.recipe.weights()
        return self.computed

    def derive(self, recipe: Recipe) -> DeferredWeights:
        self.check()
        return DeferredWeights.make(recipe)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, DeferredWeights)), None)
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        deferred = first is not None and first.computed is None and first.records == torch.is_grad_enabled()
        if first is not None and deferred and is_plain_call():
            found = _deferred(func, first, args, kwargs)
            if found is not None:
                return found
        given: Any = tree_map_only(DeferredWeights, DeferredWeights.compute, (args, kwargs))
        return func(*given[0], **given[1])


def _deferred(func: Callable, x: DeferredWeights, args: tuple, kwargs: dict) -> DeferredWeights | None:
    """Result of a function that leaves the weights deferred, or None."""
    recipe, rest = x.recipe, args[1:]
    given = dict(zip(("dim", "dtype"), rest, strict=False)) | kwargs
    if func in SOFTMAX and not recipe.normalized and args and args[0] is x:
        last = given.get("dim") in (-1, x.dim() - 1)
        if last and given.get("dtype") in (None, x.dtype) and given.get("out") is None:
            return x.derive(replace(recipe, normalized=True))
    if func in DROPOUT:
        p = kwargs.get("p", rest[0] if rest else 0.5)
        training = kwargs.get("training", kwargs.get("train", rest[1] if len(rest) > 1 else True))
        if p == 0 or not training:
            return x
    if func in PRODUCTS | QUOTIENTS and not recipe.normalized and not kwargs and len(args) == 2:
        number = args[1] if args[0] is x else args[0]
        if isinstance(number, Real) and not isinstance(number, bool):
            if func in PRODUCTS:
                return x.derive(replace(recipe, factor=recipe.factor * float(number)))
            if args[0] is x and number:
                return x.derive(replace(recipe, factor=recipe.factor / float(number)))
    same = func in (Tensor.contiguous, Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16)
    if same and not kwargs and _changes_nothing(func, x, rest):
        return x
    return None


def _changes_nothing(func: Callable, x: DeferredWeights, rest: tuple) -> bool:
    if func in (Tensor.to, Tensor.type_as):
        wanted = rest[0] if len(rest) == 1 else None
        if isinstance(wanted, Tensor):
            return wanted.dtype == x.dtype and wanted.device == x.device
        return wanted == (x.dtype if isinstance(wanted, torch.dtype) else x.device)
    casts = {Tensor.float: torch.float32, Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16}
    return casts.get(func, x.dtype) == x.dtype


def qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis[int],
    dilation: PerAxis[int] | None = 1,
    *,
    additional_keys: Tensor | None = None,
    is_causal: PerAxis[bool] | None = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """Logits of neighborhood attention, unscaled, deferred until more than a softmax is made of them.

    Args:
        rank: spatial axes.
        query, key: `[B, heads, *spatial, head_dim]`.
        kernel_size, dilation, is_causal: the neighborhood, as in `foveal.kernels.ops.na2d`.
        additional_keys: None, or `[B, heads, tokens, head_dim]`, whose logits follow those of the window.
        rpb: None, or `[heads, *(2 * kernel_size - 1)]`, a bias for every relative position.

    Returns:
        `[B, heads, *spatial, prod(kernel_size) + tokens]`.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names them.
    """
    for name, x in (("query", query), ("key", key)):
        _check_heads_first(name, x, rank)
    if query.shape != key.shape or query.dtype != key.dtype:
        raise ValueError(
            f"key ({tuple(key.shape)}, {key.dtype}) must have the shape and dtype of query "
            f"({tuple(query.shape)}, {query.dtype})"
        )
    axes = check_axes(query.shape[2:-1], kernel_size, 1, dilation, is_causal)
    table = (query.shape[1], *(2 * axis.window - 1 for axis in axes))
    if rpb is not None and tuple(rpb.shape) != table:
        raise ValueError(f"rpb.shape={tuple(rpb.shape)} must be [heads, 2 * kernel_size - 1 per axis] = {list(table)}")
    if rpb is not None and any(axis.causal for axis in axes):
        raise ValueError("rpb and is_causal cannot be combined")
    if additional_keys is not None:
        _check_additional("additional_keys", additional_keys, query)
    recipe = Recipe(query, key, rpb, additional_keys, axes)
    return DeferredWeights.make(recipe) if is_plain_call() else recipe.weights()


def av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis[int],
    dilation: PerAxis[int] | None = 1,
    *,
    additional_values: Tensor | None = None,
    is_causal: PerAxis[bool] | None = False,
) -> Tensor:
    """Sums of values by the weights of `qk` after a softmax: by the fused operator where nothing else was done.

    Args:
        rank: spatial axes.
        attn: `[B, heads, *spatial, prod(kernel_size) + tokens]`.
        value: `[B, heads, *spatial, value_dim]`.
        kernel_size, dilation, is_causal: as for `qk`.
        additional_values: None, or `[B, heads, tokens, value_dim]`.

    Returns:
        `[B, heads, *spatial, value_dim]` in the dtype of value.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names them.
    """
    _check_heads_first("value", value, rank)
    axes = check_axes(value.shape[2:-1], kernel_size, 1, dilation, is_causal)
    tokens = 0
    if additional_values is not None:
        _check_additional("additional_values", additional_values, value)
        tokens = additional_values.shape[2]
    expected = (*value.shape[:-1], gathered.count(axes) + tokens)
    if tuple(attn.shape) != expected:
        raise ValueError(f"attn.shape={tuple(attn.shape)} must be [B, heads, *spatial, keys] = {list(expected)}")
    if isinstance(attn, DeferredWeights):
        if _fuses(attn, axes, value, additional_values):
            attn.check()
            return _attend(attn.recipe, value, additional_values)
        attn = attn.compute()
    attn = attn.to(value.dtype)
    out = gathered.weighted(attn[..., : gathered.count(axes)], value, axes)
    if additional_values is not None:
        more = attn[..., gathered.count(axes) :].flatten(2, -2) @ additional_values
        out = out + more.unflatten(2, value.shape[2:-1])
    return out


def _fuses(attn: DeferredWeights, axes: tuple[Axis, ...], value: Tensor, additional_values: Tensor | None) -> bool:
    recipe = attn.recipe
    untouched = attn.computed is None and recipe.normalized and recipe.axes == axes
    alike = recipe.query.dtype == value.dtype and (recipe.additional_keys is None) == (additional_values is None)
    odd = recipe.bias is None or all(axis.window % 2 for axis in axes)
    return untouched and alike and odd and attn.records == torch.is_grad_enabled()


def _attend(recipe: Recipe, value: Tensor, additional_values: Tensor | None) -> Tensor:
    axes = recipe.axes
    query, key, value = (x.movedim(1, -2) for x in (recipe.query, recipe.key, value))
    keys, values = (None if x is None else x.transpose(1, 2) for x in (recipe.additional_keys, additional_values))
    bias = recipe.bias if recipe.bias is None or recipe.factor == 1 else recipe.bias * recipe.factor
    out = OPERATORS[len(axes)](
        query,
        key,
        value,
        window=[axis.window for axis in axes],
        dilation=[axis.dilation for axis in axes],
        causal=[axis.causal for axis in axes],
        bias=bias,
        scale=recipe.factor,
        additional_keys=keys,
        additional_values=values,
    )
    return out.movedim(-2, 1)


def _check_heads_first(name: str, x: Tensor, rank: int) -> None:
    check_tensor(name, x)
    if x.dim() != rank + 3:
        raise ValueError(f"{name}.shape={tuple(x.shape)} must be [B, heads, {rank} spatial axes, head_dim]")


def _check_additional(name: str, x: Tensor, like: Tensor) -> None:
    expected = (*like.shape[:2], "tokens", like.shape[-1])
    if x.dim() != 4 or x.shape[:2] != like.shape[:2] or x.shape[-1] != like.shape[-1] or x.dtype != like.dtype:
        raise ValueError(f"{name} ({tuple(x.shape)}, {x.dtype}) must be {expected} of {like.dtype}")
