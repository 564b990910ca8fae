"""Every public operator refuses arguments of a wrong kind by name: enumerated, so that none is forgotten."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_overloads, get_type_hints

import numpy as np
import pytest
import torch
from foveal.kernels import ops
from foveal.kernels.common.arguments import operator
from foveal.kernels.common.calling import Impl, Mask, PerAxis, PerHead
from foveal.kernels.common.operator import FUNCTIONS
from foveal.kernels.ops import BlockMask
from foveal.kernels.scored import ColumnMask, Score, Softmax
from foveal.kernels.tools.explain import _operators, explain
from operator_calls import CALLS, lists, mask, qkv
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")


NOT_TENSORS = {"list": [1.0], "array": np.zeros(3), "number": 1.0, "text": "query"}
STRANGE = {
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "integers": lambda x: x.long(),
    "booleans": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.flatten(1).to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([*x]),
    "jagged": lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged),
    "meta": lambda x: x.to("meta"),
    "no axis": lambda x: x.flatten()[0],
    "an axis less": lambda x: x[0],
    "an axis more": lambda x: x.expand(5, *x.shape),
}
NUMBERS = {"text": "0.5", "list": [0.5], "tensor": torch.tensor(0.5), "array": np.ones(1), "bool": True, "complex": 1j}
INTEGERS = {"float": 1.0, "text": "1", "bool": True, "array": np.ones(2, int), "tensor": torch.ones(2).int()}
WRONG: dict[Any, dict[str, Any]] = {
    float: NUMBERS,
    int: INTEGERS | {"sequence": (1,)},
    bool: {"number": 1, "text": "True", "float": 0.0},
    str: {"number": 1, "list": ["forward"], "unknown": "sideways"},
    PerAxis[int]: INTEGERS | {"none inside": (None, 1), "float inside": [1, 1.0], "too many": (1,) * 4},
    PerAxis[bool]: {"number": 1, "text": "True", "inside": (True, 0), "too many": (True,) * 4},
    PerHead[int]: INTEGERS | {"none inside": (None, 1), "too many": (1,) * 4, "none of a head": ((3,), (None,))},
    PerHead[bool]: {"number": 1, "text": "True", "inside": (True, 0), "of a head": ((True,), (1,))},
    Mask: NOT_TENSORS | {"floats": torch.ones(1, 3), "sparse": torch.ones(1, 3).bool().to_sparse()},
    Sequence[int]: {"number": 2, "text": "22", "array": np.ones(2, int), "inside": (2, None)},
    torch.dtype: {"text": "float8_e4m3fn", "type": float},
    Impl: {"unknown": "cuda", "number": 1, "list": ["torch"]},
    Score: {"tensor": torch.ones(2), "text": "softmax", "class": Softmax},
    ColumnMask: {"tensor": torch.ones(1, 1, 4).long(), "text": "causal"},
    BlockMask: {"tuple": tuple(mask()), "tensor": torch.ones(4, 4), "number": 1},
}
NAMES = [name for name in CALLS if name in ops.__all__]


def kinds(annotation: Any) -> tuple[Any, bool]:
    """What an argument is, and whether it may be None."""
    for kind in (Tensor, float | Tensor, Sequence[Tensor], *WRONG):
        if annotation in (kind, kind | None):
            return kind, annotation != kind
    raise AssertionError(f"{annotation} has no wrong values here")


def wrong_values(annotation: Any, right: Any) -> Iterator[tuple[str, Any]]:
    kind, optional = kinds(annotation)
    if not optional:
        yield "None", None
    if kind is Tensor:
        yield from NOT_TENSORS.items()
        yield from ((what, change(right)) for what, change in STRANGE.items())
    elif kind == Sequence[Tensor]:
        yield from NOT_TENSORS.items()
        yield from ((what, [right[0], x]) for what, x in NOT_TENSORS.items())
        yield from ((what, [right[0], change(right[1])]) for what, change in STRANGE.items())
    elif kind == float | Tensor:
        yield from NUMBERS.items()
        vectors = STRANGE.keys() - {"csr", "nested", "jagged", "an axis less"}
        yield from ((what, STRANGE[what](torch.ones(2))) for what in sorted(vectors))
    else:
        yield from WRONG[kind].items()


def wrong_calls(name: str) -> Iterator[tuple[str, str, dict]]:
    """An argument, what is wrong with it, and the arguments of a call."""
    call = CALLS[name]()
    for argument, parameter in inspect.signature(getattr(ops, name)).parameters.items():
        for what, value in wrong_values(parameter.annotation, call.get(argument)):
            yield argument, what, call | {argument: value}


def test_every_operator_is_asked():
    without_calls = {"BlockMask", "SkipCalibration", "attention_statistics", "explain", "scaled_attention"}
    without_calls |= {"RaggedLayout", "masks", "ragged_attention", "sharded_neighborhood_attention"}
    assert set(ops.__all__) - without_calls == set(CALLS)
    assert set(_operators()) <= set(CALLS)


@pytest.mark.parametrize("name", NAMES)
def test_right_arguments_are_taken(name):
    getattr(ops, name)(**CALLS[name]())


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_refused_by_name(name):
    first = next(iter(CALLS[name]()))
    for argument, what, call in wrong_calls(name):
        named = (
            ("query", "key", "outs", "lses", "table", "sequence", "filter", "shape")
            if argument == first
            else (argument,)
        )  # others are held against it
        try:
            getattr(ops, name)(**call)
        except (TypeError, ValueError) as error:
            assert any(x in str(error) for x in named), f"{name}({argument}: {what}): {error}"
        else:
            assert (name, what) == ("relative_bias", "meta"), f"{name} takes {argument}: {what}"


def test_wrong_lists_are_refused_by_name():
    right = mask()
    wrong = {
        "query_block": [None, 2, "22", (2.0, 2.0), (2,), (2, 0), (True, 2), np.ones(2, int)],
        "key_block": [None, (2, None), [2, "2"]],
        "kv_num": [None, [[1]], np.ones((1, 1, 4), np.int32), right.kv_num.long(), right.kv_num.to_sparse()],
        "kv_idx": [None, right.kv_idx.tolist(), right.kv_idx.float(), right.kv_idx.to("meta"), right.kv_idx[0]],
        "bias": [0.5, right.bias.to(torch.float8_e5m2), right.bias.int(), right.bias.to_sparse(), right.bias[0]],
        "q_len": [4, right.q_len.long(), right.q_len[:3], right.q_len.to("meta"), right.q_len.numpy()],
        "kv_len": [(4,) * 4, right.kv_len.bool(), right.kv_len[None, None], right.kv_len.expand(7, -1)],
        "inverse": [right.inverse[0], (right.inverse[0],), (None, right.inverse[1]), (right.inverse[0], [1]), 3],
    }
    assert set(wrong) == set(BlockMask._fields)
    for field, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=rf"mask\.{field}"):
                ops.block_sparse_attention(**lists() | {"mask": right._replace(**{field: value})})


@pytest.mark.parametrize("name", sorted(_operators()))
def test_explain_refuses_what_the_operator_refuses(name):
    wrong = {"key": None, "value": [1.0], "impl": "cuda"}
    right = CALLS[name]()
    for argument in ("query", "value"):
        wrong |= {argument: right[argument].to_sparse()}
    for argument, value in (*wrong.items(), ("key", right["key"].long()), ("key", right["key"].to("meta"))):
        with pytest.raises((TypeError, ValueError), match=argument):
            explain(name, **right | {argument: value})


@pytest.mark.parametrize("name", sorted(_operators().keys() - {"biased_attention"}))
def test_tensors_without_data(name):
    """On the meta device plain PyTorch gives the shapes; kernels have nothing to run on."""

    def meta(x: Any) -> Any:
        if isinstance(x, BlockMask):
            return BlockMask(*(x if isinstance(x, tuple) and not isinstance(x[0], Tensor) else meta(x) for x in x))
        return tuple(map(meta, x)) if isinstance(x, tuple) else x.to("meta") if isinstance(x, Tensor) else x

    right, call = CALLS[name](), {name: meta(x) for name, x in CALLS[name]().items()}
    real = getattr(ops, name)(**right)
    for impl in ("auto", "torch", "reference"):
        found = getattr(ops, name)(**call, impl=impl)
        for x, y in zip(*((x,) if isinstance(x, Tensor) else x for x in (found, real)), strict=True):
            assert x.device.type == "meta" and x.shape == y.shape and x.dtype == y.dtype
    with pytest.raises(NotImplementedError, match=r"impl='triton' cannot take this call: .*meta"):
        getattr(ops, name)(**call, impl="triton")


def test_numbers_of_numpy_are_numbers():
    given = qkv(6, 6)
    expected = ops.na2d(**given, window=(3, 5), scale=0.5)
    assert torch.equal(ops.na2d(**given, window=(np.int64(3), np.int32(5)), scale=np.float64(0.5)), expected)


def test_an_argument_of_an_unknown_kind_is_no_operator():
    with pytest.raises(TypeError, match="nothing is known of arguments that are set"):

        @operator
        def attention(query: Tensor, keys: set[Tensor]) -> Tensor:
            return query


@pytest.mark.parametrize("name", sorted(_operators()))
def test_a_call_and_type_checkers_know_every_option(name):
    """`explain` makes the call by itself: with another default it would explain another call."""
    function = getattr(ops, name)
    options = {n: p for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    of_call = inspect.signature(FUNCTIONS[name].make_call).parameters
    ignores_some = any(p.kind is p.VAR_KEYWORD for p in of_call.values())  # which change no implementation and no cost
    further_outputs = {"return_lse", "return_state"}  # each has an overload of its own
    for option in options.keys() - {"impl", *further_outputs}:
        assert ignores_some if option not in of_call else of_call[option].default == options[option].default, option
    hints = get_type_hints(function)
    for overload in get_overloads(inspect.unwrap(function)):
        (typed,) = get_args(get_type_hints(overload)["options"])
        expected = {option: hints[option] for option in options.keys() - further_outputs}
        assert get_type_hints(typed) == expected
        assert typed.__required_keys__ == {n for n in expected if options[n].default is inspect.Parameter.empty}
