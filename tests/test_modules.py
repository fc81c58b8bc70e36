"""The module forms equal the functions and own their warm-start state."""

import copy
import inspect
import io

import pytest
import torch

from tests.inputs import normal, seeded
from topk_ortho import (
    MaxCosineLoss,
    SparseFeatures,
    TopKOrthoLoss,
    initial_state,
    max_cosine_loss,
    topk_ortho_loss,
    topk_pairs,
)

ARGUMENTS = {
    "default": {},
    "fraction": {"fraction": 0.2},
    "k": {"k": 40},
    "tau": {"k": 40, "tau": 0.3},
    "adaptive": {"k": 300, "tau": "adaptive", "n_std": 0.5},
    "positive": {"k": 40, "similarity": "positive"},
    "sum": {"k": 40, "reduction": "sum"},
    "precision": {"k": 40, "precision": "medium"},
}


def result_of(function, x):
    x = x.clone().requires_grad_()
    value = function(x)
    value.backward()
    return value.detach(), x.grad


@pytest.mark.quick
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_topk_ortho_loss(arguments):
    x, priority = normal(16, 43), torch.arange(43)
    module = TopKOrthoLoss(**arguments)
    for _ in range(2):  # cold, then warm
        for actual, expected in zip(
            result_of(lambda x: module(x, priority), x),
            result_of(lambda x: topk_ortho_loss(x, **arguments, priority=priority), x),
            strict=True,
        ):
            assert torch.equal(actual, expected)
    assert torch.equal(module(x), topk_ortho_loss(x, **arguments))


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_max_cosine_loss(n_chunks):
    x = normal(16, 43)
    module = MaxCosineLoss(n_chunks, generator=seeded(3))
    expected = result_of(lambda x: max_cosine_loss(x, n_chunks, generator=seeded(3)), x)
    for actual, wanted in zip(result_of(module, x), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize(("module", "function"), [(TopKOrthoLoss, topk_ortho_loss), (MaxCosineLoss, max_cosine_loss)])
def test_the_backend_is_passed_on(module, function):
    x = normal(16, 43)
    assert torch.equal(module(backend="naive")(x), function(x, backend="naive"))
    with pytest.raises(ValueError, match="got 'no': there is no such backend"):
        module(backend="no")(x)


@pytest.mark.parametrize(
    ("module", "function", "given_at_call", "own"),
    [
        (TopKOrthoLoss, topk_ortho_loss, {"x", "priority", "state"}, ["refresh", "recall", "margin"]),
        (MaxCosineLoss, max_cosine_loss, {"x"}, []),
    ],
)
def test_constructors_take_the_arguments_of_the_functions(module, function, given_at_call, own):
    """And `TopKOrthoLoss` those of how its selection is kept."""
    wanted = inspect.signature(function).parameters
    actual = dict(inspect.signature(module).parameters)
    assert [actual.pop(name).name for name in own] == own
    assert list(actual.values()) == [p for name, p in wanted.items() if name not in given_at_call]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (TopKOrthoLoss(1.5), "fraction must be in"),
        (TopKOrthoLoss(similarity="no"), "similarity must be one of"),
        (TopKOrthoLoss(reduction="no"), "reduction must be one of"),
        (MaxCosineLoss(0), "n_chunks must be in"),
        (MaxCosineLoss(precision="no"), "precision must be one of"),
    ],
    ids=["fraction", "similarity", "reduction", "n_chunks", "max_cosine_precision"],
)
def test_arguments_are_checked_at_the_first_call(module, message):
    with pytest.raises(ValueError, match=message):
        module(normal(4, 5))


