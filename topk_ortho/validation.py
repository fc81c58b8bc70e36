"""Checks of what users pass: a ValueError or TypeError that names the argument, what came and what is allowed.

Only what is known without reading the data is checked here; NaN and Inf are found by the ops, where the norms are at
hand.
"""

import numbers
from collections.abc import Sequence
from typing import Any, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch._C._functorch import is_gradtrackingtensor
from torch.autograd import forward_ad

from topk_ortho.definitions import Precision, Query, Similarity, k_from_fraction, n_pairs
from topk_ortho.sparse_features import SparseFeatures

_Features = TypeVar("_Features", bound=Tensor | SparseFeatures)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SPARSE_LAYOUTS = (torch.sparse_coo, torch.sparse_csr)
_COMPARABLE = (*FLOATING, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_features(x: Any, dim: Any = 1, *, least_features: int = 2) -> None:
    """Refuse what is not a floating [M, N] matrix, dense or sparse, with M >= 1 and so many features at least.

    With dim=0 it must be dense, and is [N, M].
    """
    if isinstance(dim, bool) or not isinstance(dim, numbers.Integral) or dim not in (0, 1):
        raise ValueError(f"dim must be 1 (features are columns of x) or 0 (they are rows, as in W_dec), got {dim!r}")
    dim = int(dim)
    if isinstance(x, SparseFeatures):
        _refuse_rows_of_sparse(dim)
        _check_sparse_features(x, least_features)
        _refuse_transforms(x.values)
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor or SparseFeatures, got {_describe(x)}")
    _refuse_transforms(x)
    if x.layout not in (torch.strided, *_SPARSE_LAYOUTS):
        raise TypeError(f"x must be dense, sparse_coo or sparse_csr, got layout {x.layout}; convert it")
    if x.is_nested:
        raise TypeError("x must be a dense or sparse tensor, got a nested one")
    if x.ndim != 2:
        form = "[M, N] with features in columns" if dim == 1 else "[N, M] with features in rows, as dim=0"
        raise ValueError(f"x must be 2-D {form}, got shape {list(x.shape)}")
    if x.layout in _SPARSE_LAYOUTS:
        _refuse_rows_of_sparse(dim)
    if x.layout in _SPARSE_LAYOUTS and x.dense_dim() > 0:
        raise ValueError(f"x must hold one number an entry, got {x.dense_dim()} dense dimensions")
    _check_numbers(x.dtype, x.shape, least_features, dim)


def in_columns(x: _Features, dim: int) -> _Features:
    """An x that `check_features` has passed, with its features in columns."""
    return cast("_Features", x.T) if dim == 0 and isinstance(x, Tensor) else x


def _refuse_transforms(x: Tensor) -> None:
    """Refuse what is wrapped by a transform of torch.func, or has a tangent: the ops have a backward pass alone."""
    if torch.compiler.is_compiling():
        return
    if is_gradtrackingtensor(x) or forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            "x is inside torch.func.grad or jvp, or has a forward-mode tangent, which these ops do not support: use "
            "backward() or torch.autograd.grad"
        )


def _refuse_rows_of_sparse(dim: int) -> None:
    if dim == 0:
        raise ValueError("dim must be 1 for a sparse x, whose features are its columns; got 0")


def _check_sparse_features(x: SparseFeatures, least_features: int) -> None:
    for name, tensor in (("indices", x.indices), ("values", x.values)):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(f"x.{name} must be a dense tensor, got {_describe(tensor)}")
    if x.indices.ndim != 2 or x.indices.shape != x.values.shape:
        shapes = f"{list(x.indices.shape)} and {list(x.values.shape)}"
        raise ValueError(f"x.indices and x.values must have the same shape [B, K], got {shapes}")
    if x.indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"x.indices must have dtype int32 or int64, got {x.indices.dtype}")
    if x.indices.device != x.values.device:
        raise ValueError(f"x.indices and x.values must be on one device, got {x.indices.device} and {x.values.device}")
    _check_integer("x.n_features", x.n_features)
    _check_numbers(x.values.dtype, (x.indices.shape[0], x.n_features), least_features)


