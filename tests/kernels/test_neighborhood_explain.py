"""`explain` says what a call does: its answers are held against the calls themselves."""

import re
from types import SimpleNamespace

import pytest
import torch
from foveal.kernels import ops
from foveal.kernels.common.operator import FUNCTIONS
from foveal.kernels.neighborhood import cost, make_axes
from foveal.kernels.ops import explain
from foveal.kernels.tools import explain as command
from torch._subclasses.fake_tensor import FakeTensorMode


def tensors(shape=(2, 9, 11, 4, 16), *, key_heads=None, device="cpu", dtype=torch.float32):
    key = torch.empty(*shape[:-2], key_heads or shape[-2], shape[-1], device=device, dtype=dtype)
    return torch.empty(shape, device=device, dtype=dtype), key, key


def on_cuda(**options):
    with FakeTensorMode():
        return tensors(device="cuda", **options)


def test_cpu_takes_the_tiled_path():
    explanation = explain(ops.na2d, *tensors(), window=5, impl="auto")
    assert explanation.impl == "torch" and explanation.operator == "na2d"
    assert list(explanation.reasons) == ["triton", "gluon", "torch", "reference"]
    assert "cpu is neither CUDA nor ROCm" in explanation.reasons["triton"]
    assert explanation.reasons["torch"] is None


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_an_explicit_request_is_refused_exactly_when_the_call_is(impl):
    query, key, value = (torch.randn_like(x) for x in tensors())
    explanation = explain("na2d", query, key, value, window=5, impl=impl)
    if explanation.reasons[impl] is None:
        assert explanation.impl == impl
        ops.na2d(query, key, value, window=5, impl=impl)
    else:
        assert explanation.impl is None
        with pytest.raises(NotImplementedError, match=re.escape(explanation.reasons[impl])):
            ops.na2d(query, key, value, window=5, impl=impl)


def test_a_cuda_device_that_is_not_there():
    pytest.importorskip("triton")
    explanation = explain(ops.na2d, *on_cuda(dtype=torch.bfloat16), window=5)
    assert explanation.impl == "triton" and explanation.reasons["triton"] is None
    assert "forward_tiles" in explanation.cost


@pytest.mark.parametrize(
    "options, words", [({"dtype": torch.float64}, "float64"), ({"shape": (1, 9, 11, 1, 512)}, "head_dim 512")]
)
def test_cuda_calls_that_the_kernels_cannot_take(options, words):
    pytest.importorskip("triton")
    explanation = explain(ops.na2d, *on_cuda(**options), window=5)
    assert explanation.impl == "torch" and words in explanation.reasons["triton"]
    assert "forward_tiles" not in explanation.cost


def test_tensors_without_data_at_the_size_of_a_video():
    shape = (1, 30, 48, 80, 24, 128)
    explanation = explain("na3d", *tensors(shape, device="meta"), window=(18, 24, 24), stride=(16, 8, 8))
    assert explanation.impl == "torch"
    assert explanation.cost["keys_per_query"] == 18 * 24 * 24
    assert explanation.cost["forward_flops"] == 4 * 115_200 * 10_368 * 24 * 128


def test_cost_counts_extra_keys_grouped_heads_and_the_table():
    axes = make_axes((9, 11), window=5)
    query, key, value = tensors(key_heads=2)
    extra, bias = torch.empty(2, 7, 2, 16), torch.empty(4, 9, 9)
    explanation = explain(
        "na2d", query, key, value, window=5, bias=bias, additional_keys=extra, additional_values=extra
    )
    sizes = {"batch": 2, "heads": 4, "head_dim": 16, "extra": 7}
    assert explanation.cost["forward_flops"] == cost.forward_flops(axes, **sizes)
    assert explanation.cost["backward_bytes"] == cost.backward_bytes(axes, **sizes, key_heads=2, itemsize=4, bias=True)


def test_cost_of_values_of_their_own_width():
    axes, (query, key, _) = make_axes((9, 11), window=5), tensors()
    found = explain("na2d", query, key, torch.empty(2, 9, 11, 4, 40), window=5).cost
    pairs = 2 * 4 * cost.visible_pairs(axes)
    assert found["forward_flops"] == 2 * pairs * (16 + 40) and found["backward_flops"] == 2 * pairs * (3 * 16 + 2 * 40)
    rows = 2 * 99 * 4 * 4  # batch, tokens, heads, bytes
    assert found["forward_bytes"] == rows * 2 * (16 + 40) + rows
    assert found["backward_bytes"] == rows * 4 * (16 + 40) + rows


def test_heads_of_other_windows_are_listed():
    windows, strides = [(3, 3), (5, 5), (3, 3), (5, 7)], [(1, 1), (2, 1), (1, 1), (1, 1)]
    explanation = explain("na2d", *tensors(), window=windows, stride=strides)
    assert explanation.cost["heads_0_to_2_in_steps_of_2"] == "window 3×3, 9 keys per query"
    assert explanation.cost["head_1"] == "window 5×5, stride 2×1, 25 keys per query"
    assert explanation.cost["head_3"] == "window 5×7, 35 keys per query"
    assert explanation.cost["keys_per_query"] == (9 + 25 + 9 + 35) / 4
    alone = [
        explain("na2d", *tensors((2, 9, 11, 1, 16)), window=w, stride=s).cost
        for w, s in zip(windows, strides, strict=True)
    ]
    for name in ("forward_flops", "backward_flops", "forward_bytes", "backward_bytes"):
        assert explanation.cost[name] == sum(found[name] for found in alone)
    on_device = explain("na2d", *on_cuda(dtype=torch.bfloat16), window=windows, causal=True).cost
    assert (
        ", causal on axis 0, axis 1, " in on_device["head_1"] and "of the computed pairs useful" in on_device["head_1"]
    )


