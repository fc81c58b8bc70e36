"""The core needs nothing but torch, triton and numpy. Which part may import which is checked by `make lint`."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NEEDS_AN_EXTRA = ("activations", "evaluation", "sae", "training")
CORE = [
    path
    for folder in ("kernels", "topk_ortho")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.relative_to(ROOT).parts[1] not in NEEDS_AN_EXTRA
]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_imports_core_dependencies_only(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    assert roots <= {"torch", "triton", "numpy", "topk_ortho"} | sys.stdlib_module_names


def run_python(code, *flags, cwd):
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_import_needs_only_the_core_and_prints_nothing():
    code = """
import sys
blocked = set("transformer_lens transformers datasets safetensors tqdm matplotlib sae_bench pytest hypothesis".split())
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *arguments):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, *arguments)
sys.meta_path[:] = map(Without, sys.meta_path)
import topk_ortho
import torch
topk_ortho.topk_ortho_loss(torch.eye(4))
assert not blocked & set(sys.modules)
assert not {"topk_ortho.training", "topk_ortho.sae", "topk_ortho.evaluation"} & set(sys.modules)
"""
    result = run_python(code, "-W", "error", cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.quick
def test_public_names():
    import topk_ortho

    interface = {
        "topk_pairs", "topk_ortho_loss", "max_cosine_loss", "pair_jaccard", "available_backends", "initial_state",
        "TopKOrthoLoss", "MaxCosineLoss", "TopKPairs",
    }  # fmt: skip
    assert interface <= set(topk_ortho.__all__)
    assert topk_ortho.__all__ == sorted(topk_ortho.__all__)
    assert all(hasattr(topk_ortho, name) for name in topk_ortho.__all__)


def _is_installed():
    try:
        importlib.metadata.distribution("topk-ortho")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not _is_installed(), reason="the mapping of kernels/ is made by the installation")
def test_kernels_folder_is_a_subpackage(tmp_path):
    """`topk_ortho.kernels` is kernels/, and the top-level name stays free for the package of that name."""
    code = """
import importlib.util, pathlib, topk_ortho.kernels
print(pathlib.Path(topk_ortho.kernels.__file__).parent)
spec = importlib.util.find_spec("kernels")
print(None if spec is None else spec.origin)
"""
    result = run_python(code, "-I", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    mapped, free = result.stdout.splitlines()
    assert mapped.endswith("kernels")
    assert free == "None" or "site-packages" in free
