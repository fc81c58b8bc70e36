import pytest
import torch

from topk_ortho import max_cosine_loss, topk_ortho_loss, topk_pairs
from topk_ortho.sae import StandardSAE, TopKSAE
from topk_ortho.training.config import PenaltyConfig
from topk_ortho.training.penalty import Penalty, encoder_inhibition

FIRING_RATE = torch.arange(12.0)


def inputs():
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(2))


def make(sae_class):
    arguments = (8, 12) if sae_class is StandardSAE else (8, 12, 4)
    return sae_class(*arguments, generator=torch.Generator().manual_seed(1))


def penalty_of(**settings):
    return Penalty(PenaltyConfig(**settings), torch.Generator().manual_seed(5))


@pytest.mark.parametrize("target", ["decoder", "activations"])
@pytest.mark.parametrize("priority", ["firing-rate", "none"])
@pytest.mark.parametrize("sae_class", [StandardSAE, TopKSAE])
def test_value_and_gradient_are_those_of_the_public_op(target, priority, sae_class):
    sae = make(sae_class)
    features = sae(inputs()).features
    settings = {"fraction": 0.2, "tau": 0.1, "reduction": "sum"}
    term = penalty_of(target=target, priority=priority, **settings)(sae, features, FIRING_RATE)

    dense = features if sae_class is StandardSAE else features.to_dense()
    x = sae.W_dec.T if target == "decoder" else dense
    expected = topk_ortho_loss(
        x, similarity="positive", priority=FIRING_RATE if priority == "firing-rate" else None, **settings
    )
    torch.testing.assert_close(term.value, expected.detach())
    assert term.value > 0
    parameters = (sae.W_enc, sae.b_enc, sae.W_dec)
    expected_gradients = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
    actual = torch.autograd.grad(term.targets, parameters, term.gradients, allow_unused=True)
    for a, e in zip(actual, expected_gradients, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["decoder", "activations"])