def _check_numbers(dtype: torch.dtype, shape: Sequence[int], least_features: int, dim: int = 1) -> None:
    if dtype not in FLOATING:
        raise TypeError(f"x must have dtype float16, bfloat16, float32 or float64, got {dtype}")
    if shape[1 - dim] < 1 or shape[dim] < least_features:
        other, of_features = ("row", "columns") if dim == 1 else ("column", "rows")
        features = f" and {least_features} {of_features}" if least_features else ""
        why = "" if dim == 1 else ", which are its features as dim=0"
        raise ValueError(f"x must have at least 1 {other}{features}{why}, got shape {list(shape)}")


def resolve_query(
    n_features: int, *, fraction: Any, k: Any, tau: Any, n_std: Any, similarity: Any, precision: Any
) -> Query:
    """Check the arguments of a call and make a `Query` of them."""
    k = resolve_k(n_features, fraction, k)
    fixed_tau, adaptive_n_std = resolve_tau(tau, n_std)
    check_word("similarity", similarity, Similarity)
    check_word("precision", precision, Precision)
    return Query(k, fixed_tau, adaptive_n_std, similarity, precision)


def resolve_k(n_features: int, fraction: Any, k: Any) -> int:
    """Number of pairs that `k`, or else `fraction`, asks for."""
    if k is None:
        check_number("fraction", fraction)
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        return k_from_fraction(n_features, float(fraction))
    _check_integer("k", k)
    if not 1 <= k <= n_pairs(n_features):
        raise ValueError(f"k must be in [1, {n_pairs(n_features)}], the pairs of {n_features} columns; got {k}")
    return int(k)


def resolve_tau(tau: Any, n_std: Any) -> tuple[float | None, float | None]:
    """Two numbers: tau if it is fixed, else None; n_std if tau is adaptive, else None."""
    check_number("n_std", n_std)
    if not -float("inf") < n_std < float("inf"):
        raise ValueError(f"n_std must be finite, got {n_std}")
    if tau is None:
        return None, None
    if isinstance(tau, str):
        if tau != "adaptive":
            raise ValueError(f'tau must be None, "adaptive" or a number in [0, 1), got {tau!r}')
        return None, float(n_std)
    check_number("tau", tau)
    if not 0 <= tau < 1:
        raise ValueError(f'tau must be None, "adaptive" or a number in [0, 1), got {tau}')
    return float(tau), None


def check_word(name: str, value: Any, allowed: Any) -> None:
    """Refuse a value that is not one of the words of a Literal."""
    words = get_args(allowed)
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, words))}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is not a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_describe(value)}")


def check_n_chunks(n_chunks: Any, n_features: int) -> None:
    """Refuse chunks in which a column would have no other to compare with."""
    _check_integer("n_chunks", n_chunks)
    if not 1 <= n_chunks <= n_features // 2:
        raise ValueError(f"n_chunks must be in [1, {n_features // 2}], two columns to a chunk or more; got {n_chunks}")


def check_generator(generator: Any) -> None:
    """Refuse what is not a torch.Generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {_describe(generator)}")


def resolve_priority(priority: Any, n_features: int, device: torch.device) -> Tensor | None:
    """`priority` as a tensor [n_features] on a device."""
    if priority is None:
        return None
    if isinstance(priority, Tensor):
        if priority.layout != torch.strided or priority.is_meta != (device.type == "meta"):
            raise TypeError(f"priority must be a dense tensor with data, got {_describe(priority)}")
        numbers_of_columns = priority.detach().to(device)
    else:
        try:
            numbers_of_columns = torch.tensor(priority, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"priority must hold one real number a column, got {_describe(priority)}") from error
    if numbers_of_columns.dtype not in _COMPARABLE:
        raise TypeError(
            f"priority must hold real numbers, bool, int8 to int64, uint8 or floating; got {numbers_of_columns.dtype}"
        )
    if numbers_of_columns.shape != (n_features,):
        shape = list(numbers_of_columns.shape)
        raise ValueError(
            f"priority must have shape [{n_features}], one number a feature; got {shape} (features are columns of x, "
            "or with dim=0 its rows)"
        )
    return numbers_of_columns


def check_state(state: Any, device: torch.device) -> None:
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
    if state.device != device:
        raise ValueError(f"state must be on the device of x, {device}; got {state.device}")


def check_number(name: str, value: Any) -> None:
    """Refuse what is not a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {_describe(value)}")


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {_describe(value)}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]