def test_flattened_tokens_and_masks():
    query, key, value = (x.flatten(1, 2) for x in tensors())
    extra, lengths = torch.empty(2, 7, 4, 16), torch.tensor([3, 7])
    given = {"additional_keys": extra, "additional_values": extra}
    found = explain("na2d", query, key, value, window=5, grid=(9, 11), **given, additional_mask=lengths)
    assert found.cost == explain("na2d", *tensors(), window=5, **given).cost


def test_values_that_the_kernels_cannot_take():
    pytest.importorskip("triton")
    query, key, _ = on_cuda(dtype=torch.bfloat16)
    with FakeTensorMode():
        value = torch.empty(2, 9, 11, 4, 320, device="cuda", dtype=torch.bfloat16)
    explanation = explain("na2d", query, key, value, window=5)
    assert explanation.impl == "torch" and "head_dim 320 of value exceeds 256" in explanation.reasons["triton"]


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "torch"), ((8, 0), "triton")])
def test_devices_older_than_triton_supports_take_no_kernels(capability, chosen, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    known = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    declared, call = FUNCTIONS["na2d"].operator, None
    query = on_cuda()[0]
    assert declared.select_impl(query, query, query, call) == chosen
    reason = declared.unsupported_reasons(query, query, query, call)["triton"]
    assert (reason is None) == (chosen == "triton")
    if reason is not None:
        assert reason == "compute capability 7.5 is below 8.0, the oldest that Triton supports"
        with pytest.raises(NotImplementedError, match=r"compute capability 7\.5"):
            declared.select_impl(query, query, query, call, "triton")
        assert explain("na2d", query, query, query, window=5).reasons["triton"] == reason


@pytest.mark.parametrize("name", ["na1d", "na2d", "na3d"])
def test_every_operator_by_name_and_by_function(name):
    rank = int(name[2])
    qkv = tensors((1, *(5, 6, 7)[:rank], 2, 8))
    by_name = explain(name, *qkv, window=3)
    assert by_name == explain(getattr(ops, name), *qkv, window=3)
    assert by_name.cost["keys_per_query"] == 3**rank


@pytest.mark.parametrize("operator", ["na4d", "merge_attentions", ops.merge_attentions, len])
def test_what_is_no_operator_is_refused(operator):
    with pytest.raises(ValueError, match=r"must be one of .*na2d"):
        explain(operator, *tensors(), window=3)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"window": 12}, ValueError, "window=12 on axis 0"),
        ({"window": 4, "bias": torch.empty(4, 7, 7)}, ValueError, "must be odd"),
        ({"window": 3, "impl": "cuda"}, ValueError, "impl='cuda'"),
        ({"window": 3, "windw": 3}, TypeError, "windw"),
        ({}, TypeError, "window"),
    ],
)
def test_arguments_are_refused_as_the_operator_refuses_them(arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        ops.na2d(*tensors(), **arguments)
    with pytest.raises(error, match=re.escape(words)):
        explain(ops.na2d, *tensors(), **arguments)


def test_the_text_names_the_choice_and_every_reason():
    explanation = explain(ops.na2d, *tensors(), window=5)
    first, *rest = str(explanation).splitlines()
    assert first == "na2d of (2, 9, 11, 4, 16) float32 on cpu takes: torch"
    assert any(line.split()[0] == "triton" and "neither CUDA nor ROCm" in line for line in rest)
    assert any(line.split()[:2] == ["reference", "can"] and 'impl="reference"' in line for line in rest)
    assert "forward flops" in str(explanation)


def run_command(words: str) -> None:
    command.main(words.split())


def test_command_answers_for_a_device_that_is_not_there(capsys):
    pytest.importorskip("triton")
    run_command("--op na3d --shape 30 48 80 --heads 24 --head-dim 128 --window 18 24 24 --device cuda")
    printed = capsys.readouterr().out
    assert "bfloat16 on cuda:0 takes: triton" in printed and "10,368" in printed


def test_command_passes_the_arguments_of_the_operator(capsys):
    run_command("--op na2d --shape 9 8 --window 3 4 --stride 2 1 --causal True False --device cpu")
    axes = make_axes((9, 8), window=(3, 4), stride=(2, 1), causal=(True, False))
    assert f"{round(cost.visible_pairs(axes) / 72, 2):g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--window 20", "window=20 on axis 0"),
        ("--windw 3", "windw"),
        ("--window three", "'three' must be"),
        ("3 --window 3", "no --name before it"),
        ("--window 3 --device nowhere", "nowhere"),
    ],
)
def test_command_refuses_in_one_sentence(words, complaint, capsys):
    with pytest.raises(SystemExit):
        run_command(f"--op na2d --shape 9 8 --device cpu --heads 2 {words}")
    assert complaint in capsys.readouterr().err
