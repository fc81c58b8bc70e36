"""Makes `topk_ortho.kernels` importable in a clone that nothing has installed.

The kernels lie in `kernels/`, beside the folder `topk_ortho/`, and an installation puts or maps them to
`topk_ortho.kernels`. Python that is started in a clone imports `topk_ortho` from the working folder, whatever is
installed: there the folder beside the package has to be found by the package itself.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_NAME = "topk_ortho.kernels"
_A_MODULE_OF_OURS = "gram_survivors"
"""Tells our kernels from another folder of that name."""


def register_kernels() -> None:
    """Import the kernels' package, which holds nothing but a docstring, from the folder beside `topk_ortho`.

    Nothing happens if `topk_ortho` has the kernels inside it, as an installed wheel has, or if there is no such folder
    beside it. The folder beside it comes before one that an editable installation names: that of another clone would
    have other kernels than this package was written for.
    """
    folder = Path(__file__).parents[1]
    if _NAME in sys.modules or _kernels_in(folder) is not None:
        return
    spec = _kernels_in(folder.parent)
    if spec is None or spec.loader is None:
        return
    kernels = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = kernels
    spec.loader.exec_module(kernels)
    vars(sys.modules["topk_ortho"])["kernels"] = kernels  # as the import statement does


def _kernels_in(folder: Path) -> ModuleSpec | None:
    """How to import the package `kernels` that a folder, or a zip file, holds; None if it holds none of ours."""
    spec = PathFinder.find_spec(_NAME, [str(folder)])
    places = None if spec is None else spec.submodule_search_locations
    if places is None or PathFinder.find_spec(f"{_NAME}.{_A_MODULE_OF_OURS}", list(places)) is None:
        return None
    return spec