def test_max_cosine_over_random_chunks(target):
    sae = make(TopKSAE)
    features = sae(inputs()).features
    term = penalty_of(target=target, op="max_cosine", n_chunks=3)(sae, features, FIRING_RATE)
    x = sae.W_dec.T if target == "decoder" else features.to_dense()
    expected = max_cosine_loss(x, 3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(term.value, expected.detach())
    assert term.gradients[0].any()


@pytest.mark.parametrize("sae_class", [StandardSAE, TopKSAE])
@pytest.mark.parametrize("n_chunks", [1, 3])
def test_c2r_is_its_formula(sae_class, n_chunks):
    sae = make(sae_class)
    sae.W_enc.data[2] = 0.0  # a feature that never fires
    features = sae(inputs()).features
    term = penalty_of(op="c2r", n_chunks=n_chunks)(sae, features, FIRING_RATE)

    dense = features if sae_class is StandardSAE else features.to_dense()
    norms = [dense[:, i][dense[:, i] > 0].double().square().sum().sqrt() for i in range(12)]
    chunks = torch.randperm(12, generator=torch.Generator().manual_seed(5)).tensor_split(n_chunks)
    if n_chunks == 1:
        chunks = [torch.arange(12)]
    expected = 0.0
    for chunk in (chunk.tolist() for chunk in chunks):
        for i in chunk:
            cosines = {
                j: torch.cosine_similarity(sae.W_dec[i].double(), sae.W_dec[j].double(), dim=0) for j in chunk if j != i
            }
            j = max(cosines, key=lambda j: cosines[j].item())
            expected = expected + (norms[i] + norms[j]) * max(cosines[j] * 0, cosines[j]) ** 2 / 12
    assert not norms[2]
    torch.testing.assert_close(term.value.double(), expected.detach(), rtol=1e-5, atol=0)
    parameters = (sae.W_enc, sae.b_enc, sae.W_dec)
    for actual, wanted in zip(
        torch.autograd.grad(term.targets, parameters, term.gradients, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert wanted.any()
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


class TestEncoderInhibition:
    """The term that keeps frequent features from being silenced by rarer ones."""

    def expected(self, W_enc, W_dec, pairs):
        """The formula, pair by pair, in float64."""
        terms = []
        for r, q in pairs:
            direction = W_dec[r].double() / W_dec[r].double().norm()
            wanted = W_dec[q].double() @ direction / W_dec[q].double().square().sum()
            terms.append(max(wanted * 0, wanted - W_enc[q].double() @ direction) ** 2)
        return sum(terms) / len(terms)

    def test_value_and_gradient_are_the_formula(self, monkeypatch):
        monkeypatch.setattr("topk_ortho.training.penalty._GATHERED_NUMBERS", 16)  # two pairs at a time
        generator = torch.Generator().manual_seed(3)
        W_enc, W_dec = (torch.randn(12, 8, generator=generator) for _ in range(2))
        W_enc.requires_grad_()
        pairs = [(0, 1), (0, 2), (3, 2), (4, 5), (6, 1)]
        value, gradient = encoder_inhibition(W_enc, W_dec, *torch.tensor(pairs).T)
        expected = self.expected(W_enc, W_dec, pairs)
        torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, W_enc)[0], rtol=1e-4, atol=1e-6)
        assert gradient.any()

    def test_no_pairs_cost_nothing(self):
        none = torch.empty(0, dtype=torch.int64)
        value, gradient = encoder_inhibition(torch.ones(3, 2), torch.ones(3, 2), none, none)
        assert value == 0
        assert not gradient.any()

    @pytest.mark.parametrize("changed", [{}, {"reduction": "sum"}, {"priority": "none"}, {"similarity": "abs"}])
    def test_it_is_added_to_the_penalty_with_its_weight(self, changed):
        sae = make(TopKSAE)
        sae.W_enc.data.mul_(0.5)  # tied weights are not inhibited
        features = sae(inputs()).features
        settings = {"fraction": 0.2, "similarity": "positive", **changed}
        plain = penalty_of(**settings)(sae, features, FIRING_RATE)
        term = penalty_of(encoder_inhibition=3.0, **settings)(sae, features, FIRING_RATE)
        pairs = topk_pairs(sae.W_dec.detach().T, 0.2, similarity=settings["similarity"])
        listed = zip(pairs.rows.tolist(), pairs.cols.tolist(), strict=True)  # rows are rarer by FIRING_RATE
        expected = 3 * self.expected(sae.W_enc, sae.W_dec.detach(), list(listed))
        torch.testing.assert_close(term.value.double(), plain.value + expected.detach(), rtol=1e-5, atol=0)
        by_target = dict(zip(term.targets, term.gradients, strict=True))
        torch.testing.assert_close(by_target[sae.W_dec], plain.gradients[0])
        wanted = torch.autograd.grad(expected, sae.W_enc)[0]
        torch.testing.assert_close(by_target[sae.W_enc], wanted, rtol=1e-4, atol=1e-6)

    def test_above_tau_there_may_be_no_pair(self):
        sae = make(TopKSAE)
        term = penalty_of(encoder_inhibition=3.0, tau=0.999)(sae, sae(inputs()).features, FIRING_RATE)
        assert term.value == 0
        assert not any(gradient.any() for gradient in term.gradients)


class TestRandomPairs:
    """The control that penalises pairs whatever their similarity."""

    def test_value_is_the_mean_over_all_pairs_but_for_chance(self):
        sae = TopKSAE(3, 12, 4, generator=torch.Generator().manual_seed(1))
        penalty = penalty_of(op="random_pairs", fraction=1.0, similarity="abs")
        values = torch.stack([penalty(sae, torch.zeros(1, 12), FIRING_RATE).value for _ in range(200)])
        cosines = torch.nn.functional.normalize(sae.W_dec.double(), dim=1) @ sae.W_dec.double().T
        rows, cols = torch.triu_indices(12, 12, 1)
        squares = cosines[rows, cols].square()
        # 200 draws of 66 pairs: the standard error of their mean, three times over
        assert abs(values.mean() - squares.mean()) < 3 * squares.std() / (200 * 66) ** 0.5
        assert len(values.unique()) > 100

    def test_opposite_directions_are_free_if_positive_and_reductions_differ(self):
        sae = TopKSAE(2, 2, 1)
        sae.W_dec.data = torch.tensor([[1.0, 0.0], [-0.6, 0.8]])
        expected = {("abs", "mean"): 0.36, ("abs", "sum"): 0.36, ("positive", "mean"): 0.0, ("positive", "sum"): 0.0}
        for (similarity, reduction), value in expected.items():
            penalty = penalty_of(op="random_pairs", fraction=1.0, similarity=similarity, reduction=reduction)
            assert penalty(sae, torch.zeros(1, 2), torch.zeros(2)).value == pytest.approx(value, abs=1e-6)

    @pytest.mark.parametrize(("rates", "moving"), [([1.0, 2.0], [0]), ([2.0, 1.0], [1]), ([1.0, 1.0], [0, 1])])
    def test_the_rarer_feature_moves(self, rates, moving):
        sae = TopKSAE(2, 2, 1)
        sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        term = penalty_of(op="random_pairs", fraction=1.0)(sae, torch.zeros(1, 2), torch.tensor(rates))
        (gradient,) = term.gradients
        assert gradient.any(dim=1).nonzero().squeeze(1).tolist() == moving

    def test_sum_is_over_k_pairs(self):
        sae = make(TopKSAE)
        mean, total = (
            penalty_of(op="random_pairs", fraction=0.2, reduction=reduction)(sae, torch.zeros(1, 12), FIRING_RATE).value
            for reduction in ("mean", "sum")
        )
        torch.testing.assert_close(total, 13 * mean)  # int(12 * 11 * 0.2) // 2


def test_weight_warms_up_and_pauses():
    penalty = penalty_of(weight=0.5, warmup_fraction=0.5, every=2)
    assert [penalty.weight(step, 8) for step in range(8)] == pytest.approx([0.2, 0, 0.6, 0, 1.0, 0, 1.0, 0])
    assert [penalty_of(weight=0.5).weight(step, 8) for step in range(3)] == [0.5] * 3
    assert penalty_of(target="none").weight(0, 8) == 0


@pytest.mark.parametrize("target", ["decoder", "activations", "none"])
def test_selection_is_that_of_the_target(target):
    sae = make(TopKSAE)
    features = sae(inputs()).features
    pairs = penalty_of(target=target, fraction=0.2, similarity="abs", tau="adaptive").select(sae, features)
    x = features.to_dense() if target == "activations" else sae.W_dec.T
    expected = topk_pairs(x.detach(), 0.2, tau="adaptive")
    assert torch.equal(pairs.rows, expected.rows)
    assert torch.equal(pairs.cols, expected.cols)
    assert pairs.tau == pytest.approx(expected.tau, rel=1e-5)
