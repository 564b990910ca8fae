"""NATTEN's switches. Each of our calls has one path and needs none of them: they are kept and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ...common.calling import HAS_TRITON


class NattenContext:
    """State of the switches, by name."""

    initial: ClassVar[dict[str, Any]] = {
        "fused": False,
        "kv_parallel": False,
        "deterministic": False,
        "memory": "default",
        "flex_compile": False,
        "flex_compile_backprop": False,
        "autotuner": False,
        "tiled": True,
        "gemm": True,
        "tf32": False,
    }
    state: ClassVar[dict[str, Any]] = dict(initial)

    @classmethod
    def reset(cls) -> None:
        """Set every switch as it is in the beginning."""
        cls.state = dict(cls.initial)


class AutotunerContext(NattenContext):
    """NATTEN's second name for it."""


def _switch(name: str, value: bool | None = None) -> Callable[..., None]:
    """A function that sets a switch to its first argument, or always to `value`."""

    def set_switch(mode: bool = True, *_: Any, **__: Any) -> None:
        NattenContext.state[name] = bool(mode) if value is None else value

    return set_switch


def _is(name: str) -> Callable[[], bool]:
    return lambda: bool(NattenContext.state[name])


def set_memory_usage_preference(pref: str = "default") -> None:
    """Remember "default", "strict" or "unrestricted"; the kernels take no more memory for either."""
    if pref not in ("default", "strict", "unrestricted"):
        raise ValueError(f"pref={pref!r} must be 'default', 'strict' or 'unrestricted'")
    NattenContext.state["memory"] = pref


def _prefers(pref: str) -> Callable[[], bool]:
    return lambda: NattenContext.state["memory"] == pref


def has_cuda() -> bool:
    """Return whether there is a device for the fused kernels."""
    return torch.cuda.is_available() and HAS_TRITON


def has_fused_na(device_index: int | None = None) -> bool:
    """Return True: the fused functions take every device."""
    return True


def has_half(device_index: int | None = None) -> bool:
    """Return whether half precision runs on a GPU."""
    return has_cuda()


def has_bfloat(device_index: int | None = None) -> bool:
    """Return whether bfloat16 runs on a GPU."""
    return has_cuda() and torch.cuda.is_bf16_supported()


def has_gemm(device_index: int | None = None) -> bool:
    """Return False: NATTEN's kernels of matrix products are not there."""
    return False


def get_device_cc(device_index: int | None = None) -> int:
    """Compute capability of a GPU as one number, such as 90; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


SETTINGS: dict[str, dict[str, Any]] = {  # names by the first release that has them
    "0.15.0": {
        "has_cuda": has_cuda,
        "has_half": has_half,
        "has_bfloat": has_bfloat,
        "has_gemm": has_gemm,
        "has_tf32_gemm": has_gemm,
        "has_fp32_gemm": has_gemm,
        "has_fp64_gemm": has_gemm,
        "enable_tf32": _switch("tf32", True),
        "disable_tf32": _switch("tf32", False),
        "enable_tiled_na": _switch("tiled", True),
        "disable_tiled_na": _switch("tiled", False),
        "enable_gemm_na": _switch("gemm", True),
        "disable_gemm_na": _switch("gemm", False),
    },
    "0.17.0": {
        "has_fna": has_fused_na,
        "has_fused_na": has_fused_na,
        "use_fna": _switch("fused"),
        "use_fused_na": _switch("fused"),
        "is_fna_enabled": _is("fused"),
        "is_fused_na_enabled": _is("fused"),
        "use_kv_parallelism_in_fused_na": _switch("kv_parallel"),
        "is_kv_parallelism_in_fused_na_enabled": _is("kv_parallel"),
        "use_deterministic_algorithms": _switch("deterministic"),
        "are_deterministic_algorithms_enabled": _is("deterministic"),
        "use_autotuner": _switch("autotuner"),
        "disable_autotuner": _switch("autotuner", False),
        "is_autotuner_enabled": _is("autotuner"),
        "is_autotuner_enabled_for_forward": _is("autotuner"),
        "is_autotuner_enabled_for_backward": _is("autotuner"),
        "is_autotuner_thorough_for_forward": lambda: False,
        "is_autotuner_thorough_for_backward": lambda: False,
        "use_tf32_in_gemm_na": _switch("tf32"),
        "is_tf32_in_gemm_na_enabled": _is("tf32"),
        "use_tiled_na": _switch("tiled"),
        "is_tiled_na_enabled": _is("tiled"),
        "use_gemm_na": _switch("gemm"),
        "is_gemm_na_enabled": _is("gemm"),
        "set_memory_usage_preference": set_memory_usage_preference,
        "get_memory_usage_preference": lambda: NattenContext.state["memory"],
        "is_memory_usage_default": _prefers("default"),
        "is_memory_usage_strict": _prefers("strict"),
        "is_memory_usage_unrestricted": _prefers("unrestricted"),
    },
    "0.17.5": {"use_flex_attention": _switch("fused"), "force_flex_attention": _switch("fused")},
    "0.20.0": {
        "allow_flex_compile": _switch("flex_compile"),
        "allow_flex_compile_backprop": _switch("flex_compile_backprop"),
        "disable_flex_compile": _switch("flex_compile", False),
        "disable_flex_compile_backprop": _switch("flex_compile_backprop", False),
        "is_flex_compile_allowed": _is("flex_compile"),
        "is_flex_compile_backprop_allowed": _is("flex_compile_backprop"),
    },
}
GONE = {  # names by the first release without them
    "0.20.0": {
        *SETTINGS["0.15.0"],
        *(name for name in SETTINGS["0.17.0"] if name not in {
            "use_kv_parallelism_in_fused_na", "is_kv_parallelism_in_fused_na_enabled", "use_deterministic_algorithms",
            "are_deterministic_algorithms_enabled", "set_memory_usage_preference", "get_memory_usage_preference",
            "is_memory_usage_default", "is_memory_usage_strict", "is_memory_usage_unrestricted",
        }),
        *SETTINGS["0.17.5"],
    },
}  # fmt: skip
