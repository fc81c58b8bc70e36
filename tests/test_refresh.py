"""Selections that are kept between calls, of columns that move a little each time, against the float64 oracle."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.nn.functional import normalize

from tests import oracle
from tests.inputs import dyadic, normal, seeded
from tests.tolerances import assert_selection, cosine_bound, float64
from topk_ortho import RefreshedPairs, SparseFeatures, TopKOrthoLoss, topk_ortho_loss, topk_pairs
from topk_ortho.backends.listed_pairs import cosines_of

M, N, K = 24, 90, 60
KINDS = pytest.mark.parametrize("refresh", ["adaptive", "certified"])


def walk(n_calls, step, *, seed=0, dtype=torch.float32):
    """Matrices [M, N] whose columns move by about `step` of their length from one to the next."""
    x = normal(M, N, seed, torch.float64)
    generator = seeded(seed + 1)
    for _ in range(n_calls):
        yield x.to(dtype)
        x = x + step * x.norm(dim=0) / M**0.5 * torch.randn(M, N, generator=generator, dtype=torch.float64)


def pairs_of(selection):
    return set(zip(selection.rows.tolist(), selection.cols.tolist(), strict=True))


def is_refresh(select):
    return int(select.schedule[0]) == 0


QUERIES = {
    "abs": {},
    "positive": {"similarity": "positive"},
    "tau": {"tau": 0.35},
    "positive_tau": {"similarity": "positive", "tau": 0.3},
}


@pytest.mark.quick
@KINDS
@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_first_call_is_exact(refresh, query, dtype):
    x = normal(M, N, dtype=dtype)
    pairs = RefreshedPairs(k=K, refresh=refresh, **query)(x)
    assert_selection(pairs, x, k=K, **query)
    expected = topk_pairs(x, k=K, **query)
    assert pairs_of(pairs) == pairs_of(expected)
    torch.testing.assert_close(pairs.threshold, expected.threshold)
    assert pairs._replace(rows=0, cols=0, values=0, threshold=0) == expected._replace(
        rows=0, cols=0, values=0, threshold=0
    )


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("step", [1e-5, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("margin", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certified_is_exact_at_every_call(query, step, margin, dtype):
    select = RefreshedPairs(k=K, refresh="certified", margin=margin, **query)
    n_refreshes = 0
    for x in walk(12, step, dtype=dtype):
        assert_selection(select(x), x, k=K, **query)
        n_refreshes += is_refresh(select)
    if margin > 1:
        assert n_refreshes == 1 if step <= 1e-3 else step < 0.1 or n_refreshes > 6
    assert (select.recall, select.recall_interval) == (1.0, (1.0, 1.0))


def test_certified_finds_pairs_that_were_no_candidates():
    """Two columns that move, though by less than a jump, overtake everything, while the others stand still."""
    x = normal(M, N, dtype=torch.float64)
    x /= x.norm(dim=0)
    select = RefreshedPairs(k=10, refresh="certified", margin=2.0)
    before = pairs_of(select(x))
    cosines = (x.T @ x).abs()
    a, b = next((a, b) for a in range(N) for b in range(a + 1, N) if -0.05 < cosines[a, b] - select.cut < -0.02)
    assert (a, b) not in before
    sign = (x[:, a] @ x[:, b]).sign()
    middle = x[:, a] + sign * x[:, b]
    x[:, a] += 0.2 * middle
    x[:, b] += 0.2 * sign * middle
    pairs = select(x)
    assert not is_refresh(select)
    assert (a, b) in pairs_of(pairs)
    assert_selection(pairs, x, k=10)


def rotated(angle):
    """Columns of which 4 and 5, and 6 and 7, have cosine 0.3; 0 and 1, and 2 and 3, turn towards each other."""
    x = torch.eye(44, dtype=torch.float64)[:, :40]
    for a, b in ((4, 5), (6, 7)):
        x[a, b] = 0.3 / (1 - 0.3**2) ** 0.5
    for a, b in ((0, 1), (2, 3)):
        x[a, a] = x[b, b] = math.cos(angle)
        x[b, a] = x[a, b] = math.sin(angle)
    return x


@pytest.mark.quick
def test_certified_by_a_bound_that_is_reached():
    """Where orthogonal columns turn towards each other, their cosine changes by all that the bound allows."""
    select = RefreshedPairs(k=2, refresh="certified", margin=1.5)
    for angle, expected in ((0.0, {(4, 5), (6, 7)}), (0.15, {(4, 5), (6, 7)}), (0.154, {(0, 1), (2, 3)})):
        assert pairs_of(select(rotated(angle))) == expected  # sin(2 * 0.15) < 0.3 < sin(2 * 0.154)
        assert is_refresh(select) == (angle == 0)


@pytest.mark.quick
@KINDS
def test_a_candidate_that_falls_below_tau_is_dropped(refresh):
    select = RefreshedPairs(k=2, tau=0.5, refresh=refresh)
    for cosine, n_expected in ((0.51, 1), (0.49, 0)):
        x = torch.eye(6)[:, :5]
        x[0, 1] = cosine / (1 - cosine**2) ** 0.5
        select.reach.fill_(9.0)  # nothing is due
        pairs = select(x)
        assert pairs.rows.numel() == n_expected
        assert pairs.threshold == 0.5


@pytest.mark.parametrize(
    ("n_found", "n_exact", "counted"),
    [(100, 100, 0.5), (97, 100, 3.5), (50, 100, 50.5), (0, 100, 100.5), (2, 2, 0.05), (1, 2, 1.05), (0, 0, None)],
)
def test_the_next_refresh_follows_from_what_was_missed(n_found, n_exact, counted):
    """If 20% may be missed, columns may move z / 1.645 times as far, where the share that was missed lies beyond z."""
    select = RefreshedPairs(recall=0.8)
    select._plan(n_found, n_exact, torch.tensor(0.01))
    factor = 2.0 if counted is None else max(0.25, norm.isf(min(1, counted / n_exact)) / norm.isf(0.05))
    assert select.reach == pytest.approx(0.01 * factor)
    if n_found == n_exact:
        assert select.reach > 0.01


@pytest.mark.parametrize("recall", [1e-9, 0.3, 1 - 2**-52])
@pytest.mark.parametrize(("n_found", "n_exact"), [(10**6, 10**6), (0, 10**6), (0, 0)])
def test_there_is_always_a_next_refresh(recall, n_found, n_exact):
    """Columns move by less than a jump on average, as those that have jumped do not count."""
    select = RefreshedPairs(recall=recall)
    for _ in range(10):
        moved = torch.tensor(max(0.4, 1.01 * select.reach.item()))
        select._plan(n_found, n_exact, moved)
        assert 0 < select.reach <= 0.25


def test_columns_that_have_jumped_do_not_put_the_next_refresh_off():
    """They are compared with all others, so that nothing is missed by them."""
    reaches = []
    for n_jumps in (0, N // 10):
        select = RefreshedPairs(k=K, recall=0.95)
        before, x = walk(2, 1e-3)
        select(before)
        x[:, :n_jumps] = normal(M, n_jumps, seed=7)
        select(x)
        assert is_refresh(select)
        reaches.append(select.reach.item())
    assert reaches[1] == pytest.approx(reaches[0], rel=0.2)


def test_the_next_refresh_is_when_a_quarter_of_what_may_be_missed_is_expected():
    """Where cosines change by normally distributed amounts, from whatever distance was tried."""
    gap = 0.05  # standard deviations are as large as columns have moved
    for tried in (0.025, 0.04, 0.06, 0.08):
        select = RefreshedPairs(recall=0.8)
        n_missed = round(10_000 * norm.sf(gap / tried))
        select._plan(10_000 - n_missed, 10_000, torch.tensor(tried))
        assert norm.sf(gap / select.reach) == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_certified_with_more_candidates_than_pass(query):
    """Half of all pairs are asked for, so that tau or 0 decides, and all pairs are candidates or all positive ones."""
    select = RefreshedPairs(fraction=0.5, refresh="certified", margin=3.0, **query)
    for x in walk(12, 0.03):
        assert_selection(select(x), x, k=oracle.k_of(N, 0.5), **query)


def test_certified_to_the_last_bit_of_float64():
    """Two pairs of nearly equal cosine change places by less than a float32 can tell."""
    select = RefreshedPairs(k=1, refresh="certified", margin=1.0)
    x = torch.eye(6, dtype=torch.float64)
    for cosine, expected in ((0.3 + 5e-9, {(0, 1)}), (0.3 - 5e-9, {(2, 3)})):
        for a, c in ((0, cosine), (2, 0.3)):
            x[a, a + 1] = c / (1 - c**2) ** 0.5
        assert pairs_of(select(x)) == expected


@pytest.mark.quick
@KINDS
def test_a_column_that_turned_is_compared_at_once(refresh):
    """A column that is resampled, comes to life or dies is compared with all others, and this is no refresh."""
    x = normal(M, N)
    x[:, 5] = 0
    select = RefreshedPairs(k=K, refresh=refresh)
    select(x)
    select.reach.fill_(0.01)  # one of 90 columns does not count for more, however far it moves
    for change in (x[:, 7], -x[:, 80], 0 * x[:, 7]):  # it is born a double, turns, dies
        x[:, 5] = change
        pairs = select(x)
        assert not is_refresh(select)
        assert_selection(pairs, x, k=K)
    x[:, : N // 2] = normal(M, N // 2, seed=3)  # too many
    pairs = select(x)
    assert is_refresh(select)
    assert_selection(pairs, x, k=K)


def test_a_norm_that_jumps_changes_no_cosine():
    x = normal(M, N)
    select = RefreshedPairs(k=K, refresh="certified")
    before = pairs_of(select(x))
    x[:, 3] *= 1000
    assert pairs_of(select(x)) == before
    assert not is_refresh(select)


@pytest.mark.quick
def test_adaptive_refreshes_by_how_far_columns_have_moved():
    """Not at all while they rest, and at once when they move faster than before."""
    select = RefreshedPairs(k=K, recall=0.8)
    assert math.isnan(select.recall)
    assert all(map(math.isnan, select.recall_interval))
    x, generator = normal(M, N), seeded(5)
    for _ in range(20):
        select(x)
    assert (int(select.schedule[0]), select.interval) == (19, 19)

    def move(angle):
        turned = x / x.norm(dim=0) + angle * torch.randn(M, N, generator=generator) / M**0.5
        return turned * x.norm(dim=0)

    x = move(1e-5)
    select(x)
    assert is_refresh(select)
    assert select.recall == 1.0
    assert select.reach == pytest.approx(1e-5 * norm.isf(0.5 / K) / norm.isf(0.05), rel=0.1)
    x = move(1e-5)
    select(x)
    assert not is_refresh(select)
    select(move(1e-4))
    assert is_refresh(select)
    assert select.interval == 2


@pytest.mark.parametrize("margin", [1.5, 4.0])  # without a shortlist and with one
@pytest.mark.parametrize("step", [3e-4, 3e-3, 0.1])
def test_adaptive_keeps_the_recall_that_is_asked_for(step, margin):
    """Over many calls, as the oracle counts it; and its own count is the oracle's for candidates of that age."""
    target = 0.95
    select = RefreshedPairs(k=K, recall=target, margin=margin)
    recalls, intervals = [], []
    for x in walk(60, step):
        old = copy.deepcopy(select)
        exact = oracle.select(float64(x), K)
        exact_pairs = set(zip(exact.rows.tolist(), exact.cols.tolist(), strict=True))
        recalls.append(len(pairs_of(select(x)) & exact_pairs) / K)
        if is_refresh(select) and old.candidates.numel():
            old.reach.fill_(9.0)
            assert select.recall == len(pairs_of(old(x)) & exact_pairs) / K
            low, high = select.recall_interval
            assert 0 <= low < select.recall <= high <= 1
            intervals.append(select.interval)
    assert np.mean(recalls) >= target
    last = np.mean(intervals[-5:])
    assert last < (2 if margin == 1.5 else 4) if step == 0.1 else last > 2


