"""Steps that ask whether results are right: values, gradients, repeated bits, hostile memory, the sanitizer, masks."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from math import prod
from typing import Any

import torch
from declared import DECLARED, Declared
from foveal.kernels.common.operator import OPERATORS
from hostile import assert_same, embed, nan_in_empty, shuffled
from operator_matrix import assert_same_bits

from ..benchmark import SkippedError, WrongResultError
from .context import ROOT, Context
from .plan import Finding

RANDOM_CASES = 40  # of an operator, over all ranks
REPEATS = 50
HALF = (torch.float16, torch.bfloat16)  # dtypes of kernels that only an explicit request takes
MOST_WRONG = 4  # cases after which no more are tried
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def configs_of(name: str) -> Any:
    return import_module(f"{OPERATORS[name].package}.configs")


def random_cases(declared: Declared, context: Context) -> Iterator[Any]:
    """Random cases of all ranks in turns; the interpreter gets small ones."""
    made = [declared.matrix.cases(*(() if rank is None else (rank,)), 10**6, seed=29) for rank in declared.ranks]
    turns = (case for together in zip(*made, strict=True) for case in together if case.batch)
    small = (case for case in turns if context.on_gpu or prod(case.shape) * case.heads * case.batch <= 64)
    return islice(small, 0 if context.tiny else RANDOM_CASES)


def cases_of(declared: Declared, context: Context) -> Iterator[tuple[Any, dict]]:
    """Cases with their forced launch parameters: those of the declaration, then random ones."""
    cases = declared.cases[:1] if context.tiny else (*declared.cases, *declared.sizes)
    yield from ((case, {}) for case in cases)
    yield from ((case, declared.forced if i % 3 == 2 else {}) for i, case in enumerate(random_cases(declared, context)))


def values(context: Context, name: str, impl: str = "triton") -> Finding:
    """Hold outputs and all gradients of an operator to the float64 reference, by the error rule of the tests."""
    declared, checked, wrong = DECLARED[name], 0, []
    dtypes = HALF if impl in declared.on_request else context.dtypes
    for i, (case, forced) in enumerate(cases_of(declared, context)):
        case = declared.on_request[impl](case) if impl in declared.on_request else case
        for dtype in dtypes if i < len(declared.cases) else dtypes[i % len(dtypes) :][:1]:
            if context.late or len(wrong) >= MOST_WRONG:
                break
            try:
                with configs_of(name).override(**forced):
                    declared.matrix.check(case, dtype, impl, device=context.device)
            except AssertionError as error:
                wrong.append(str(error))
            checked += 1
    if wrong:
        raise WrongResultError(f"{len(wrong)} of {checked} cases are wrong:\n" + "\n".join(wrong))
    if not checked:
        raise SkippedError("there was no time for a single case")
    notes = [f"{checked} cases keep the error rule"]
    if context.on_gpu:
        inputs = declared.matrix.make_inputs(declared.cases[0], torch.float32, context.device)
        tensors = [inputs[x] for x in ("query", "key", "value")]
        call = declared.matrix.make_call(declared.cases[0], inputs)
        if (chosen := OPERATORS[name].select_impl(*tensors, call)) != "triton":
            raise WrongResultError(f"impl='auto' takes {chosen!r}, not the kernels")
    return Finding(notes)


def memory(context: Context, name: str) -> Finding:
    """Ask for the same bits many times, and from memory that was never written or lies around tensors."""
    declared, repeats = DECLARED[name], 1 if context.tiny else REPEATS if context.on_gpu else 2
    cases = declared.cases[:1] if context.tiny else declared.cases
    checked = 0
    for i, case in enumerate(cases):
        forced, dtype = declared.forced if i else {}, context.dtypes[i % len(context.dtypes)]
        inputs = declared.matrix.make_inputs(case, dtype, context.device)

        def compute(case=case, inputs=inputs):
            return declared.matrix.run(case, inputs, "triton")

        with configs_of(name).override(**forced):
            assert_same_bits(compute, repeats)
            with nan_in_empty(fill=False):
                expected = compute()
            # the order of programs is the device's own; the interpreter has none
            with nan_in_empty(), nullcontext() if context.on_gpu else shuffled(case.seed):
                got = declared.matrix.run(case, {n: embed(x) for n, x in inputs.items()}, "triton")
        assert_same(got, expected, case)
        checked += 1
    return Finding([f"{checked} cases: the same bits {repeats + 1} times and in hostile memory"])


def subset(device: str) -> None:
    """Run every kernel once, on the first and last case of every operator: the program that the sanitizer watches."""
    for declared in DECLARED.values():
        for case in (declared.cases[0], declared.cases[-1]):
            declared.matrix.run(case, declared.matrix.make_inputs(case, torch.float16, device), "triton")
    torch.cuda.synchronize(device)


def sanitizer(context: Context, tool: str) -> Finding:
    """Let a tool of compute-sanitizer watch every operator once."""
    binary = next((found for name in SANITIZER if (found := shutil.which(name))), None)
    if binary is None or not context.on_gpu:
        raise SkippedError("compute-sanitizer is not installed" if context.on_gpu else "compute-sanitizer wants a GPU")
    code = f"from benchmarks.first_hour.correct import subset; subset({str(context.device)!r})"
    command = [binary, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if "Device not supported" in done.stdout + done.stderr:
        raise SkippedError("compute-sanitizer does not support this device, or not in this virtual machine")
    if done.returncode:
        raise WrongResultError(f"{tool}: {done.stdout[-3000:]}{done.stderr[-1000:]}")
    return Finding([f"{tool} found nothing in {len(DECLARED)} operators"])


def masks(context: Context) -> Finding:
    """Make every dynamic mask where waiting for the device is an error, and attend by it."""
    if not context.on_gpu:
        raise SkippedError("what waits for a device shows on a device only")
    if find_spec("pytest") is None:
        raise SkippedError("the rows of the masks' contract are in a test file, and pytest is not installed")
    contract = import_module("tests.kernels.test_masks")
    wrong = []
    for name in contract.DYNAMIC:
        row = contract.ROWS[name]
        tensors = [x.to(context.device, torch.float16) for x in contract.inputs(row.grids[-1], row)]
        try:
            contract.make(name, row.grids[-1], row.options, tensors)  # constants reach the device once
            torch.cuda.set_sync_debug_mode("error")
            made = contract.make(name, row.grids[-1], row.options, tensors)
            torch.cuda.set_sync_debug_mode("default")
            if not made.attend().isfinite().all():
                wrong.append(f"{name}: its result is not finite")
        except Exception as error:  # one mask does not end the others
            wrong.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if wrong:
        raise WrongResultError("\n".join(wrong))
    return Finding([f"{len(contract.DYNAMIC)} dynamic masks wait for nothing"])


def tests(context: Context, file: str, marker: str = "gpu") -> Finding:
    """Run a file of the tests that want a device."""
    if not context.on_gpu:
        raise SkippedError("these tests want a device")
    if marker == "multigpu" and torch.cuda.device_count() < 2:
        raise SkippedError(f"it wants two devices or more, and {torch.cuda.device_count()} is there")
    if find_spec("pytest") is None:
        raise SkippedError("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider", "--cases", "16", file]
    if find_spec("xdist") is not None:
        command[4:4] = ["-n", str(max(1, (os.cpu_count() or 2) // 2))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise WrongResultError("\n".join([f"exit code {done.returncode}", *lines[-25:], done.stderr[-1500:]]))
    return Finding([lines[-1]])


def gluon(context: Context, name: str) -> Finding:
    """Hold `impl="gluon"` to the reference and to its own bits."""
    if "gluon" not in OPERATORS[name].modules:
        raise SkippedError(f"{name} attention has no impl='gluon' yet")
    if not context.on_gpu or torch.cuda.get_device_capability(context.device) != (9, 0):
        raise SkippedError("impl='gluon' is for compute capability 9.0")
    finding = values(context, name, "gluon")
    declared = DECLARED[name]
    for case in map(declared.on_request["gluon"], declared.cases):
        inputs = declared.matrix.make_inputs(case, torch.float16, context.device)
        assert_same_bits(lambda case=case, inputs=inputs: declared.matrix.run(case, inputs, "gluon"), REPEATS)
    finding.notes.append(f"the same bits {REPEATS + 1} times")
    return finding
