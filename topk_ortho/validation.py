"""Checks of what users pass: a ValueError or TypeError that names the argument, what came and what is allowed.

Only what is known without reading the data is checked here; NaN and Inf are found by the ops, where the norms are at
hand.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topk_ortho.selection import k_from_fraction, n_pairs

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPARABLE = (*FLOATING, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_features(x: Any) -> None:
    """Refuse what is not a dense floating [M, N] tensor with M >= 1 and N >= 2."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {_describe(x)}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got layout {x.layout}; convert it with x.to_dense()")
    if x.is_nested:
        raise TypeError("x must be a dense tensor, got a nested one")
    if x.ndim != 2:
        raise ValueError(f"x must be 2-D [M, N] with features in columns, got shape {list(x.shape)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"x must have dtype float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.shape[0] < 1 or x.shape[1] < 2:
        raise ValueError(f"x must have at least 1 row and 2 columns, got shape {list(x.shape)}")


def resolve_k(n_features: int, fraction: Any, k: Any) -> int:
    """Number of pairs that `k`, or else `fraction`, asks for."""
    if k is None:
        _check_number("fraction", fraction)
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        return k_from_fraction(n_features, float(fraction))
    _check_integer("k", k)
    if not 1 <= k <= n_pairs(n_features):
        raise ValueError(f"k must be in [1, {n_pairs(n_features)}], the pairs of {n_features} columns; got {k}")
    return int(k)


def resolve_tau(tau: Any, n_std: Any) -> tuple[float | None, float | None]:
    """(fixed tau or None, n_std if tau is adaptive or None)."""
    _check_number("n_std", n_std)
    if not -float("inf") < n_std < float("inf"):
        raise ValueError(f"n_std must be finite, got {n_std}")
    if tau is None:
        return None, None
    if isinstance(tau, str):
        if tau != "adaptive":
            raise ValueError(f'tau must be None, "adaptive" or a number in [0, 1), got {tau!r}')
        return None, float(n_std)
    _check_number("tau", tau)
    if not 0 <= tau < 1:
        raise ValueError(f'tau must be None, "adaptive" or a number in [0, 1), got {tau}')
    return float(tau), None


def check_word(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a value that is not one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_n_chunks(n_chunks: Any, n_features: int) -> None:
    """Refuse chunks in which a column would have no other to compare with."""
    _check_integer("n_chunks", n_chunks)
    if not 1 <= n_chunks <= n_features // 2:
        raise ValueError(f"n_chunks must be in [1, {n_features // 2}], two columns to a chunk or more; got {n_chunks}")


def check_generator(generator: Any) -> None:
    """Refuse what is not a torch.Generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {_describe(generator)}")


def resolve_priority(priority: Any, x: Tensor) -> Tensor | None:
    """`priority` as a tensor [N] on the device of x."""
    if priority is None:
        return None
    if isinstance(priority, Tensor):
        if priority.layout != torch.strided or priority.is_meta != x.is_meta:
            raise TypeError(f"priority must be a dense tensor with data, got {_describe(priority)}")
        numbers_of_columns = priority.detach().to(x.device)
    else:
        try:
            numbers_of_columns = torch.tensor(priority, device=x.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"priority must hold one real number a column, got {_describe(priority)}") from error
    if numbers_of_columns.dtype not in _COMPARABLE:
        raise TypeError(
            f"priority must hold real numbers, bool, int8 to int64, uint8 or floating; got {numbers_of_columns.dtype}"
        )
    if numbers_of_columns.shape != x.shape[1:]:
        shape = list(numbers_of_columns.shape)
        raise ValueError(f"priority must have shape [{x.shape[1]}], one number a column; got {shape}")
    return numbers_of_columns


def check_state(state: Any, x: Tensor) -> None:
    """Refuse what is not a warm-start state on the device of x."""
    if state is None:
        return
    if not isinstance(state, Tensor) or state.shape != (3,) or not state.is_floating_point():
        raise TypeError(
            f"state must come from topk_ortho.initial_state(), a floating tensor [3]; got {_describe(state)}"
        )
    stale = not torch.compiler.is_compiling() and state.is_inference() and not torch.is_inference_mode_enabled()
    if stale or state.requires_grad or 0 in state.stride():
        raise ValueError(
            "state is updated in place, so it must own its memory, not require grad, and not come from inference mode"
        )
    if state.device != x.device:
        raise ValueError(f"state must be on the device of x, {x.device}; got {state.device}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {_describe(value)}")


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {_describe(value)}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]