@pytest.fixture
def compared(monkeypatch):
    """How many listed pairs were compared, call by call."""
    sizes = []

    def counted(x_hat, index):
        sizes.append(index.numel())
        return cosines_of(x_hat, index)

    monkeypatch.setattr("topk_ortho.refresh.cosines_of", counted)
    return sizes


def cosines_by_oracle(x, index):
    x_hat = x.double() / x.double().norm(dim=0)
    return (x_hat[:, index // N] * x_hat[:, index % N]).sum(dim=0).abs()


@pytest.mark.quick
def test_most_calls_compare_a_shortlist(compared):
    """The first 1.5 k of the candidates, for a call longer each time while nothing is missed."""
    select = RefreshedPairs(k=K, margin=4.0)
    x = normal(M, N)
    for _ in range(11):
        select(x)
    short, all_candidates = 90, 240
    assert compared == [all_candidates, *([short] * 1 + [all_candidates]), *([short] * 2 + [all_candidates]),
                        *([short] * 3 + [all_candidates])][:10]  # fmt: skip
    assert select.candidates.numel() == all_candidates
    assert (select.shortlist.diff() > 0).all()
    assert set(select.shortlist.tolist()) < set(select.candidates.tolist())
    others = select.candidates[~torch.isin(select.candidates, select.shortlist)]
    assert cosines_by_oracle(x, select.shortlist).min() >= cosines_by_oracle(x, others).max()


@pytest.mark.parametrize(
    ("n_found", "n_exact", "age", "life"),
    [
        (980, 1000, 10, 9),  # z = 2.04 at 2.05%
        (999, 1000, 10, 13),  # z = 2.97 at 0.15%
        (1000, 1000, 10, 14),  # z = 3.29 at 0.05%
        (1000, 1000, 1, 2),  # a call more where nothing is missed
        (40, 40, 3, 4),
        (1, 1000, 10, 2),  # not shorter than a quarter
        (1, 1000, 1, 1),
        (0, 0, 4, 8),
    ],
)
def test_how_long_a_shortlist_lasts(n_found, n_exact, age, life):
    """If 4% may be missed, a quarter of it by the shortlist, z / 2.33 times as long as before."""
    assert RefreshedPairs(recall=0.96)._life(age, n_found, n_exact) == life


def test_what_a_shortlist_misses_is_counted_and_found_by_the_next(compared):
    """A candidate that overtakes the others: not on the shortlist, so it is found when all candidates are compared."""
    select = RefreshedPairs(k=10, margin=6.0, recall=0.9)
    x = normal(M, N, dtype=torch.float64)
    x /= x.norm(dim=0)
    for _ in range(3):
        select(x)
    select.reach.fill_(9.0)
    select.schedule[3] = 3
    others = select.candidates[~torch.isin(select.candidates, select.shortlist)]
    a, b = divmod(int(others[cosines_by_oracle(x, others).argmax()]), N)
    x[:, b] += 0.45 * (x[:, a] @ x[:, b]).sign() * x[:, a]  # less than a jump
    due = copy.deepcopy(select)
    due.reach.zero_()
    assert (a, b) in pairs_of(due(x))
    assert due.recall < 1  # of the shortlist
    moved = (normalize(x, dim=0).T - select.reference).norm(dim=1).mean()
    assert due.reach > moved  # by the candidates, which have missed nothing
    assert (a, b) not in pairs_of(select(x))
    assert compared[-1] == 15
    assert (a, b) in pairs_of(select(x))
    assert compared[-1] == 60
    assert (a, b) in {divmod(index, N) for index in select.shortlist.tolist()}


def test_a_column_that_turns_while_a_shortlist_is_used(compared):
    """Its pairs are compared with all others, candidates that are not on the shortlist too."""
    select = RefreshedPairs(k=K)
    x = normal(M, N)
    for _ in range(8):
        select(x)
    select.reach.fill_(9.0)
    a, b = divmod(int(select.candidates[~torch.isin(select.candidates, select.shortlist)][0]), N)
    x[:, b] = x[:, a]
    assert_selection(select(x), x, k=K)
    assert compared[-1] == 90
    audited = copy.deepcopy(select)
    audited.reach.zero_()
    audited.schedule[2:4] = torch.tensor([0, 9])
    x = x + 1e-6 * normal(M, N, seed=3)
    assert_selection(audited(x), x, k=K)
    assert is_refresh(audited)
    assert audited.recall == 1.0  # what was compared for the column counts as found


def test_a_shortlist_that_misses_much_lasts_shorter_from_the_next_refresh_on():
    """Columns that hardly moved begin to move: refreshes come before the shortlist's time, and still shorten it."""
    n, k, target = 400, 400, 0.99
    generator, select, recalls = seeded(1), RefreshedPairs(k=k, recall=target), []
    x = torch.randn(64, n, generator=generator, dtype=torch.float64)
    for call in range(260):
        found = pairs_of(select(x.float()))
        if call > 150:
            exact = oracle.select(float64(x), k)
            recalls.append(len(found & set(zip(exact.rows.tolist(), exact.cols.tolist(), strict=True))) / k)
        x = x + (1e-5 if call < 120 else 0.04) * torch.randn(64, n, generator=generator, dtype=torch.float64)
    assert np.mean(recalls) >= target


@pytest.mark.parametrize("n_missed", [0, 1, 6, 30])
def test_an_audit_shortens_the_life_of_shortlists_that_have_missed_too_much(n_missed):
    """A shortlist may miss 6 of 60 pairs here. If it has missed fewer, it might have lasted longer: nothing changes."""
    select = RefreshedPairs(k=K, recall=0.6)
    x = normal(M, N)
    for _ in range(12):
        pairs = select(x)
    missed = pairs.rows[:n_missed] * N + pairs.cols[:n_missed]
    rest = select.candidates[~torch.isin(select.candidates, select.shortlist)][:n_missed]
    select.shortlist = torch.cat([select.shortlist[~torch.isin(select.shortlist, missed)], rest]).sort().values
    select.schedule[2:4] = torch.tensor([5, 9])
    select.reach.fill_(0)
    select(x + 1e-6 * normal(M, N, seed=1))
    assert is_refresh(select)
    assert select.recall == 1 - n_missed / K
    assert select.schedule[2:4].tolist() == [0, {0: 9, 1: 9, 6: 6, 30: 2}[n_missed]]


def test_another_k_has_no_shortlist():
    """Though the candidates are as many, because there are no more pairs or because the margin is another."""
    x = normal(M, 40)
    for before, after in (((200, 4.0), (700, 4.0)), ((60, 4.0), (120, 2.0)), ((120, 2.0), (60, 4.0))):
        select = RefreshedPairs(k=before[0], margin=before[1])
        for _ in range(6):
            select(x)
        select.k, select.margin = after
        for _ in range(4):
            assert_selection(select(x), x, k=after[0])


def test_certified_in_between_leaves_no_shortlist():
    select = RefreshedPairs(k=K)
    for _ in range(12):
        select(normal(M, N))
    select.refresh = "certified"
    life = int(select.schedule[3])
    assert life > 1
    x = normal(M, N, seed=1)
    select(x)
    assert select.shortlist.numel() == 0
    select.refresh = "adaptive"
    for _ in range(life):
        assert_selection(select(x), x, k=K)
        assert select.schedule[3] == life
    assert select.shortlist.numel() == 90


@KINDS
@pytest.mark.parametrize("margin", [1.0, 1.5, 4.0])
def test_no_two_buffers_share_memory(refresh, margin):
    """Formats that save tensors by name refuse such a module."""
    select = RefreshedPairs(k=K, refresh=refresh, margin=margin)
    for x in walk(5, 1e-3):
        select(x)
    storages = [
        buffer.untyped_storage().data_ptr()
        for _, buffer in select.named_buffers(remove_duplicate=False)
        if buffer.numel()
    ]
    assert len(set(storages)) == len(storages)


@KINDS
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled(refresh):
    """With breaks of the graph where counts are read."""
    torch._dynamo.reset()
    loss = TopKOrthoLoss(k=K, refresh=refresh)
    compiled = torch.compile(loss, backend="eager")
    for x in walk(5, 1e-4):
        torch.testing.assert_close(compiled(x), topk_ortho_loss(x, k=K))


def test_what_a_refresh_leaves():
    """The least similarity of the candidates, and a guess for the next."""
    select = RefreshedPairs(k=K, refresh="certified", margin=4.0)
    x = normal(M, N)
    select(x)
    assert select.cut == pytest.approx(oracle.select(float64(x), 4 * K).threshold, abs=cosine_bound(x))
    assert 0 < select.state[0] <= select.cut


def test_certified_compares_all_candidates(compared):
    select = RefreshedPairs(k=K, refresh="certified")
    for x in walk(6, 1e-5):
        select(x)
    assert compared == [240] * 5
    assert select.shortlist.numel() == 0


def test_wilsons_interval():
    """Against the roots of (p - r)**2 = z**2 r (1 - r) / n."""
    select = RefreshedPairs()
    select.audit.copy_(torch.tensor([57, 60]))
    for r in select.recall_interval:
        assert (57 / 60 - r) ** 2 == pytest.approx(1.959964**2 * r * (1 - r) / 60)
    assert select.recall_interval[0] < 57 / 60 < select.recall_interval[1]


@pytest.mark.quick
@KINDS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("has_priority", [False, True])
def test_the_loss_and_its_gradient(refresh, reduction, has_priority):
    """At a refresh and after it."""
    priority = torch.arange(N) % 7 if has_priority else None
    loss = TopKOrthoLoss(k=K, similarity="positive", reduction=reduction, refresh=refresh)
    for x in walk(3, 1e-5, dtype=torch.float64):
        of = x.clone().requires_grad_()
        value = loss(of, priority)
        value.backward()
        expected = oracle.select(x.numpy(), K, similarity="positive")
        assert value.item() == pytest.approx(oracle.loss_of(expected.values, reduction), rel=1e-12)
        numbers = None if priority is None else priority.numpy()
        gradient = oracle.loss_gradient(x.numpy(), expected.rows, expected.cols, reduction, numbers)
        np.testing.assert_allclose(of.grad.numpy(), gradient, atol=1e-12)
    assert value.dtype == torch.float64
    if refresh == "certified":
        assert not is_refresh(loss.pairs)


@KINDS
def test_the_values_of_the_pairs_are_differentiable(refresh):
    x = normal(M, N).requires_grad_()
    select = RefreshedPairs(k=K, refresh=refresh)
    for _ in range(2):
        pairs = select(x)
        (gradient,) = torch.autograd.grad(pairs.values.sum(), x)
        expected = oracle.pair_values(x.detach().double().requires_grad_(), pairs.rows.numpy(), pairs.cols.numpy())
        naive = x.detach().double().requires_grad_()
        oracle.pair_values(naive, pairs.rows.numpy(), pairs.cols.numpy()).sum().backward()
        torch.testing.assert_close(gradient.double(), naive.grad, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pairs.values.double(), expected.detach(), atol=1e-6, rtol=0)
    with torch.no_grad():
        assert not select(x).values.requires_grad


@KINDS
def test_a_saved_state_goes_on_bit_by_bit(refresh):
    """Into a module that was not called yet, and into one that has candidates of another size."""
    matrices = list(walk(14, 3e-3))
    whole = TopKOrthoLoss(k=K, refresh=refresh)
    for x in matrices[:6]:
        whole(x)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    other = TopKOrthoLoss(k=K, refresh=refresh)
    other(normal(5, 40))
    fresh = TopKOrthoLoss(k=K, refresh=refresh)
    for resumed in (fresh, other):
        resumed.load_state_dict(saved)
    for x in matrices[6:]:
        value = whole(x)
        for resumed in (fresh, other):
            assert torch.equal(resumed(x), value)
            for name, buffer in whole.named_buffers():
                assert torch.equal(resumed.get_buffer(name), buffer), name


@KINDS
def test_another_matrix_is_compared_anew(refresh):
    select = RefreshedPairs(k=20, refresh=refresh)
    for x in (normal(M, N), normal(M, 50), normal(9, 50), normal(9, 50, dtype=torch.float64)):
        assert_selection(select(x), x, k=20)
        assert is_refresh(select)
        assert math.isnan(select.recall) or refresh == "certified"
        select.reach.fill_(9.0)  # nothing is due
        select.audit += 1
    select.k = 90  # more than there were candidates for
    assert_selection(select(x), x, k=90)
    select.similarity = "positive"
    assert_selection(select(x), x, k=90, similarity="positive")
    select.tau = 0.4
    assert_selection(select(x), x, k=90, similarity="positive", tau=0.4)
    select.similarity = "abs"
    select.tau = None
    assert_selection(select(x), x, k=90)
    select.tau = "adaptive"
    with pytest.raises(ValueError, match='tau cannot be "adaptive"'):
        select(x)


@KINDS
def test_opposite_directions_count_as_soon_as_they_are_asked_for(refresh):
    x = normal(M, N)
    x = torch.cat([x, -x], dim=1)  # every column has its opposite
    select = RefreshedPairs(k=N, similarity="positive", refresh=refresh)
    select(x)
    select.similarity = "abs"
    assert pairs_of(select(x)) == {(n, n + N) for n in range(N)}


@KINDS
def test_back_and_forth(refresh):
    """What columns are compared with are those of the last refresh."""
    select = RefreshedPairs(k=K, refresh=refresh)
    for seed in (0, 1, 0, 1):
        x = normal(M, N, seed)
        assert_selection(select(x), x, k=K)
        assert is_refresh(select)


@KINDS
def test_the_loss_follows_its_attributes(refresh):
    x = normal(M, N)
    loss = TopKOrthoLoss(k=K, refresh=refresh)
    loss(x)
    loss.k, loss.similarity, loss.tau = 20, "positive", 0.3
    torch.testing.assert_close(loss(x), topk_ortho_loss(x, k=20, similarity="positive", tau=0.3))


@KINDS
def test_all_pairs_are_candidates(refresh):
    for margin in (1.0, 3.0, 1e300):
        select = RefreshedPairs(fraction=1.0, refresh=refresh, margin=margin)
        for x in walk(3, 1e-3):
            pairs = select(x)
            assert pairs.rows.numel() == N * (N - 1) // 2
            assert_selection(pairs, x, k=N * (N - 1) // 2)
        if refresh == "certified":
            assert not is_refresh(select)


@KINDS
def test_ties_and_dead_columns(refresh):
    x = dyadic(12, 40)
    x[:, 9] = 0
    select = RefreshedPairs(k=100, refresh=refresh)
    for _ in range(3):
        pairs = select(x)
        expected = oracle.select(float64(x), 100)
        assert pairs.rows.tolist() == expected.rows.tolist()
        assert pairs.cols.tolist() == expected.cols.tolist()


@KINDS
def test_fewer_pairs_than_asked_for_pass_tau(refresh):
    x = torch.eye(6)[:, [0, 0, 1, 2, 3, 4]]
    select = RefreshedPairs(k=5, tau=0.5, refresh=refresh)
    loss = TopKOrthoLoss(k=5, tau=0.5, refresh=refresh)
    for _ in range(2):
        assert pairs_of(select(x)) == {(0, 1)}
        assert select(x).threshold == 0.5
        assert loss(x) == 1.0
    assert TopKOrthoLoss(k=5, tau=0.5, refresh=refresh)(torch.eye(6)) == 0.0


@KINDS
def test_reset_forgets(refresh):
    loss = TopKOrthoLoss(k=K, refresh=refresh)
    loss(normal(M, N))
    loss.reset_state()
    initial = TopKOrthoLoss(k=K, refresh=refresh).pairs
    assert loss.pairs.candidates.numel() == 0
    for name in ("shortlist", "reference", "schedule", "audit", "reach", "state"):
        assert torch.equal(loss.pairs.get_buffer(name), initial.get_buffer(name))
    loss(normal(M, N))
    assert is_refresh(loss.pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refresh": "sometimes"}, "refresh must be one of .*'adaptive', 'certified', got 'sometimes'"),
        ({"recall": 1.0}, r"recall must be in \(0, 1\), got 1.0"),
        ({"recall": 0.0}, r"recall must be in \(0, 1\), got 0.0"),
        ({"margin": 0.5}, "margin must be at least 1, got 0.5"),
        ({"margin": math.nan}, "margin must be at least 1, got nan"),
        ({"margin": math.inf}, "margin must be at least 1, got inf"),
        ({"tau": "adaptive"}, 'tau cannot be "adaptive", which depends on all pairs; give a number or None'),
    ],
)
def test_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RefreshedPairs(**arguments)
    with pytest.raises(ValueError, match=message):
        TopKOrthoLoss(**({"refresh": "adaptive"} | arguments))


@KINDS
def test_what_is_no_dense_finite_matrix_is_refused(refresh):
    select = RefreshedPairs(k=K, refresh=refresh)
    x = normal(M, N)
    select(x)
    with pytest.raises(TypeError, match="x must be dense"):
        select(SparseFeatures(torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2), N))
    with pytest.raises(ValueError, match="priority has 1 NaN"):
        select(x, torch.where(torch.arange(N) == 3, torch.nan, 1.0))
    with pytest.raises(ValueError, match="x has 1 column with NaN or Inf: 4"):
        select(torch.where(torch.arange(N) == 4, torch.nan, x))
    with pytest.raises(ValueError, match=r"k must be in \[1, 10\]"):
        select(normal(M, 5))
    with pytest.raises(ValueError, match='structural_zeros must be False where refresh is "'):
        TopKOrthoLoss(refresh=refresh, structural_zeros=True)
    with pytest.raises(TypeError, match="margin must be a number, got str"):
        RefreshedPairs(margin="4")
    with pytest.raises(ValueError, match="refresh must be one of 'exact', 'adaptive', 'certified', got 'exat'"):
        TopKOrthoLoss(refresh="exat", structural_zeros=True)
    with pytest.raises(ValueError, match="reduction must be one of"):
        TopKOrthoLoss(k=3, refresh=refresh, reduction="max")(x)


def test_exact_keeps_nothing_but_the_warm_start():
    x = normal(M, N)
    loss = TopKOrthoLoss(k=K)
    assert loss.pairs is None
    assert set(loss.state_dict()) == {"state"}
    assert torch.equal(loss(x), topk_ortho_loss(x, k=K))


def test_columns_near_the_largest_norm():
    x = normal(M, N) * 1e36
    select = RefreshedPairs(k=K, refresh="certified")
    for _ in range(2):
        pairs = select(x)
        assert_selection(pairs, x, k=K)
        expected = oracle.pair_values(x.double(), pairs.rows.numpy(), pairs.cols.numpy())
        assert (pairs.values.double() - expected).abs().max() <= cosine_bound(x)
