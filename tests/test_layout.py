"""The layout is the architecture: imports point downwards, the core needs nothing but torch, triton and numpy."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    {"kernels"},
    {"backends", "selection"},
    {"custom_ops", "pairs", "sparse_features", "sparse_ops", "validation"},
    {"functional"},
    {"modules"},
    {"__init__"},
    {"sae", "evaluation"},
    {"training"},
    {"train", "bench"},
]
"""A layer imports from itself and from those before it."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
CORE_RANK = RANK["__init__"]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("topk_ortho", *parts) if parts[0] == "kernels" else parts)


def layer_of(module):
    """Part of the package that a module belongs to."""
    root, *rest = module.split(".")
    if root == "topk_ortho":
        return rest[0] if rest else "__init__"
    return root


SOURCES = {
    module_name(path): path
    for folder in ("kernels", "topk_ortho", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
} | ({"train": ROOT / "train.py"} if (ROOT / "train.py").exists() else {})


def imports_of(path):
    """Absolute names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in SOURCES else node.module


def test_every_module_has_a_layer():
    assert {layer_of(module) for module in SOURCES} <= set(RANK)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downwards(module):
    for imported in imports_of(SOURCES[module]):
        if imported.split(".")[0] in ("topk_ortho", "train", "bench", "kernels"):
            assert RANK[layer_of(imported)] <= RANK[layer_of(module)], f"{module} imports {imported}"


@pytest.mark.parametrize("module", [m for m in SOURCES if RANK[layer_of(m)] <= CORE_RANK])
def test_core_imports_core_dependencies_only(module):
    roots = {imported.split(".")[0] for imported in imports_of(SOURCES[module])}
    assert roots <= {"torch", "triton", "numpy", "topk_ortho"} | sys.stdlib_module_names


@pytest.mark.parametrize("module", [m for m in SOURCES if layer_of(m) in ("sae", "evaluation", "training", "train")])
def test_the_rest_uses_the_public_interface_only(module):
    private = {"topk_ortho.backends", "topk_ortho.custom_ops", "topk_ortho.validation", "topk_ortho.kernels"}
    used = {".".join(imported.split(".")[:2]) for imported in imports_of(SOURCES[module])}
    assert not used & private


@pytest.mark.parametrize("module", [m for m in SOURCES if layer_of(m) == "backends"])
def test_backends_know_no_losses(module):
    allowed = {"topk_ortho.backends", "topk_ortho.selection", "topk_ortho.kernels"}
    used = {".".join(i.split(".")[:2]) for i in imports_of(SOURCES[module]) if i.startswith("topk_ortho")}
    assert used <= allowed


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
