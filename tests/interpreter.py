"""Triton's interpreter, several times as fast: most of the time of the tests is spent in it.

It makes the same objects over and over again, and compares types by taking them apart. What is here remembers or
shortens such steps. What a kernel computes, and what the interpreter refuses, stays as it is.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from triton.runtime import interpreter

_core = interpreter.tl.core
_patched: set[str] = set()
"""Modules whose functions have been called since the launch of the current kernel."""


def speed_up() -> None:
    """Replace the slow parts of the interpreter in this process."""
    _remember(interpreter, "_get_np_dtype", lambda dtype: dtype.scalar.name)
    _remember(_core.block_type, "with_element_ty", lambda block, scalar: (block.name, scalar.name))
    _remember(interpreter.InterpreterBuilder, "get_block_ty", lambda builder, dtype, shape: (dtype.name, str(shape)))
    _wrap(interpreter.GridExecutor, "__call__", _launch)
    _wrap(interpreter, "_patch_lang", _patch_once)
    _wrap(interpreter.TritonSemantic, "broadcast_impl_value", _broadcast)
    interpreter._patch_builtin = _patch_builtin
    _core.tensor.__init__ = _init_tensor
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Put a wrapper in the place of a function, which it receives as its first argument."""
    function = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: wrapper(function, *arguments, **options))


def _remember(owner: Any, name: str, key: Callable[..., object]) -> None:
    """Let a function make only once what it makes anew for every operation: types."""
    function, known = getattr(owner, name), {}

    def remembered(*arguments: Any) -> Any:
        place = key(*arguments)
        if place not in known:
            known[place] = function(*arguments)
        return known[place]

    setattr(owner, name, remembered)


def _launch(launch: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """At its end the launch of a kernel undoes what was patched for it."""
    _patched.clear()
    launch(*arguments, **options)


def _patch_once(patch: Callable[[Any], Any], function: Any) -> Any:
    """Patch what a kernel or a device function calls once in a launch, and not at every call."""
    if function.__module__ in _patched:
        return interpreter._LangPatchScope()
    _patched.add(function.__module__)
    return patch(function)


@functools.cache
def _builtins_of(package: Any) -> list[tuple[str, Any]]:
    return [item for item in inspect.getmembers(package) if _core.is_builtin(item[1])]


def _patch_builtin(package: Any, *arguments: Any) -> None:
    """The interpreter searches Triton's modules for what it has to patch. What is found first does not change."""
    for name, member in _builtins_of(package):
        if getattr(package, name) is member:
            interpreter._patch_attr(package, name, member, *arguments)


@functools.cache
def _shape_and_size(*sides: int) -> tuple[Any, Any]:
    return _core.tuple([_core.constexpr(side) for side in sides]), _core.constexpr(math.prod(sides))


def _init_tensor(tensor: Any, handle: Any, type: Any) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.shape, tensor.numel = _shape_and_size(*type.shape) if type.is_block() else _shape_and_size()


def _broadcast(broadcast: Callable[..., Any], semantic: Any, left: Any, right: Any) -> Any:
    """Two tensors of the same shape are ready for an operation."""
    if left.type.is_block() and right.type.is_block() and [*left.type.shape] == [*right.type.shape]:
        return left, right
    return broadcast(semantic, left, right)


def _refuse_overflow(semantic: Any, left: Any, right: Any, operation: Any) -> None:
    """The check that no integer overflows, in NumPy instead of operations of Triton."""
    scalar = left.type.scalar
    if scalar.int_bitwidth >= 64:
        return
    wide = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    result = wide(left.handle.data, right.handle.data, dtype=np.int64)
    least, most = scalar.get_int_min_value(), scalar.get_int_max_value()
    assert ((result >= least) & (result <= most)).all(), (
        f"int{scalar.int_bitwidth} overflow detected for operation {operation.__name__}"
    )
