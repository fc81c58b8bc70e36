"""The core needs nothing but torch, triton and numpy. Which part may import which is checked by `make lint`."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NEEDS_AN_EXTRA = ("activations", "compare.py", "evaluation", "files.py", "sae", "study", "training")
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


def run_python(code, *flags, cwd, arguments=(), environment=None):
    command = [sys.executable, *flags, "-c", code, *arguments]
    environment = os.environ | (environment or {})
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


IMPORT = """
import importlib.util, pathlib, sys
sys.path.insert(0, sys.argv[1])
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
assert all(hasattr(topk_ortho, name) for name in topk_ortho.__all__)
assert not blocked & set(sys.modules)
assert not {"topk_ortho.training", "topk_ortho.sae", "topk_ortho.evaluation"} & set(sys.modules)
print("imported")
print(pathlib.Path(topk_ortho.kernels.__file__).parent)
sys.path.remove(sys.argv[1])
spec = importlib.util.find_spec("kernels")
print(None if spec is None else spec.origin)
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What a process prints that imports the package, from a folder where nothing of it lies."""
    folder = tmp_path_factory.mktemp("elsewhere")
    return run_python(IMPORT, "-I", "-W", "error", cwd=folder, arguments=[str(ROOT)])


def test_import_needs_only_the_core_and_prints_nothing(imported):
    assert (imported.returncode, imported.stderr) == (0, "")
    assert imported.stdout.startswith("imported\n")


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


def test_the_version_that_is_cited():
    import topk_ortho

    assert f"\nversion: {topk_ortho.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_parts_need_no_import_of_their_own():
    """And nothing is imported that is not asked for, torch among it."""
    code = """
import sys, topk_ortho
assert "torch" not in sys.modules
print(topk_ortho.sae.TopKSAE.__name__, topk_ortho.distributed.topk_pairs.__name__, "topk_ortho.training" in sys.modules)
print({"sae", "topk_pairs"} <= set(dir(topk_ortho)), topk_ortho.functional.__name__)
try:
    topk_ortho.topk_pair
except AttributeError as error:
    print(error)
"""
    result = run_python(code, cwd=ROOT)
    assert (result.stderr, result.returncode) == ("", 0)
    assert result.stdout.splitlines() == [
        "TopKSAE topk_pairs False", "True topk_ortho.functional", "module 'topk_ortho' has no attribute 'topk_pair'",
    ]  # fmt: skip


def test_kernels_folder_is_a_subpackage(imported):
    """`topk_ortho.kernels` is kernels/, and the top-level name stays free for the package of that name."""
    _, mapped, free = imported.stdout.splitlines()
    assert Path(mapped) == ROOT / "kernels"
    assert free == "None" or "site-packages" in free


class TestKernelsAreFound:
    """Wherever `topk_ortho` is imported from, its own kernels come with it."""

    CODE = """
import sys
from pathlib import Path
# as if nothing were installed in this environment: an editable installation is a finder of its own
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
import topk_ortho
print(Path(topk_ortho.__file__).parent)
is_available = "triton" in topk_ortho.available_backends()
print(Path(topk_ortho.kernels.__file__).parent if hasattr(topk_ortho, "kernels") else None)
print(is_available)
try:
    topk_ortho.topk_pairs(__import__("torch").eye(3), backend="triton")
except ValueError as error:
    print(error)
"""

    @classmethod
    def run(cls, *, cwd, path=()):
        environment = {"PYTHONPATH": os.pathsep.join(map(str, path)), "TRITON_INTERPRET": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # interpreted kernels are for the CPU
        result = run_python(cls.CODE, cwd=cwd, environment=environment)
        assert result.returncode == 0, result.stderr
        package, kernels, is_available, *error = result.stdout.splitlines()
        return Path(package), Path(kernels), is_available == "True", " ".join(error)

    @staticmethod
    def clone(folder):
        """A clone in which nothing was installed."""
        for name in ("topk_ortho", "kernels"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        return folder

    @pytest.mark.quick
    def test_in_a_clone_though_another_copy_is_installed(self, tmp_path):
        clone, site = self.clone(tmp_path / "clone"), self.clone(tmp_path / "site")
        (site / "kernels").rename(site / "topk_ortho" / "kernels")
        package, kernels, is_available, error = self.run(cwd=clone, path=[site])
        assert (package, kernels) == (clone / "topk_ortho", clone / "kernels")
        assert is_available, error

    def test_inside_an_installed_package_whatever_lies_beside_it(self, tmp_path):
        site = self.clone(tmp_path / "site")
        shutil.copytree(site / "kernels", site / "topk_ortho" / "kernels")
        _, kernels, is_available, error = self.run(cwd=tmp_path, path=[site])
        assert kernels == site / "topk_ortho" / "kernels"
        assert is_available, error

    def test_another_folder_of_that_name_is_left_alone_and_the_reason_is_named(self, tmp_path):
        clone = self.clone(tmp_path)
        shutil.rmtree(clone / "kernels")
        (clone / "kernels").mkdir()
        (clone / "kernels" / "__init__.py").write_text("raise SystemExit('this is not ours')")
        _, kernels, is_available, error = self.run(cwd=clone)
        assert (kernels, is_available) == (Path("None"), False)
        assert "got 'triton': its kernels are missing or incomplete (No module named 'topk_ortho.kernels')" in error
        assert f"in a clone into {clone / 'kernels'}" in error
        assert "Triton is" not in error
