"""A backend of another device behind CPU tensors, so that one suite serves both."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OnDevice:
    """The four functions of a backend: arguments are moved to a device, with their layout, and results back."""

    backend: Any
    device: str

    def unavailable_reason(self, device: torch.device) -> str | None:
        return self.backend.unavailable_reason(torch.device(self.device))

    def topk_pairs(self, x: Tensor, query: Any, state: Tensor | None) -> Any:
        return _to_cpu(self.backend.topk_pairs(self._move(x), query, self._move(state)))

    def max_cosine(self, x: Tensor, chunks: tuple[Tensor, ...] | None, precision: Any) -> Any:
        return _to_cpu(self.backend.max_cosine(self._move(x), chunks and tuple(map(self._move, chunks)), precision))

    def pair_gradient(self, x: Tensor, norms: Tensor, cosines: Tensor, pairs: Any) -> Tensor:
        x_there, norms, cosines = map(self._move, (x, norms, cosines))
        pairs = type(pairs)(*map(self._move, pairs))
        return torch.empty_like(x).copy_(self.backend.pair_gradient(x_there, norms, cosines, pairs))

    @property
    def slabs(self) -> Any:
        """How products of a sparse x are cut, which stays on the CPU, where there are no kernels."""
        return replace(self.backend.slabs, on_kernels=None)

    def _move(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return storage.to(self.device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def with_fields(backend: Any, **fields: Any) -> Any:
    """A backend with other values of some of its fields, whether it stands behind `OnDevice` or not."""
    if isinstance(backend, OnDevice):
        return replace(backend, backend=replace(backend.backend, **fields))
    return replace(backend, **fields)


def _to_cpu(result: Any) -> Any:
    return type(result)(*(tensor.cpu() for tensor in result))
