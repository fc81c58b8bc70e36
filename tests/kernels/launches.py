"""Every launch of the compile report as Triton sees it, and what its front end says to arguments that are 1.

``python -m tests.kernels.launches`` prints it as JSON. It has a process of its own, because the kernels may be
interpreted in that of the tests.
"""

import json
from typing import Any

import torch
from triton import knobs
from triton._C.libtriton import ir
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from bench.compile_report import ARCHITECTURES, AbsentDevice, variants
from topk_ortho.backends import triton as backends
from topk_ortho.backends.triton import TritonBackend
from topk_ortho.definitions import Query
from topk_ortho.kernels.launch import _only_compiles, compiling_ahead
from topk_ortho.kernels.transpose import transpose

_TARGET = ARCHITECTURES["sm_90"].target


def front_end_error(kernel: Any, signature: dict[str, str], constants: dict[tuple[int, ...], Any]) -> str | None:
    """None, or the end of what the front end of Triton says."""
    backend = make_backend(_TARGET)
    options = backend.parse_options({"num_warps": 4})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    try:
        ASTSource(kernel, signature, constants).make_ir(_TARGET, options, functions, backend.get_module_map(), context)
    except Exception as error:  # of many types
        return str(error)[-300:]
    return None


def errors_by_argument(kernel: Any, signature: dict[str, str], constants: dict[tuple[int, ...], Any]) -> dict[str, Any]:
    """What the front end says when no integer argument is a constant, and when one of them is, because it is 1."""
    at_run_time = [p for p in kernel.params if not p.is_constexpr]
    integers = [p for p in at_run_time if signature[p.name] in ("i32", "i64", "constexpr")]
    signature = signature | {p.name: "i32" for p in integers if signature[p.name] == "constexpr"}
    constants = {place: value for place, value in constants.items() if place not in [(p.num,) for p in integers]}
    return {"none": front_end_error(kernel, signature, constants)} | {
        p.name: front_end_error(kernel, signature | {p.name: "constexpr"}, constants | {(p.num,): 1}) for p in integers
    }


def compiled_ahead() -> dict[str, int]:
    """What becomes of two launches in `compiling_ahead`, and of the same ones afterwards."""
    device = AbsentDevice("sm_90")
    x, out = (torch.empty(64, 64, dtype=dtype, device="meta") for dtype in (torch.float32, torch.bfloat16))

    def launch_both() -> None:
        for tensor in (x, out):
            transpose(tensor, tensor.T)

    try:
        with compiling_ahead():
            launch_both()
            raise KeyError
    except KeyError:
        assert not _only_compiles.get(), "nothing would be launched any more"
    kernel = device.kernel
    assert kernel is not None
    result = {"compiled": len(kernel.device_caches[id(device)][0]), "launched": device.n_programs}
    device.kernel = None
    launch_both()
    return result | {"compiled later": int(device.kernel is not None), "launched later": device.n_programs}


def of_a_call(dtype: torch.dtype) -> dict[str, int]:
    """What a call with a state launches, and how much of it the backend does not compile ahead; by kernel and key."""
    backend, query = TritonBackend(), Query(k=2000)
    x, state = torch.empty(300, 2000, dtype=dtype, device="meta"), torch.empty(3, device="meta")
    device = AbsentDevice("sm_90", compiles=False)
    ahead, later = set(), set()
    for seen, call in ((ahead, backend._compile_ahead), (later, backend._select)):

        def collect(*, fn: Any, key: str, _seen: set[tuple[str, str]] = seen, **_: Any) -> bool:
            _seen.add((fn.jit_function.__name__, key))
            return True

        knobs.runtime.jit_cache_hook = collect
        call(x, query, state)
    assert device.kernel is None
    return {"launched": len(later), "not ahead": len(later - ahead)}


def main() -> None:
    device = AbsentDevice("sm_90", compiles=False)
    names, launches = [], {}
    for variant in variants():
        variant.launch()
        names.append((device.kernel_name, variant.label))
        signature, constants = device.arguments["signature"], device.arguments["constants"]
        n_options = sum(value is True for value in constants.values())
        launches.setdefault(device.kernel_name, []).append((n_options, device.kernel, signature, constants))
    errors = {}
    for name, of_kernel in launches.items():
        # the launch that has most of its options on compiles most of the kernel
        _, *arguments = max(of_kernel, key=lambda launch: launch[0])
        errors[name] = errors_by_argument(*arguments)
    backends.may_synchronize = lambda device, state: False
    calls = {str(dtype): of_a_call(dtype) for dtype in (torch.bfloat16, torch.float32)}
    print(json.dumps({"names": names, "errors": errors, "ahead": compiled_ahead(), "calls": calls}))


if __name__ == "__main__":
    main()
