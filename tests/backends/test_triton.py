"""What the Triton backend does beyond the interface: where it runs, what it reads, how it cuts its work."""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracle
from tests.conftest import use_case
from tests.inputs import FLOATING, activations, normal, seeded
from tests.kernels.arguments import DEVICE, numbers
from tests.on_device import with_fields
from tests.tolerances import assert_gradient, assert_selection, assert_within, cosine_bound, float64, gradient_bound
from topk_ortho import custom_ops, initial_state, topk_ortho_loss, topk_pairs
from topk_ortho.backends import device as devices
from topk_ortho.backends import registry, triton
from topk_ortho.backends.base import WeightedPairs
from topk_ortho.backends.device import kernels_unavailable_reason, may_synchronize
from topk_ortho.backends.registry import BACKENDS, resolve_backend
from topk_ortho.backends.tiled import TiledBackend
from topk_ortho.backends.triton import TritonBackend
from topk_ortho.definitions import Query
from topk_ortho.kernels import gram_survivors, launch, pair_gradient, pair_lists
from topk_ortho.kernels.norms import Norms
from topk_ortho.warm_start import GUESS

on_the_cpu = pytest.mark.skipif(not launch.INTERPRETED, reason="it runs the kernels on the CPU, and here is a GPU")


@pytest.fixture(params=["triton", "triton_screened"])
def _small_pieces(request, monkeypatch):
    use_case(request.param, monkeypatch)


