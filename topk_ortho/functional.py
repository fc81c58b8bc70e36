"""The public ops: check, resolve, delegate.

A matrix x [M, N], dense or sparse, holds N features in its columns. With
``x_hat[:, j] = x[:, j] / max(||x[:, j]||, 1e-12)`` the cosine of a pair (row, col), row < col, is an entry of
``gram = x_hat.T @ x_hat``, which is never held whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from topk_ortho import custom_ops, sparse_ops
from topk_ortho.backends.base import Precision, Selection, Similarity
from topk_ortho.backends.entries import Coordinates
from topk_ortho.backends.registry import resolve_backend
from topk_ortho.backends.sparse import SparseSelection
from topk_ortho.pairs import TopKPairs
from topk_ortho.sparse_features import SparseFeatures, coordinates_of, is_dense
from topk_ortho.validation import (
    check_features,
    check_flag,
    check_generator,
    check_n_chunks,
    check_state,
    check_word,
    resolve_k,
    resolve_priority,
    resolve_tau,
)


def topk_pairs(
    x: Tensor | SparseFeatures,
    fraction: float = 1e-3,
    *,
    k: int | None = None,
    tau: float | str | None = None,
    n_std: float = 1.0,
    similarity: Similarity = "abs",
    backend: str = "auto",
    precision: Precision = "highest",
    state: Tensor | None = None,
) -> TopKPairs:
    """The k most similar pairs of columns of x, exactly, without ever holding N x N values.

    Pairs are ordered by |cosine| descending, then by (row, col) ascending; the first k that pass `tau` are selected.

    Parameters
    ----------
    x : Tensor or SparseFeatures, shape [M, N], float16, bfloat16, float32 or float64
        Features in columns: a dense tensor of any strides, on any device; or `SparseFeatures`, or a tensor of layout
        sparse_csr or sparse_coo, on the CPU or where "triton" runs. A zero column has cosine 0 with every other.
    fraction : float, default 1e-3
        Share of the N(N-1)/2 pairs to select, in (0, 1]: ``k = max(1, int(N*(N-1)*fraction) // 2)``.
    k : int, optional
        Number of pairs, in [1, N(N-1)/2]; replaces `fraction`.
    tau : None, float in [0, 1) or "adaptive"
        Floor: a pair counts only if |cosine| > tau. "adaptive" is ``mean + n_std * std`` (population) of |cosine| over
        all pairs.
    n_std : float, default 1.0
        Standard deviations above the mean of the adaptive tau.
    similarity : {"abs", "positive"}
        "positive" orders by the signed cosine and drops cosines <= 0.
    backend : str, default "auto"
        See `available_backends`. An explicit choice never falls back to another. "auto" is "sparse" for a sparse x and,
        on the CPU, for a dense one of which so much is 0 that this takes less time, see Notes.
    precision : {"highest", "high", "medium"}
        Least precision of the products, as in `torch.set_float32_matmul_precision`; the process-wide setting is not
        used. Products accumulate in float32, or in float64 for float64 input.
    state : Tensor, optional
        Warm-start state from `initial_state`, updated in place: a call on slowly changing x starts from the last
        threshold. It changes the time a call takes, never which pairs are the k most similar; on the "triton" backend
        float32 values of "highest" precision may differ in their last bits, see Notes. "sparse" needs none.

    Returns
    -------
    TopKPairs
        ``rows``, ``cols``, ``values`` of the p <= k selected pairs, most similar first; ``values`` is differentiable in
        x, the choice of pairs is not. Of a sparse x, pairs of cosine 0 are not listed, though they may be selected.

    Raises
    ------
    TypeError
        If an argument is of the wrong type, x has another layout or its dtype is not floating.
    ValueError
        If x is not 2-D, has no row or fewer than 2 columns, holds NaN or Inf, or has a column whose norm exceeds its
        accumulation dtype; if a sparse x names a feature that is out of range, or one twice in a row; if an argument is
        out of its range; if a backend is not available. On the "triton" backend a call with `state` does not wait for
        the device to look at the numbers: values are then NaN instead.

    Notes
    -----
    Exact means: against float64, every selected pair has |cosine| >= t_k - e and every other one |cosine| <= t_k + e,
    where t_k is the k-th value and e the rounding of the precision asked for; the count is exact. It takes N**2 M / 2
    multiply-adds, twice that if the first guess was wrong ("triton": four to seven times). Extra memory is O(k) and a
    bounded number of tiles, and a copy of x: on "tiled" in float32 if it is bfloat16, float16 or has no unit stride; on
    "triton" in float16 if it is float32 and `precision` "medium", or "highest" and screened.

    "triton" screens float32 columns of "highest" precision in float16 if N >= 8,192, M <= 8,192 and tau is not
    adaptive: by a bound on its error it then knows what may be selected, and sums those products in float32. After a
    wrong guess all products are float32, summed in another order.

    "sparse" computes the pairs of features that are active in one row or another, and no other: L0 features in each row
    make M L0 (L0 - 1) / 2 products, whatever N is. Products are rounded to float32 (float64 for float64 input) and
    summed in float64, so `precision` makes no difference. Extra memory is O(k), about 100 bytes a non-zero, and about
    60 a product of a slab: of those there are at most 2**19 (2**24 on a GPU), or what one feature takes. On the CPU
    "auto" takes this route for a dense x if ``threads * (1500 * products + M N + 1e8) < M N**2 / 2``.

    If `tau` is given, `similarity` is "positive" or x is sparse, the number of pairs depends on the data, which
    ``torch.compile(fullgraph=True)`` may refuse where a gradient is needed, or without
    ``torch._dynamo.config.capture_scalar_outputs = True``; `topk_ortho_loss` has no such limit.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    >>> pairs = topk_pairs(x, k=2)
    >>> pairs.rows.tolist(), pairs.cols.tolist()
    ([0, 1], [2, 2])
    >>> pairs.values
    tensor([0.8944, 0.4472])
    """
    question = _resolve(x, fraction, k, tau, n_std, similarity, None, backend, precision, state)
    selection: Selection | SparseSelection
    n_listed: Tensor | None
    if is_dense(x):
        selection = _select_dense(x, question, state)
        n_listed = None if tau is None and similarity == "abs" else selection.n_selected
    else:
        coordinates, n_pairs_that_meet = coordinates_of(x)
        selection = _select_sparse(coordinates, n_pairs_that_meet, question, is_ordered=True)
        n_listed = selection.n_listed
    rows, cols, values = selection.rows, selection.cols, selection.values
    if n_listed is not None:
        p = n_listed.item()
        rows, cols, values = rows[:p], cols[:p], values[:p]
    tau_used = selection.tau.item() if tau == "adaptive" else None if tau is None else float(tau)
    return TopKPairs(rows, cols, values.float(), selection.threshold.float(), tau_used, x.shape[1], question.k)


def topk_ortho_loss(
    x: Tensor | SparseFeatures,
    fraction: float = 1e-3,
    *,
    k: int | None = None,
    tau: float | str | None = None,
    n_std: float = 1.0,
    similarity: Similarity = "abs",
    reduction: str = "mean",
    priority: Tensor | None = None,
    backend: str = "auto",
    precision: Precision = "highest",
    state: Tensor | None = None,
    structural_zeros: bool = False,
) -> Tensor:
    """Mean of cosine**2 over the k most similar pairs of columns of x.

    The naive expression that it replaces, for ``tau=None`` and ``similarity="abs"``::

        x_hat = torch.nn.functional.normalize(x, dim=0)
        cosine = (x_hat.T @ x_hat)[tuple(torch.triu_indices(N, N, 1))]
        loss = cosine.square().topk(k).values.mean()

    Parameters
    ----------
    x, fraction, k, tau, n_std, similarity
        As in `topk_pairs`.
    reduction : {"mean", "sum"}
        Over the selected pairs. The mean over none is 0 with zero gradient.
    priority : Tensor, shape [N], optional
        Real numbers, for an SAE how often each feature fires. In each selected pair the column of higher priority is
        held constant, so that only the other one gets gradient; equal priorities move both. The value does not change.
    backend, precision, state
        As in `topk_pairs`.
    structural_zeros : bool, default False
        Zeros of a dense x get no gradient, as those that ReLU or TopK made would pass none on. Where that is so, it
        saves time on the "sparse" backend and changes nothing. A sparse x has gradient in its entries alone.

    Returns
    -------
    Tensor, shape []
        float32, float64 for float64 input. Differentiable in x; the choice of pairs and tau are not differentiated
        through.

    Raises
    ------
    TypeError, ValueError
        As in `topk_pairs`; also if `priority` does not have one real number a column, or `reduction` is unknown.

    Notes
    -----
    The backward pass gathers the partners of each column, O(k M), and applies the Jacobian of the normalisation. The
    gradient of a dead column is zero. For a sparse x it goes through the products once more.

    Where a sparse x makes no more products than k, every pair whose cosine is not 0 is selected. Then, for
    ``similarity="abs"`` and without `tau` and `priority`, the sum is taken in closed form, over pairs of features or of
    rows, whichever meet less often: ``(||x_hat @ x_hat.T||_F**2 - sum_j gram[j, j]**2) / 2``.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]], requires_grad=True)
    >>> loss = topk_ortho_loss(x, k=1)
    >>> loss.backward()
    >>> loss
    tensor(0.8000, grad_fn=<DivBackward0>)
    >>> x.grad[:, 1]
    tensor([0., 0.])
    """
    check_word("reduction", reduction, ("mean", "sum"))
    check_flag("structural_zeros", structural_zeros)
    question = _resolve(x, fraction, k, tau, n_std, similarity, priority, backend, precision, state)
    selection: Selection | SparseSelection
    if is_dense(x):
        selection = _select_dense(x, question, state, structural_zeros)
    else:
        coordinates, n_pairs_that_meet = coordinates_of(x)
        is_every_pair = question.tau is None and question.n_std is None and similarity == "abs" and priority is None
        if is_every_pair and n_pairs_that_meet <= question.k:  # all that are not 0 are selected
            total: Tensor = sparse_ops.sum_of_squares(*coordinates)
            return total / question.k if reduction == "mean" else total
        selection = _select_sparse(coordinates, n_pairs_that_meet, question, is_ordered=False)
    loss = selection.values.square().sum()  # padding is 0
    return loss / selection.n_selected.clamp_min(1) if reduction == "mean" else loss


def max_cosine_loss(
    x: Tensor | SparseFeatures,
    n_chunks: int = 1,
    *,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    precision: Precision = "highest",
) -> Tensor:
    """Mean over columns of the squared largest cosine to another column.

    Equation 4 of OrtSAE [1]_: ``loss = mean_i (max_j cosine(i, j)) ** 2``, j over the other columns of i's random
    chunk.

    Parameters
    ----------
    x : Tensor or SparseFeatures, shape [M, N], float16, bfloat16, float32 or float64
        Features in columns, dense or sparse as in `topk_pairs`. A zero column has cosine 0 with every other.
    n_chunks : int, default 1
        Number of random chunks of (nearly) equal size, in [1, N // 2]; 1 compares every pair.
    generator : torch.Generator, optional
        Draws the chunks; unused for ``n_chunks=1``. ``torch.compile(fullgraph=True)`` does not take one.
    backend, precision
        As in `topk_pairs`.

    Returns
    -------
    Tensor, shape []
        float32, float64 for float64 input. Differentiable in x; the choice of j (the lowest among equals) is not
        differentiated through.

    Raises
    ------
    TypeError, ValueError
        As in `topk_pairs`; also if `n_chunks` is out of range or `generator` is not a `torch.Generator`.

    Notes
    -----
    N**2 M / (2 n_chunks) multiply-adds; O(N) memory beside one tile, and for ``n_chunks > 1`` a copy of one chunk of x,
    on "triton" of as many as fit 2**26 elements. On "sparse" only features that are active together are multiplied.

    References
    ----------
    .. [1] Korznikov et al., "OrtSAE: Orthogonal Sparse Autoencoders Uncover Atomic Features", arXiv:2509.22033.

    Examples
    --------
    >>> max_cosine_loss(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]))
    tensor(0.6000)
    """
    check_features(x)
    check_n_chunks(n_chunks, x.shape[1])
    check_generator(generator)
    check_word("precision", precision, ("highest", "high", "medium"))
    backend = resolve_backend(backend, x.device, is_sparse=not is_dense(x))
    permutation = None
    if n_chunks > 1:
        device = x.device if generator is None else generator.device
        permutation = torch.randperm(x.shape[1], generator=generator, device=device).to(x.device)
    values: Tensor
    if is_dense(x):
        values = custom_ops.row_max(x, permutation, int(n_chunks), precision, backend)[0]
    else:
        coordinates, _ = coordinates_of(x)
        values = sparse_ops.sparse_row_max(*coordinates, permutation, int(n_chunks))[0]
    return values.square().mean()


class _Question(NamedTuple):
    """What a call asks, resolved; see `topk_ortho.backends.base.Query`."""

    k: int
    tau: float | None
    n_std: float | None
    similarity: Similarity
    precision: Precision
    backend: str
    priority: Tensor | None


def _resolve(
    x: Tensor | SparseFeatures,
    fraction: float,
    k: int | None,
    tau: float | str | None,
    n_std: float,
    similarity: Similarity,
    priority: Tensor | None,
    backend: str,
    precision: Precision,
    state: Tensor | None,
) -> _Question:
    check_features(x)
    k = resolve_k(x.shape[1], fraction, k)
    fixed_tau, adaptive_n_std = resolve_tau(tau, n_std)
    check_word("similarity", similarity, ("abs", "positive"))
    check_word("precision", precision, ("highest", "high", "medium"))
    priority = resolve_priority(priority, x.shape[1], x.device)
    check_state(state, x.device)
    backend = resolve_backend(backend, x.device, is_sparse=not is_dense(x))
    return _Question(k, fixed_tau, adaptive_n_std, similarity, precision, backend, priority)


def _select_dense(x: Tensor, question: _Question, state: Tensor | None, structural_zeros: bool = False) -> Selection:
    k, tau, n_std, similarity, precision, backend, priority = question
    selection = Selection(
        *custom_ops.select_pairs(x, k, tau, n_std, similarity, precision, backend, priority, state, structural_zeros)
    )
    if state is not None:
        state.copy_(selection.state)
    return selection


def _select_sparse(x: Coordinates, n_pairs_that_meet: int, question: _Question, *, is_ordered: bool) -> SparseSelection:
    k, tau, n_std, similarity, _, _, priority = question
    size = min(k, n_pairs_that_meet)
    return SparseSelection(*sparse_ops.select_sparse_pairs(*x, size, k, tau, n_std, similarity, priority, is_ordered))