class TestState:
    """The state is a buffer that follows the calls and changes no result."""

    @pytest.fixture
    def warm(self):
        return self.after_a_call("tiled")

    @pytest.fixture
    def warm_on_every_backend(self, small_backend):
        return self.after_a_call(small_backend)

    @staticmethod
    def after_a_call(backend):
        module = TopKOrthoLoss(k=40, backend=backend)
        module(normal(16, 43))
        return module

    def test_starts_cold(self):
        assert torch.equal(TopKOrthoLoss().state, initial_state())

    def test_is_updated(self, warm_on_every_backend):
        assert -1 < warm_on_every_backend.state[0] < 1
        assert 1 <= warm_on_every_backend.state[2] <= 7

    def test_reset(self, warm):
        buffer = warm.state
        warm.reset_state()
        assert torch.equal(warm.state, initial_state())
        assert warm.state is buffer

    def test_is_saved_and_loaded(self, warm):
        assert list(warm.state_dict()) == ["state"]
        assert not list(warm.parameters())
        file = io.BytesIO()
        torch.save(warm.state_dict(), file)
        file.seek(0)
        other = TopKOrthoLoss(k=40)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other.state, warm.state)

    @pytest.mark.parametrize("options", [{}, {"refresh": "adaptive"}], ids=str)
    def test_a_checkpoint_made_without_it_is_loaded(self, options):
        """A model that gains a penalty loads what was saved before, and the penalty begins as if it was new."""

        def model():
            return torch.nn.ModuleDict({"sae": torch.nn.Linear(2, 3), "penalty": TopKOrthoLoss(k=4, **options)})

        old = {name: tensor for name, tensor in model().state_dict().items() if name.startswith("sae.")}
        trained = model()
        trained["penalty"](normal(6, 9))
        trained.load_state_dict(old)
        assert torch.equal(trained["penalty"].state, initial_state())
        fresh = model()["penalty"].state_dict()
        assert all(torch.equal(buffer, fresh[name]) for name, buffer in trained["penalty"].state_dict().items())
        damaged = {name: tensor for name, tensor in trained.state_dict().items() if not name.endswith("candidates")}
        if options:  # without some of its buffers alone it would select wrongly
            with pytest.raises(RuntimeError, match="candidates"):
                trained.load_state_dict(damaged)
        with pytest.raises(RuntimeError, match=r"sae\.bias"):
            trained.load_state_dict({"sae.weight": old["sae.weight"]})

    @pytest.mark.parametrize("options", [{}, {"refresh": "certified"}, {"similarity": "positive"}], ids=str)
    def test_threshold_is_that_of_the_last_call(self, options):
        penalty = TopKOrthoLoss(k=30, **options)
        assert penalty.threshold.isnan()
        similarity = options.get("similarity", "abs")
        for seed in (0, 1):
            x = normal(16, 43, seed=seed)
            penalty(x)
            expected = topk_pairs(x, k=30, similarity=similarity).threshold
            torch.testing.assert_close(penalty.threshold, expected)
        assert "threshold" not in penalty.state_dict()

    def test_threshold_of_a_sparse_x(self):
        x = SparseFeatures.from_dense(torch.eye(5) + torch.eye(5).roll(1, 0))
        listed, summed, tied = (TopKOrthoLoss(k=k) for k in (3, 9, 5))
        for penalty in (listed, summed, tied):
            penalty(x)
        assert listed.threshold.item() == pytest.approx(0.5)
        assert summed.threshold == 0  # five pairs meet, and all others have cosine 0
        assert tied.threshold.isnan()  # which is why no list was made

    def test_deepcopy_is_independent(self, warm):
        twin = copy.deepcopy(warm)
        assert torch.equal(twin.state, warm.state)
        twin.reset_state()
        assert not torch.equal(twin.state, warm.state)
        x = normal(16, 43)
        assert torch.equal(twin(x), warm(x))

    def test_two_modules_share_nothing(self, warm):
        assert torch.equal(TopKOrthoLoss(k=40).state, initial_state())

    @pytest.mark.parametrize("cast", ["half", "double"])
    def test_casts(self, warm_on_every_backend, cast):
        x, warm = normal(16, 43), warm_on_every_backend
        module = getattr(warm, cast)()
        for _ in range(2):
            assert torch.equal(module(x), topk_ortho_loss(x, k=40, backend=warm.backend))
        module.reset_state()
        assert module.state[0] == -1
        narrow = getattr(x, cast)()
        assert torch.equal(module(narrow), topk_ortho_loss(narrow, k=40, backend=warm.backend))

    def test_an_error_leaves_it(self, warm):
        before = warm.state.clone()
        with pytest.raises(ValueError, match="NaN"):
            warm(torch.full((16, 43), torch.nan))
        assert torch.equal(warm.state, before)

    def test_another_n_features(self, warm_on_every_backend):
        x, warm = normal(16, 20, seed=9), warm_on_every_backend
        assert torch.equal(warm(x), topk_ortho_loss(x, k=40, backend=warm.backend))


def test_max_cosine_deepcopy_continues_the_generator():
    x, module = normal(16, 43), MaxCosineLoss(4, generator=seeded(3))
    module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x))


def test_max_cosine_has_no_state():
    assert not MaxCosineLoss(4, generator=seeded(0)).state_dict()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (
            TopKOrthoLoss(),
            "TopKOrthoLoss(fraction=0.001, dim=1, tau=None, n_std=1.0, similarity='abs', reduction='mean', "
            "backend='auto', precision='highest', structural_zeros=False)",
        ),
        (
            TopKOrthoLoss(k=7, dim=1, tau="adaptive", similarity="positive", reduction="sum"),
            "TopKOrthoLoss(k=7, dim=1, tau='adaptive', n_std=1.0, similarity='positive', reduction='sum', "
            "backend='auto', precision='highest', structural_zeros=False)",
        ),
        (MaxCosineLoss(3), "MaxCosineLoss(n_chunks=3, dim=1, backend='auto', precision='highest')"),
    ],
    ids=["fraction", "k", "max_cosine"],
)
def test_repr(module, expected):
    assert repr(module) == expected