@on_the_cpu
class TestAvailability:
    """A reason that an error can quote, for everything that is missing."""

    @pytest.fixture(autouse=True)
    def _compiled(self, monkeypatch):
        monkeypatch.setattr(devices, "INTERPRETED", False)

    @pytest.mark.parametrize(
        ("device", "capability", "reason"),
        [
            ("cpu", None, "needs a CUDA or ROCm device, not 'cpu'; TRITON_INTERPRET=1"),
            ("mps", None, "needs a CUDA or ROCm device, not 'mps'"),
            ("cuda", (7, 5), "needs compute capability 8.0, and Old Card has less"),
            ("cuda", (8, 0), None),
            ("cuda", (10, 0), None),
            ("cuda", (12, 0), None),
        ],
    )
    def test_devices(self, device, capability, reason, monkeypatch):
        monkeypatch.setattr(devices, "TRITON_VERSION", (3, 9))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
        actual = kernels_unavailable_reason(torch.device(device))
        assert actual is None if reason is None else reason in actual

    @pytest.mark.parametrize(("capability", "is_available"), [((9, 0), True), ((10, 0), False), ((12, 0), True)])
    def test_blackwell_needs_a_later_triton(self, capability, is_available, monkeypatch):
        monkeypatch.setattr(devices, "TRITON_VERSION", (3, 6))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        reason = kernels_unavailable_reason(torch.device("cuda"))
        assert reason is None if is_available else "needs Triton 3.9 for compute capability 10.0" in reason

    def test_rocm_has_no_compute_capability(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert kernels_unavailable_reason(torch.device("cuda")) is None

    @pytest.mark.parametrize(
        ("error", "version", "reason"),
        [
            (ModuleNotFoundError("No module named 'triton'", name="triton"), None, "Triton is not installed; `pip"),
            (
                ImportError("libtriton.so is broken", name="triton._C"),
                None,
                "cannot be imported (libtriton.so is broken)",
            ),
            (ImportError("no name 'knobs'", name="triton"), "3.1.0", "Triton 3.1.0 is too old (no name 'knobs'); `pip"),
            (AttributeError("no attribute 'div_rn'"), "2.3.1+cu", "Triton 2.3.1+cu is too old (no attribute 'div_rn')"),
            (AttributeError("no attribute 'dot'"), "3.20.0", "with Triton 3.20.0 (no attribute 'dot'); please report"),
            (AttributeError("no attribute 'jit'"), "", "`import triton` finds something else of that name, <module"),
            (ImportError("no name", name="topk_ortho.kernels"), "3.6.0", "its kernels are missing or incomplete"),
        ],
        ids=["none", "broken", "too_old", "much_too_old", "too_new", "another_module", "no_kernels"],
    )
    def test_the_reason_names_what_is_missing(self, error, version, reason, monkeypatch):
        module = None if version is None else ModuleType("triton")
        if version:
            module.__version__ = version
        monkeypatch.setitem(sys.modules, "triton", module)
        monkeypatch.setattr(devices, "IMPORT_ERROR", devices.why_not_imported(error))
        assert reason in kernels_unavailable_reason(torch.device("cuda"))
        with pytest.raises(ValueError, match=re.escape(f"got 'triton': {devices.IMPORT_ERROR}")):
            topk_pairs(torch.eye(3), backend="triton")

    def test_interpreted_kernels_are_for_the_cpu(self, monkeypatch):
        monkeypatch.setattr(devices, "INTERPRETED", True)
        assert kernels_unavailable_reason(torch.device("cpu")) is None
        assert "CPU tensors only" in kernels_unavailable_reason(torch.device("cuda"))

    def test_auto(self, monkeypatch):
        monkeypatch.setattr(triton, "kernels_unavailable_reason", lambda device: None)
        assert resolve_backend("auto", torch.device("cuda")) == "triton"
        assert resolve_backend("auto", torch.device("cpu")) == "auto"  # until it sees the data

    @pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
    def test_auto_without_kernels_warns_once(self, is_compiled, monkeypatch):
        reason = f"it rains, and it is {is_compiled} that this is compiled"
        monkeypatch.setattr(triton, "kernels_unavailable_reason", lambda device: reason)

        def resolve(x):
            assert resolve_backend("auto", torch.device("cuda")) == "tiled"
            return x + 1

        call = torch.compile(resolve, backend="eager", fullgraph=True) if is_compiled else resolve
        with pytest.warns(UserWarning, match=f'cannot run: {reason}. With backend="tiled"'):
            call(torch.ones(2))
        call(torch.ones(3, 3))
        assert resolve_backend("auto", torch.device("mps")) == "tiled"  # there are no kernels for it, ever

    def test_an_explicit_choice_never_falls_back(self):
        with pytest.raises(ValueError, match="got 'triton': it needs a CUDA or ROCm device"):
            topk_pairs(torch.eye(3), backend="triton")

    def test_available_on_this_machine(self, monkeypatch):
        assert "triton" not in registry.available_backends()
        monkeypatch.setattr(devices, "INTERPRETED", True)
        assert "triton" in registry.available_backends()


class _HostReads(TorchDispatchMode):
    """Counts the operators that would wait for an accelerator."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount")

    def __init__(self):
        super().__init__()
        self.seen = []
        self.largest_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        is_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if is_mask or name.strip("_") in {waiting.strip("_") for waiting in self.WAITING}:
            self.seen.append(func.__name__)
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest_bytes = max(self.largest_bytes, tensor.nbytes)
        return result


class _Launches(TorchDispatchMode):
    """Names the kernels of a step, and torch's operators but for those that allocate."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def of_kernel(self, name, launcher):
        """The launcher of a kernel; the interpreter calls operators of its own."""

        def launch(*arguments, **options):
            before = len(self.seen)
            result = launcher(*arguments, **options)
            self.seen[before:] = [name]
            return result

        return launch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.seen += [] if name in ("empty", "empty_like", "new_empty") else [name]
        return func(*args, **(kwargs or {}))


@on_the_cpu
class TestTheWarmPath:
    """Nothing that depends on data is read on the host once there is a state."""

    ARGUMENTS = (
        {},
        {"tau": 0.3},
        {"n_std": 1.0},
        {"similarity": "positive"},
        {"precision": "high"},
        {"precision": "medium"},
    )

    @pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
    @pytest.mark.usefixtures("_small_pieces")
    def test_no_host_reads(self, arguments, monkeypatch):
        """The guess fails, so that every kernel has its turn; the host launches the same ones whatever it is."""
        monkeypatch.setattr(triton, "may_synchronize", lambda device, state: state is None)
        x, state = normal(24, 43), torch.tensor([0.99, 0.15, 1.0])
        with _HostReads() as reads:
            selection = BACKENDS["triton"].topk_pairs(x, Query(k=60, **arguments), state)
            weights = selection.cosines * 0.5
            pairs = WeightedPairs(selection.rows, selection.cols, weights, weights)
            BACKENDS["triton"].pair_gradient(x, selection.norms, selection.cosines, pairs)
        assert reads.seen == []

    @pytest.mark.parametrize(
        ("n_features", "sorts"), [(2**17, ["sort_keys", "sort"]), (1, ["sort"] * 2)], ids=["one_key", "two_sorts"]
    )
    def test_the_end_of_a_call_launches_little(self, n_features, sorts, monkeypatch):
        """A call of few features takes as long as its launches; an empty tensor takes none."""
        monkeypatch.setattr(triton, "may_synchronize", lambda device, state: False)
        monkeypatch.setattr(triton, "MOST_FEATURES_OF_ONE_KEY", n_features)
        launches = _Launches()
        for name in ("sort_keys", "take_ordered"):
            monkeypatch.setattr(triton, name, launches.of_kernel(name, getattr(triton, name)))
        finish = triton._finish

        def spy(*arguments):
            with launches:
                return finish(*arguments)

        monkeypatch.setattr(triton, "_finish", spy)
        BACKENDS["triton"].topk_pairs(normal(24, 43), Query(k=60, tau=0.3), torch.tensor([0.5, 0.15, 1.0]))
        seen = [name for name in launches.seen if name in ("sort_keys", "sort", "take_ordered")]
        assert seen == [*sorts, "take_ordered"]
        assert n_features == 1 or launches.seen == seen

    def test_the_detector_sees_a_read(self):
        with _HostReads() as reads:
            TiledBackend().topk_pairs(normal(24, 43), Query(k=60), None)
        assert any("local_scalar" in name for name in reads.seen)

    def test_who_may_synchronize(self):
        state = initial_state()
        assert may_synchronize(torch.device("cpu"), state)
        assert may_synchronize(torch.device("cuda"), None)
        assert not may_synchronize(torch.device("cuda"), state)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
    def test_what_is_not_finite_becomes_nan(self, bad, monkeypatch):
        monkeypatch.setattr(triton, "may_synchronize", lambda device, state: False)
        x = normal(24, 43).index_fill(1, torch.tensor([7]), bad).requires_grad_()
        state = initial_state()
        loss = topk_ortho_loss(x, k=60, backend="triton", state=state)
        assert loss.isnan()
        loss.backward()
        assert x.grad.isnan().any()
        x = normal(24, 43)
        assert torch.equal(
            topk_ortho_loss(x, k=60, backend="triton", state=state), topk_ortho_loss(x, k=60, backend="triton")
        )

    @pytest.mark.parametrize("is_bad", [False, True])
    def test_nan_in_priority_becomes_nan(self, is_bad, monkeypatch):
        monkeypatch.setattr(custom_ops, "may_synchronize", lambda device, state: False)
        priority = torch.arange(43.0)
        if is_bad:
            priority[5] = torch.nan
        loss = topk_ortho_loss(normal(24, 43), k=60, priority=priority, backend="triton", state=initial_state())
        assert loss.isnan() == is_bad


@on_the_cpu
class TestCompilingAhead:
    """The first call of a kind compiles all that calls of this kind launch, and computes the same."""

    @pytest.fixture(autouse=True)
    def ahead(self, monkeypatch):
        """How often something was compiled ahead, as far as that is seen where nothing is compiled."""
        n_times = []

        @contextmanager
        def compiling_ahead():
            n_times.append(None)
            token = launch._only_compiles.set(True)
            try:
                yield
            finally:
                launch._only_compiles.reset(token)

        monkeypatch.setattr(triton, "compiling_ahead", compiling_ahead)
        monkeypatch.setattr(triton, "INTERPRETED", False)
        monkeypatch.setattr(triton, "_COMPILED", set())
        return n_times

    @pytest.mark.usefixtures("_small_pieces")
    def test_once_for_each_kind(self, ahead, monkeypatch):
        monkeypatch.setattr(triton, "may_synchronize", lambda device, state: state is None)
        x, state = normal(24, 43, seed=2), initial_state()
        for _ in range(2):
            assert_selection(topk_pairs(x, k=60, state=state, backend="triton"), x, k=60)
            assert len(ahead) == 1
        assert_selection(topk_pairs(x[:, :41], k=60, state=state, backend="triton"), x[:, :41], k=60)
        assert len(ahead) == 1
        for part in (x[:16], x[:, :32]):  # Triton compiles anew where 16 divides a number
            n_before = len(ahead)
            assert_selection(topk_pairs(part, k=60, state=state, backend="triton"), part, k=60)
            assert len(ahead) == n_before + 1
        for arguments in ({"similarity": "positive"}, {"tau": "adaptive"}, {"precision": "medium"}):
            n_before = len(ahead)
            topk_pairs(x, k=60, state=state, backend="triton", **arguments)
            assert len(ahead) == n_before + 1

    def test_once_for_two_threads(self, ahead, monkeypatch):
        """The second one finds the first at it, and waits."""
        monkeypatch.setattr(triton, "may_synchronize", lambda device, state: False)
        monkeypatch.setattr(TritonBackend, "_select", lambda *_: time.sleep(0.1))
        both = Barrier(2)

        def first_call():
            both.wait()
            TritonBackend()._compile_ahead(torch.ones(9, 9), Query(k=3), initial_state())

        with ThreadPoolExecutor(2) as pool:
            for call in [pool.submit(first_call) for _ in range(2)]:
                call.result()
        assert len(ahead) == 1

    @pytest.mark.usefixtures("_small_pieces")
    def test_not_where_a_repair_may_never_be_needed(self, ahead):
        topk_pairs(normal(24, 43), k=60, backend="triton")
        assert not ahead


@on_the_cpu
class TestMemory:
    """Nothing of the size of the matrix."""

    @pytest.mark.parametrize("precision", ["highest", "medium"])
    def test_largest_tensor(self, precision):
        backend = TritonBackend(spare_records=1000)
        n, k = 250, 80
        x = normal(8, n)
        with _HostReads() as reads:
            selection = backend.topk_pairs(x, Query(k=k, precision=precision), None)
            pairs = WeightedPairs(selection.rows, selection.cols, selection.cosines, selection.cosines)
            backend.pair_gradient(x, selection.norms, selection.cosines, pairs)
            backend.max_cosine(x, None, precision)
        assert reads.largest_bytes <= 8 * (5120 + 3 * k + backend.spare_records) < n * n  # the histograms, the records


@pytest.mark.usefixtures("_small_pieces")
class TestPieces:
    """However the work is cut, the numbers are the same."""

    @pytest.mark.parametrize("_small_pieces", ["triton"], indirect=True)  # the screen leaves the gradient alone
    @pytest.mark.parametrize("m", [1, 150])
    @pytest.mark.parametrize("layout", ["row_major", "feature_major", "feature_major_with_gaps"])
    def test_slabs(self, m, layout, monkeypatch):
        # one block of rows
        monkeypatch.setitem(BACKENDS, "triton", with_fields(BACKENDS["triton"], slab_bytes=1, sums_bytes=1))
        x = normal(m, 43)
        if layout != "row_major":
            wide = torch.full((43, 2 * m), torch.nan)[:, :m] if "gaps" in layout else torch.empty(43, m)
            x = wide.copy_(x.T).T
        k = 80
        x.requires_grad_()
        pairs = topk_pairs(x, k=k, backend="triton")
        selected = oracle.select(float64(x), k)
        assert_within(actual=pairs.values.abs(), expected=abs(selected.values), bound=cosine_bound(x) + 2**-24)
        (gradient,) = torch.autograd.grad(pairs.values.square().sum(), x)
        rows, cols = pairs.rows.numpy(), pairs.cols.numpy()
        assert_gradient(
            actual=gradient,
            expected=oracle.loss_gradient(float64(x), rows, cols, "sum"),
            bound=gradient_bound(x, rows, cols, 1.0),
            dtype=x.dtype,
        )

    @pytest.mark.parametrize("_small_pieces", ["triton_screened"], indirect=True)
    @pytest.mark.parametrize("layout", ["row_major", "feature_major"])
    def test_slabs_of_a_screen(self, layout, monkeypatch):
        """What it leaves undecided is computed again by slabs, which are views of x if its columns are contiguous."""
        monkeypatch.setitem(BACKENDS, "triton", with_fields(BACKENDS["triton"], slab_bytes=1))
        monkeypatch.setattr(TritonBackend, "_compile_ahead", lambda *_: None)
        slabs, rescore = [], triton.rescore

        def spy(x_slab, *arguments, **options):
            slabs.append(x_slab)
            rescore(x_slab, *arguments, **options)

        monkeypatch.setattr(triton, "rescore", spy)
        x = normal(150, 43)
        x = x.T.contiguous().T if layout == "feature_major" else x
        state = torch.tensor([0.1, 0.15, 1.0])
        assert_selection(topk_pairs(x, k=80, backend="triton", state=state), x, k=80)
        assert state[2] == 1, "they were not certified after the last slab"
        # where the host does not wait for the first pass it launches the second one too, which returns at once
        n_passes = 1 if launch.INTERPRETED else 2
        assert [slab.shape for slab in slabs] == [(43, 64), (43, 64), (43, 22)] * n_passes
        assert all(slab.stride(1) == 1 for slab in slabs)
        if launch.INTERPRETED:
            is_view = [slab.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for slab in slabs]
            assert is_view == [layout == "feature_major"] * 3

    @pytest.mark.parametrize("elements", [1, 12 * 14, 12 * 32, 2**26], ids=["one_by_one", "one", "two", "all"])
    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_groups_of_chunks(self, elements, precision):
        x = normal(12, 43, seed=3)
        chunks = torch.randperm(43, generator=seeded(4)).tensor_split(3)  # of 15, 14 and 14
        result = with_fields(BACKENDS["triton"], chunk_copy_elements=elements).max_cosine(x, chunks, precision)
        values, _ = oracle.max_cosines(float64(x), [chunk.tolist() for chunk in chunks])
        assert_within(actual=result.cosines, expected=values, bound=cosine_bound(x, precision))
        for chunk in chunks:
            assert set(result.partners[chunk].tolist()) <= set(chunk.tolist())

    def test_pairs_of_weight_zero_are_left_out(self, monkeypatch):
        """What `priority` holds costs no gather, and padding none either."""
        seen = []
        gather = triton.gather_gradient

        def spy(x, norms, inverse, offsets, *rest):
            seen.append(offsets[-1].item())
            gather(x, norms, inverse, offsets, *rest)

        monkeypatch.setattr(triton, "gather_gradient", spy)
        x = normal(12, 43).requires_grad_()
        topk_ortho_loss(x, k=50, priority=torch.arange(43), backend="triton").backward()
        assert seen == [50]
        assert not x.grad[:, 42].any()


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("_small_pieces", ["triton"], indirect=True)
class TestPairGradient:
    """Lists of pairs in any form."""

    ROWS, COLS = torch.tensor([0, 3, 3, 41]), torch.tensor([5, 4, 5, 42])
    COSINES = torch.tensor([0.5, -0.25, 0.125, 0.75])

    @staticmethod
    def gradient(row_weights, col_weights, cosines=COSINES, rows=ROWS, cols=COLS):
        x = normal(12, 43)
        pairs = WeightedPairs(rows, cols, row_weights, col_weights)
        return BACKENDS["triton"].pair_gradient(x, torch.linalg.vector_norm(x, dim=0), cosines, pairs)

    def test_one_weight_for_all(self):
        """The gradient of a mean is a single number with stride 0."""
        one, weights = torch.tensor(0.25), torch.full((4,), 0.25)
        assert self.gradient(weights, weights).any()
        assert torch.equal(self.gradient(one.expand(4), one.expand(4)), self.gradient(weights, weights))

    def test_parts_of_larger_tensors(self):
        weights, columns = torch.tensor([2.0, 0.0, -1.0, 0.5]), torch.stack([self.ROWS, self.COLS], dim=1)
        numbers = torch.stack([self.COSINES, weights], dim=1)
        actual = self.gradient(numbers[:, 1], weights, numbers[:, 0], columns[:, 0], columns[:, 1])
        assert torch.equal(actual, self.gradient(weights, weights))

    @pytest.mark.parametrize("n_pairs", [0, 4], ids=["no_pairs", "no_weight"])
    def test_nothing_to_gather(self, n_pairs):
        weights = torch.zeros(n_pairs)
        assert not self.gradient(weights, weights, weights, self.ROWS[:n_pairs], self.COLS[:n_pairs]).any()

    def test_a_weight_that_is_nan(self):
        """It reaches the column of the pair that has it."""
        gradient = self.gradient(torch.tensor([0.0, torch.nan, 0.0, 1.0]), torch.zeros(4))
        assert gradient.isnan().all(dim=0).nonzero().tolist() == [[3]]
        assert gradient.isnan().any(dim=0).nonzero().tolist() == [[3]]


class TestRowsOfASlab:
    """On the meta device, where tensors have no memory."""

    @staticmethod
    def feature_major(n_rows, n_features, dtype=torch.float32):
        return torch.empty(n_features, n_rows, dtype=dtype, device="meta").T

    @pytest.mark.parametrize(
        ("n_features", "n_rows"), [(2**15, 256), (2**16 - 1, 128), (2**16, 128), (2**16 + 1, 64), (2**20, 64)]
    )
    def test_rescored_lines(self, n_features, n_rows):
        """A slab has at most 2**25 bytes, but lines of at least 256 bytes."""
        assert TritonBackend()._rows_in_l2(self.feature_major(4096, n_features), 256) == n_rows

    @pytest.fixture
    def grids(self, monkeypatch):
        """The grids of the launches of the gradient that go through slabs of x; none of them runs."""
        grids, others = [], []

        class Recorder:
            def __init__(self, grids):
                self.grids = grids

            def __getitem__(self, grid):
                return lambda *_, **__: self.grids.append(grid)

        monkeypatch.setattr(pair_gradient, "_pair_gradient_kernel", Recorder(grids))
        monkeypatch.setattr(pair_gradient, "_segment_sums_kernel", Recorder(grids))
        monkeypatch.setattr(pair_lists, "_pair_targets_kernel", Recorder(others))
        monkeypatch.setattr(pair_lists, "_pair_lists_kernel", Recorder(others))
        return grids

    @staticmethod
    def launch_gradient(x, n_pairs):
        numbers, index = torch.empty(n_pairs, device="meta"), torch.empty(n_pairs, dtype=torch.int64, device="meta")
        norms = torch.empty(x.shape[1], device="meta")
        TritonBackend().pair_gradient(x, norms, numbers, WeightedPairs(index, index, numbers, numbers))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("n_beyond", [0, 1], ids=["all_in_one", "one_row_too_many"])
    def test_no_more_blocks_than_a_grid_has_lines(self, n_beyond, dtype, grids):
        """The second axis of a grid ends at 65,535."""
        x = self.feature_major(65_535 * (512 // dtype.itemsize) + n_beyond, 3, dtype)
        self.launch_gradient(x, 2)
        assert grids == [(3, 65_535), (3, 1)][: 1 + n_beyond]

    @pytest.mark.parametrize(
        ("n_pairs", "n_blocks"),
        [(100, [16]), (2**21, [4, 4, 4, 4]), (2**21 + 128, [3, 3, 3, 3, 3, 1]), (2**25, [1] * 16)],
        ids=["few", "as_fit", "one_segment_more", "very_many"],
    )
    def test_sums_of_segments_stay_small(self, n_pairs, n_blocks, grids, monkeypatch):
        """No more than 64 MiB, but of one block at least."""
        sizes, segment_sums = [], triton.segment_sums

        def spy(*arguments):
            sums = segment_sums(*arguments)
            sizes.append(sums.lines.nbytes)
            return sums

        monkeypatch.setattr(triton, "segment_sums", spy)
        self.launch_gradient(self.feature_major(4096, 2**16, torch.bfloat16), n_pairs)
        assert [grid[1] for grid in grids if len(grid) == 2] == n_blocks
        assert max(sizes) <= max(2**26, 8 * n_pairs)


class TestCertificate:
    """What cannot be certified is refused, or shows as NaN."""

    @pytest.fixture
    def _lost(self, monkeypatch):
        """The pass that collects finds nothing. Of columns that are all equal more pairs are tied than fit."""
        select = triton.gram_survivors

        def lossy(*arguments, is_first, **options):
            if is_first:
                select(*arguments, is_first=True, **options)

        monkeypatch.setattr(triton, "gram_survivors", lossy)

    @pytest.mark.usefixtures("_small_pieces", "_lost")
    def test_lost_pairs_raise(self, monkeypatch):
        monkeypatch.setattr(triton, "may_synchronize", lambda device, state: True)
        with pytest.raises(RuntimeError, match="lost pairs; please report this"):
            topk_pairs(torch.ones(24, 43), k=60, backend="triton", state=torch.tensor([0.999, 0.15, 1.0]))

    @pytest.mark.usefixtures("_small_pieces", "_lost")
    def test_lost_pairs_are_nan_where_nothing_waits(self, monkeypatch):
        monkeypatch.setattr(triton, "may_synchronize", lambda device, state: False)
        loss = topk_ortho_loss(torch.ones(24, 43), k=60, backend="triton", state=torch.tensor([0.999, 0.15, 1.0]))
        assert loss.isnan()

    @pytest.mark.usefixtures("_small_pieces")
    def test_a_screen_without_a_guess(self):
        """Few pairs are positive, so that the sample has no guess, and the others are within the slack of 0."""
        n = 100
        x = torch.eye(n) - 1 / n
        x[:, 1:20:2] += 0.3 * x[:, 0:19:2]
        pairs = topk_pairs(x, k=20, similarity="positive", backend="triton")
        expected = topk_pairs(x, k=20, similarity="positive", backend="naive")
        assert sorted(expected.rows.tolist()) == list(range(0, 20, 2))
        assert sorted(pairs.rows.tolist()) == list(range(0, 20, 2))
        assert torch.equal(pairs.cols, pairs.rows + 1)

    @pytest.mark.usefixtures("_small_pieces")
    @pytest.mark.parametrize("n", [17, 20, 23, 24, 27, 31])
    def test_a_sample_too_small_to_guess_from(self, n):
        x = normal(16, n, seed=n)
        k = n * (n - 1) // 4
        pairs, expected = (topk_pairs(x, k=k, backend=backend) for backend in ("triton", "naive"))
        assert torch.equal(pairs.rows, expected.rows)
        assert torch.equal(pairs.cols, expected.cols)

    @pytest.mark.usefixtures("_small_pieces")
    def test_more_records_than_int32_numbers(self, monkeypatch):
        monkeypatch.setitem(BACKENDS, "triton", with_fields(BACKENDS["triton"], most_records=300))
        with pytest.raises(ValueError, match=r"k must be at most about 100 on the triton backend.*; got 400"):
            topk_pairs(normal(4, 43), k=400, backend="triton")


class TestScreened:
    """When float32 columns are screened."""

    @pytest.mark.parametrize(
        ("m", "n", "sum_error", "arguments", "is_screened"),
        [
            (7000, 1024, 1e-7, {}, True),
            (7000, 1023, 1e-7, {}, False),
            (2**17, 1024, 1e-7, {}, True),
            (2**17 + 1, 1024, 1e-7, {}, False),
            (16, 1024, None, {}, False),
            (16, 1024, 1e-7, {"n_std": 1.0}, False),
            (16, 1024, 1e-7, {"precision": "high"}, True),
            (16, 1024, None, {"precision": "high"}, False),
            (16, 1024, 1e-7, {"precision": "medium"}, False),
        ],
        ids=str,
    )
    def test_screened(self, m, n, sum_error, arguments, is_screened, monkeypatch):
        """From so many features on, where the rounding of sums is known, and more than fp16 is asked for."""
        operands = self.operands(m, n, sum_error, monkeypatch, **arguments)
        assert (operands.deviation is not None) == is_screened
        if is_screened:
            assert operands.repair.kind == "ieee", "a repair would select other pairs"

    @staticmethod
    def operands(m, n, sum_error, monkeypatch, **arguments):
        device = launch.current_device()._replace(sum_error=sum_error)
        for module in (launch, triton):
            monkeypatch.setattr(module, "current_device", lambda: device)
        per_feature = torch.ones(n, device=DEVICE)
        norms = Norms(*[per_feature] * 4, flags=torch.zeros(1, dtype=torch.int32, device=DEVICE))
        rounded = launch.Operand(x=per_feature, factor=per_feature, scale=None, kind="half")
        monkeypatch.setattr(triton, "_rounded", lambda x, norms: (rounded, per_feature))
        return TritonBackend()._operands(torch.ones(1, device=DEVICE).expand(m, n), norms, Query(k=1, **arguments))

    @pytest.mark.parametrize(
        ("m", "of_a_product", "restarts", "expected"),
        [
            (3400, 1e-7, False, 3.4e-4),
            (3401, 1e-7, True, 2048e-7 + 2 * 2.0**-24),
            (3401, 0.9e-7, False, 3.0609e-4),
            (2**17, 1e-7, True, 2048e-7 + 64 * 2.0**-24),
        ],
    )
    def test_long_sums_are_blocked(self, m, of_a_product, restarts, expected, monkeypatch):
        operands = self.operands(m, 1024, of_a_product, monkeypatch)
        assert operands.first.restarts == restarts
        assert operands.sum_error == pytest.approx(expected)

    @pytest.mark.parametrize("guess", [0.2, 0.999, -1.0], ids=["good", "too_high", "none"])
    @pytest.mark.parametrize("precision", ["highest", "high"])
    @pytest.mark.parametrize("is_described", [False, True], ids=["pointers", "descriptors"])
    def test_selection_by_blocked_summation(self, is_described, precision, guess, monkeypatch):
        """Every 64 rows of 200, as many as a step has on Hopper; in the first pass and in that which guesses again."""
        if is_described and launch.INTERPRETED:
            config = launch.RESTARTED_CONFIGS["sm_90", "half"]
            for configs in (launch.DESCRIBED_CONFIGS, launch.RESTARTED_CONFIGS):
                monkeypatch.setitem(configs, ("interpreter", "half"), config)
        monkeypatch.setattr(launch, "RESTART_ROWS", 64)
        seen = []

        def spy(operand, *rest, **options):
            seen.append(operand.restarts)
            gram_survivors.gram_survivors(operand, *rest, **options)

        monkeypatch.setattr(triton, "gram_survivors", spy)
        use_case("triton", monkeypatch)
        fields = {"most_sum_error": 0.0, "least_screened_features": 2, "spare_records": 0}
        monkeypatch.setitem(BACKENDS, "triton", with_fields(BACKENDS["triton"], **fields))
        x, state = normal(200, 90, seed=3), torch.tensor([guess, 0.15, 1.0])
        pairs = topk_pairs(x, k=200, state=state, precision=precision, backend="triton")
        assert_selection(pairs, x, k=200, precision=precision)
        assert seen[0]
        assert state[2] <= 3

    def test_a_record_is_counted_once_though_x_is_rescored_by_slabs(self):
        """Too high a guess lets too few pairs pass; counted once a slab they would seem enough."""
        x = torch.zeros(256, 43, device=DEVICE)
        x[:16] = normal(16, 43, seed=4)  # so that products are whole after the first slab
        expected = BACKENDS["naive"].topk_pairs(x, Query(k=90), None)
        state = initial_state().to(DEVICE)
        state[GUESS] = expected.cosines[60].abs()
        backend = TritonBackend(spare_records=200, slab_bytes=1, least_screened_features=2, least_aligned_features=32)
        selection = backend.topk_pairs(x, Query(k=90), state)
        assert set(zip(selection.rows.tolist(), selection.cols.tolist(), strict=True)) == set(
            zip(expected.rows.tolist(), expected.cols.tolist(), strict=True)
        )


class TestTooLarge:
    """What kernels cannot number is refused before anything is allocated."""

    @pytest.mark.parametrize(
        ("shape", "reason"),
        [
            ((2**31 - 2**10 + 1, 2), "at most 2,147,482,624 rows on the triton backend; got 2,147,482,625"),
            ((2, 2**31), "at most 2,147,482,624 columns on the triton backend; got 2,147,483,648"),
        ],
        ids=["rows", "columns"],
    )
    def test_refused(self, shape, reason):
        x, one = torch.ones(1).expand(shape), torch.ones(1)
        pair = WeightedPairs(torch.tensor([0]), torch.tensor([1]), one, one)
        for call in (
            lambda: BACKENDS["triton"].topk_pairs(x, Query(k=1), None),
            lambda: BACKENDS["triton"].max_cosine(x, None, "highest"),
            lambda: BACKENDS["triton"].pair_gradient(x, one.expand(shape[1]), one, pair),
        ):
            with pytest.raises(ValueError, match=reason):
                call()

    def test_the_largest(self):
        triton._refuse_too_large(torch.ones(1).expand(2**31 - 2**10, 2**31 - 2**10))


@on_the_cpu
def test_no_more_chunks_than_a_grid_has_lines(monkeypatch):
    """The second axis of a grid ends at 65,535; chunks of two columns of a single row pass it."""
    n_chunks, sizes = 2**16 + 10, []
    zeros = torch.zeros(2 * n_chunks)
    norms = Norms(zeros, zeros, zeros, zeros, flags=torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(triton, "column_norms", lambda x, eps: norms)
    monkeypatch.setattr(triton, "_max_cosine_of_group", lambda x, norms, chunks, *_: sizes.append(len(chunks)))
    chunks = torch.arange(2 * n_chunks).view(n_chunks, 2).unbind()
    TritonBackend(chunk_copy_elements=2**30).max_cosine(torch.ones(1, 2 * n_chunks), chunks, "highest")
    assert sizes == [65_535, 11]


class TestState:
    """Whatever it looks like in memory, and wherever it aims."""

    @pytest.mark.usefixtures("_small_pieces")
    def test_strided(self):
        x = normal(24, 43)
        column = torch.tensor([[0.5, 9.0], [0.15, 9.0], [1.0, 9.0]])[:, 0]
        row = column.clone()
        for state in (column, row):
            topk_pairs(x, k=60, backend="triton", state=state)
        assert torch.equal(column, row)

    @pytest.mark.usefixtures("_small_pieces")
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_dtype(self, dtype):
        """Whatever it is, it is read and written as float32."""
        x, state = normal(24, 43), torch.tensor([0.5, 0.125, 1.0])
        expected = BACKENDS["triton"].topk_pairs(x, Query(k=60), state)
        actual = BACKENDS["triton"].topk_pairs(x, Query(k=60), state.to(dtype))
        assert torch.equal(actual.cosines, expected.cosines)
        assert actual.state.dtype == dtype
        assert torch.equal(actual.state, expected.state.to(dtype))

    @pytest.mark.usefixtures("_small_pieces")
    @pytest.mark.parametrize(("guess", "margin"), [(0.01, 0.1), (0.99, 0.4)], ids=["too_low", "too_high"])
    def test_margin_after_a_failure(self, guess, margin):
        """A guess that overflowed was too low, one that fell short too high."""
        state = torch.tensor([guess, 0.2, 1.0])
        topk_pairs(normal(24, 43), k=60, backend="triton", state=state)
        assert state[1] == pytest.approx(margin)
        assert state[2] > 1

    @pytest.mark.usefixtures("_small_pieces")
    def test_default_dtype_does_not_matter(self):
        try:
            torch.set_default_dtype(torch.float64)
            selection = BACKENDS["triton"].topk_pairs(normal(24, 43), Query(k=60), None)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {t.dtype for t in (selection.cosines, selection.threshold, selection.tau)} == {torch.float32}


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_float64_takes_the_tiled_path(dtype):
    calls = []

    class Recorder(TiledBackend):
        def topk_pairs(self, *arguments):
            calls.append("topk_pairs")

        def max_cosine(self, *arguments):
            calls.append("max_cosine")

        def pair_gradient(self, *arguments):
            calls.append("pair_gradient")

    backend = TritonBackend(float64=Recorder())
    x = activations(12, 43, dtype=dtype).to(DEVICE)
    one = torch.ones(1, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
    backend.topk_pairs(x, Query(k=3), None)
    backend.max_cosine(x, None, "highest")
    pair = WeightedPairs(numbers([0], torch.int64), numbers([1], torch.int64), one, one)
    backend.pair_gradient(x, torch.ones(43, dtype=one.dtype, device=DEVICE), one, pair)
    assert calls == (["topk_pairs", "max_cosine", "pair_gradient"] if dtype == torch.float64 else [])


@on_the_cpu
@pytest.mark.usefixtures("_small_pieces")
class TestDescribed:
    """Where tensor descriptors read the columns of a first pass, as on Hopper."""

    @pytest.fixture
    def grids(self, monkeypatch):
        """The grids of the launches of that kernel."""
        config = launch.TileConfig(
            block=32, block_col=16, block_m=32, group=2, num_warps=1, num_stages=1, programs_per_sm=2
        )
        monkeypatch.setitem(launch.DESCRIBED_CONFIGS, ("interpreter", "half"), config)
        kernel, grids = gram_survivors._described_survivors_kernel, []

        class Spy:
            def __getitem__(self, grid):
                grids.append(grid)
                return kernel[grid]

        monkeypatch.setattr(gram_survivors, "_described_survivors_kernel", Spy())
        return grids

    # the other ways to combine layouts with sizes are in tests/kernels/test_gram_survivors.py
    @pytest.mark.parametrize(("n", "layout"), [(64, "row_major"), (83, "feature_major")], ids=["aligned", "ragged"])
    @pytest.mark.parametrize(
        ("dtype", "arguments"),
        [
            (torch.bfloat16, {}),
            (torch.bfloat16, {"tau": "adaptive"}),
            (torch.bfloat16, {"similarity": "positive", "tau": 0.1}),
            (torch.float32, {}),
            (torch.float32, {"precision": "medium"}),
        ],
        ids=str,
    )
    def test_selection(self, arguments, dtype, n, layout, grids):
        x = normal(40, n, dtype=dtype)
        x = x.T.contiguous().T if layout == "feature_major" else x
        state = torch.tensor([0.3, 0.15, 1.0])
        pairs = topk_pairs(x, k=100, backend="triton", state=state, **arguments)
        assert_selection(pairs, x, k=100, **arguments)
        is_screened = BACKENDS["triton"].least_screened_features <= n
        is_half = dtype == torch.bfloat16 or is_screened or "precision" in arguments
        assert (len(grids) > 0) == (is_half and arguments.get("tau") != "adaptive")


@pytest.mark.parametrize("similarity", ["abs", "positive"])
@pytest.mark.parametrize("n", [50, 2**17, 2**17 + 1], ids=["small", "the_largest_of_one_key", "two_sorts"])
def test_records_in_order(n, similarity):
    """By similarity, then by row and column, up to the last pair; what holds no record comes last."""
    generator = seeded(0)
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0**-149, 1 - 2**-24])
    cosines = values[torch.randint(len(values), (300,), generator=generator)]
    rows = torch.randint(n - 1, (300,), generator=generator)
    rows[:100] = n - 2
    cols = rows + 1 + (torch.rand(300, generator=generator, dtype=torch.float64) * (n - 1 - rows)).long()
    call = SimpleNamespace(
        x=torch.empty(1, n, device=DEVICE), capacity=300, cosines=cosines.to(DEVICE), rows=rows.int().to(DEVICE),
        cols=cols.int().to(DEVICE), radix=SimpleNamespace(n_survivors=numbers([250], torch.int64)),
        query=Query(k=1, similarity=similarity), is_abs=similarity == "abs",
    )  # fmt: skip
    order = triton._order(call).tolist()
    records = [
        (abs(cosine) if similarity == "abs" else cosine, row * n + col)
        for cosine, row, col in zip(cosines.tolist(), rows.tolist(), cols.tolist(), strict=True)
    ][:250]
    assert sorted(order[:250]) == [*range(250)]
    assert sorted(order[250:]) == [*range(250, 300)]
    pairs = [records[i] for i in order[:250]]
    expected = sorted(records, key=lambda record: (-record[0], record[1]))
    n_expected = sum(value > 0 or similarity == "abs" for value, _ in expected)  # no other is selected
    assert n_expected > 100
    assert pairs[:n_expected] == expected[:n_expected]


@on_the_cpu
class TestAligned:
    """Columns whose lines vector loads cannot read are copied once, if they are many and for the matrix unit."""

    @pytest.fixture
    def operands(self, monkeypatch):
        """What the passes over the gram multiply: address, and whether it is aligned."""
        monkeypatch.setitem(BACKENDS, "triton", with_fields(BACKENDS["triton"], least_aligned_features=83))
        seen = set()

        def spied(launcher):
            def spy(operand, *rest, **options):
                seen.add((operand.x.data_ptr(), launch.is_aligned(operand.x)))
                launcher(operand, *rest, **options)

            return spy

        for name in ("gram_survivors", "gram_histogram", "gram_row_ties", "max_cosine"):
            monkeypatch.setattr(triton, name, spied(getattr(triton, name)))
        return seen

    @pytest.mark.usefixtures("_small_pieces")
    @pytest.mark.parametrize("_small_pieces", ["triton"], indirect=True)
    @pytest.mark.parametrize(
        ("layout", "guess", "tau"),
        [("row_major", 0.3, None), ("feature_major", 0.999, None), ("row_major", 0.999, "adaptive")],
        ids=["certified", "repaired", "repaired_adaptive"],
    )
    def test_all_passes_share_a_copy(self, tau, guess, layout, operands):
        x = normal(21, 83, dtype=torch.bfloat16)
        x = x.T.contiguous().T if layout == "feature_major" else x
        pairs = topk_pairs(x, k=100, tau=tau, backend="triton", state=torch.tensor([guess, 0.15, 1.0]))
        assert_selection(pairs, x, k=100, tau=tau)
        ((_, is_aligned),) = operands
        assert is_aligned

    @pytest.mark.parametrize(
        ("n", "dtype", "precision", "is_copied"),
        [
            (83, torch.float16, "highest", True),
            (82, torch.bfloat16, "highest", False),
            (83, torch.float32, "high", True),
            (83, torch.float32, "highest", False),
        ],
        ids=str,
    )
    def test_what_is_copied(self, n, dtype, precision, is_copied, operands):
        x = normal(21, n, dtype=dtype)
        result = BACKENDS["triton"].max_cosine(x, None, precision)
        values, _ = oracle.max_cosines(float64(x), [range(n)])
        assert_within(actual=result.cosines, expected=values, bound=cosine_bound(x, precision))
        assert {is_aligned for _, is_aligned in operands} == {is_copied}
