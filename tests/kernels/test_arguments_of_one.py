"""Triton makes a constant of every integer argument that is 1: the kernels must still compile then.

The interpreter does not show it. The front end runs without a GPU, in a process of its own, since the kernels here may
be interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE_ALL = '''
import importlib, json, pkgutil
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton._C.libtriton import ir
from topk_ortho import kernels

POINTERS = {
    "plan": "i64", "histogram": "i64", "n_survivors": "i64", "n_certified": "i64", "n_ordered": "i64", "offsets": "i64",
    "best": "i64", "row_ties": "i32", "flags": "i32", "rows": "i32", "cols": "i32", "partners": "i32",
    "moments": "fp64", "rounded": "bf16", "keys": "i64", "entries": "i64", "starts": "i64", "members": "i64",
    "first_product": "i64", "begins": "i64", "stops": "i64", "ends": "i64", "out": "fp64",
}
FLOATS = {"floor", "eps", "margin_start", "margin_least", "margin_most"}
CONSTANTS = {
    "HAS_STATE": True, "IS_ROUNDED": True, "IS_ADAPTIVE": True, "IS_ABS": True, "HAS_MOMENTS": True, "SCALED": True,
    "SHIFT": 0, "BINS": 512, "BLOCK": 64, "BLOCK_M": 32, "BLOCK_COL": 32, "BLOCK_PAIR": 32, "GROUP": 8,
    "PRECISION": "ieee", "STAGE": 0, "WANTED_FLAGS": 1,
}
target = GPUTarget("cuda", 90, 32)
backend = make_backend(target)
options = backend.parse_options({"num_warps": 4})

def error_of(kernel, ones):
    """None, or what the front end says with these arguments equal to 1."""
    signature, constants = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in ones:
            signature[name], constants[(i,)] = "constexpr", 1 if name in ones else CONSTANTS[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + POINTERS.get(name.removesuffix("_ptr"), "fp32")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, signature, constants)
    try:
        source.make_ir(
            target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        )
    except Exception as error:
        return str(error)[-300:]

results = {}
for module in pkgutil.iter_modules(kernels.__path__):
    if module.name == "compile_report":
        continue
    members = vars(importlib.import_module(f"topk_ortho.kernels.{module.name}"))
    for name, kernel in members.items():
        if name.endswith("_kernel") and kernel.__module__.endswith("." + module.name):
            integers = [
                p.name for p in kernel.params
                if not p.is_constexpr and not p.name.endswith("_ptr") and p.name not in FLOATS
            ]
            for argument in ["none", *integers]:
                results[f"{name} {argument}"] = error_of(kernel, [argument])
print(json.dumps(results))
'''

NEVER_ONE = {"_begin_kernel n_features"}
"""There are two features or more."""


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE_ALL],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_front_end(errors):
    assert len(errors) > 60
    failed = {case: error for case, error in errors.items() if error is not None and case not in NEVER_ONE}
    assert not failed, failed
