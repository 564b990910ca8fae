"""The declared operators that have kernels, each with its test matrix and small cases that reach its options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import agent_matrix
import block_sparse_matrix
import linear_matrix
import neighborhood_matrix
import scan_matrix
import scored_matrix
import window_matrix
from foveal.kernels import ops
from foveal.kernels.block_sparse.configs import Size
from operator_matrix import Inputs
from torch import Tensor


@dataclass(frozen=True)
class Declared:
    """How an operator is tested.

    Attributes:
        matrix: module with `cases`, `make_inputs`, `make_call`, `run` and `check`.
        function: the public function, with its log-sum-exp if it has one; or one by rank.
        cases: of few programs, which together reach every kernel; the last has all options.
        sizes: cases that differ in sizes alone, so that one graph serves them.
        forced: launch parameters under which even small cases have several parts.
        ranks: of the random cases; None for an operator whose cases have a rank of their own.
        on_request: by implementation that "auto" never takes, the case most like a given one that it takes.
    """

    matrix: Any
    function: Callable | Mapping[int, Callable]
    cases: tuple
    sizes: tuple = ()
    forced: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[int | None, ...] = (None,)
    on_request: Mapping[str, Callable] = field(default_factory=dict)

    def public(self, case: Any) -> Callable:
        """The public function that takes a case: its tensors, `case.options` and `impl`."""
        return self.function[case.rank] if isinstance(self.function, Mapping) else self.function

    def outputs(self, case: Any, inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
        """What the public function returns for a case."""
        found = self.public(case)(**inputs, **case.options, impl=impl)
        return (found,) if isinstance(found, Tensor) else found


_MASKED = neighborhood_matrix.Case(
    (9, 11),
    (5, 3),
    (2, 1),
    (1, 2),
    (False, True),
    key_heads=1,
    bias=True,
    extra=19,
    value_dim=5,
    additional_mask="mask",
)
_WINDOW = window_matrix.Case((9, 11), (4, 3), (2, 1), (0, 0), heads=2, key_heads=1, bias=True, batch=2)
_AGENT = agent_matrix.Case((5, 7), (4, 6), agents=9, agent_bias=True, query_bias=True, query_scale=0.2)
_LINEAR = linear_matrix.Case((5, 7), (4, 6), relu=True, floor=20.0, scale=None)
_SCORED = scored_matrix.Case((9, 11), "cope", positions=5)
_SCAN = scan_matrix.Case((5, 7), decay="token", delta=True, state=True)

DECLARED = {
    "neighborhood": Declared(
        neighborhood_matrix,
        neighborhood_matrix.OPERATORS,
        (
            neighborhood_matrix.Case((40,), (9,), (4,), (1,), (False,), key_heads=1, layout="channels_first"),
            neighborhood_matrix.Case(
                (4, 6), (3, 3), (2, 1), (1, 2), (False, True), heads=1, key_heads=1, bias=True, extra=3
            ),
        ),
        # no length equals another size, which would be taken for it
        tuple(replace(_MASKED, shape=shape) for shape in ((12, 14), (13, 11), (16, 15))),
        ranks=(1, 2, 3),
        on_request={"gluon": neighborhood_matrix.for_gluon},
    ),
    "window": Declared(
        window_matrix,
        partial(ops.window_attention, return_lse=True),
        (
            window_matrix.Case((5, 6), (4, 3), (2, 1), (0, 0), key_heads=1, bias=True, value_dim=5),
            window_matrix.Case((5, 6), (3, 6), (0, 0), (1, 0), heads=1, key_heads=1, padded=True, bias=True),
            window_matrix.Case((4, 6), (2, 3), (1, 0), (0, 0), heads=1, key_heads=1, bias=True),
        ),
        tuple(replace(_WINDOW, shape=shape) for shape in ((13, 14), (15, 11), (17, 19))),
        dict(one_pass=True),
        (1, 2, 3),
    ),
    "block_sparse": Declared(
        block_sparse_matrix,
        partial(ops.block_sparse_attention, return_lse=True),
        (
            block_sparse_matrix.Case((5, 6), (4, 5), (4, 4), (3, 4), 3, q_len=True, kv_len=True, inverse=True),
            block_sparse_matrix.Case(
                (5, 6), (5, 6), (4, 4), (4, 4), 2, extra=3, additional_mask="mask", layout="fused"
            ),
            block_sparse_matrix.Case((5, 6), (5, 6), (4, 4), (2, 4), 5, full=True, q_len=True, skip=True, scale=1.0),
            block_sparse_matrix.Case(
                (5, 6), (5, 6), (4, 4), (4, 4), 2, full=True, bias=True, key_heads=1, value_dim=12, extra=3
            ),
        ),
        forced=dict(size=Size(16, 16, 4, 1), whole=True, descriptor=True),
        on_request={"gluon": block_sparse_matrix.for_gluon},
    ),
    "agent": Declared(
        agent_matrix,
        ops.agent_attention,
        (
            agent_matrix.Case((5, 7), (5, 7), 4, heads=1),
            agent_matrix.Case((5, 6), (4, 5), 9, agent_bias=True, query_bias=True, value_dim=12, layout="fused"),
        ),
        (_AGENT, replace(_AGENT, shape=(11, 3), key_shape=(13, 5), agents=16)),
        dict(queries=16, keys=16, chunk=16),
    ),
    "linear": Declared(
        linear_matrix,
        ops.linear_attention,
        (
            linear_matrix.Case((5, 7), (5, 7), centered=True),
            linear_matrix.Case((5, 7), (4, 6), eps=1e-3, mean=True, scale=None, layout="fused"),
            linear_matrix.Case((5, 7), (4, 6), relu=True, floor=20.0, scale=None, value_dim=12),
        ),
        (_LINEAR, replace(_LINEAR, shape=(11, 3), key_shape=(13, 5))),
        dict(rows=16, chunk=16, columns=16),
    ),
    "scan": Declared(
        scan_matrix,
        ops.scan_attention,
        (
            scan_matrix.Case((17,), heads=1, direction="backward"),
            scan_matrix.Case((3, 6), heads=1, decay="token", state=True, layout="fused"),
            scan_matrix.Case((18,), heads=1, decay="token", delta=True, state=True, value_dim=12),
        ),
        (_SCAN, replace(_SCAN, shape=(11, 3)), replace(_SCAN, shape=(13, 6))),
        dict(chunk=16, columns=16),
    ),
    "scored": Declared(
        scored_matrix,
        scored_matrix.attend,
        (
            scored_matrix.Case((18,), "signed", heads=1, mask="causal"),
            scored_matrix.Case((18,), "power", heads=1, mask="band", length_scale=True, value_dim=12),
            scored_matrix.Case((18,), "parallax", heads=1, mask="random", layout="fused"),
            scored_matrix.Case((17,), "cope", key_heads=1, mask="random", value_dim=5),
        ),
        (_SCORED, replace(_SCORED, shape=(7, 13)), replace(_SCORED, shape=(14, 8))),
        dict(queries=16, keys=16),
    ),
}
