"""A second device where there is no GPU: it computes on the CPU, and refuses what torch refuses on a GPU.

To everything that looks at them, autograd included, its tensors are on another device; each wraps a CPU tensor that has
the numbers. Every operation on them comes here, and must find all its tensors on one device, apart from what torch
lets pass.

torch takes a device in only once in a process and only before the first backward pass: `tests/test_devices.py` starts
processes for that.
"""

from collections.abc import Iterable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

_NAME = "standin"
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_CPU_ONLY = ("histogram", "histogramdd")
"""Operations without kernels for GPUs, of those that one might use here."""


class _StandInTensor(Tensor):
    """A tensor on the second device."""

    on_cpu: Tensor
    """The CPU tensor with its numbers, of the same shape and strides."""

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "_StandInTensor":
        options: dict[str, Any] = {}
        if on_cpu.layout == torch.strided:
            options = {"strides": on_cpu.stride(), "storage_offset": on_cpu.storage_offset()}
        elif on_cpu.layout == torch.sparse_csr:
            options = {"dispatch_layout": True}  # torch then asks for the layout, see `__torch_dispatch__`
        tensor = Tensor._make_wrapper_subclass(
            cls, on_cpu.shape, dtype=on_cpu.dtype, layout=on_cpu.layout, device=torch.device(_NAME, 0), **options
        )
        tensor.on_cpu = on_cpu
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "aten":
            return _run(op, *args, **(kwargs or {}))
        if op is torch.ops.prim.layout.default:
            return args[0].on_cpu.layout
        # a custom op: its body runs as it is, and what it consists of comes here in its turn
        return op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))

    def tolist(self) -> Any:
        return self.on_cpu.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self, **_: Any) -> str:
        return f"{_NAME}({self.on_cpu!r})"


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of torch on the CPU. Its results are where its tensors are, or where `device` says."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    wrappers = {id(tensor.on_cpu): tensor for tensor in tensors if isinstance(tensor, _StandInTensor)}
    device = kwargs.get("device")
    is_here = bool(wrappers) if device is None else device.type == _NAME
    if wrappers:
        _refuse_other_devices(op, tensors, args, kwargs)
    if is_here:
        _refuse_what_only_the_cpu_has(op, tree_leaves((args, kwargs)))
    result = op(*tree_map(_to_cpu, args), **tree_map(_to_cpu, kwargs))
    for wrapper in wrappers.values():
        if wrapper.shape != wrapper.on_cpu.shape:
            raise NotImplementedError(f"the stand-in for a GPU does not take {op}, which changes a shape in place")

    def wrapped(on_cpu: Tensor) -> Tensor:
        if id(on_cpu) in wrappers:  # the operation is in place
            return wrappers[id(on_cpu)]
        return _StandInTensor(on_cpu) if is_here else on_cpu

    return tree_map_only(Tensor, wrapped, result)


def _to_cpu(leaf: Any) -> Any:
    if isinstance(leaf, _StandInTensor):
        return leaf.on_cpu
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _refuse_other_devices(op: Any, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse CPU tensors among those of an operation, some of whose tensors are here.

    Copies go between devices. A number in a CPU tensor [] may stand for a number where operations go element by
    element, and an index may be on the CPU where x[index] is read or written.
    """
    name = _name(op)
    if name == "copy_":
        return
    strangers = [tensor for tensor in tensors if not isinstance(tensor, _StandInTensor)]
    if name in _INDEXING:
        x, _, *values = args
        strangers = [tensor for tensor in (x, *values[:1]) if not isinstance(tensor, _StandInTensor)]
    takes_numbers = torch.Tag.pointwise in op.tags or name in (*_INDEXING, "fill_", "masked_fill_")
    arguments = op._schema.arguments
    by_name = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    written = [by_name.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    for stranger in strangers:
        if stranger.ndim or not takes_numbers or any(stranger is tensor for tensor in written):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {op} got one of shape {list(stranger.shape)} "
                f"on {stranger.device} and others on {_NAME}"
            )


def _name(op: Any) -> str:
    name: str = op._schema.name
    return name.removeprefix("aten::")


def _refuse_what_only_the_cpu_has(op: Any, arguments: Iterable[Any]) -> None:
    """Refuse operations without a kernel for GPUs, and random generators of the CPU."""
    if _name(op) in _CPU_ONLY:
        raise NotImplementedError(f"Could not run {op} with arguments from the {_NAME} backend")
    for argument in arguments:
        if isinstance(argument, torch.Generator):
            raise RuntimeError(f"Expected a {_NAME!r} device type for generator but found {argument.device.type!r}")


class _Module:
    """What torch asks about a device, as it asks torch.cuda."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers come from the CPU's generator."""

    def _is_in_bad_fork(self) -> bool:
        return False


_libraries: list[torch.library.Library] = []
"""Registrations hold as long as these exist."""


def install() -> str:
    """Make the device known to torch; returns its name."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(_NAME, _Module())
    # operations that make a tensor here have no argument whose class could bring them to `_run`
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(_run, "PrivateUse1")
    # torch.tensor copies into a tensor of ours past its class; torch composes arange of others that change a shape
    aten = torch.library.Library("aten", "IMPL")
    for name in ("copy_.default", "arange.default", "arange.start", "arange.start_step"):
        op = attrgetter(name)(torch.ops.aten)
        aten.impl(op, partial(_run, op), "PrivateUse1")
    _libraries.extend((rest, aten))
    return _NAME
