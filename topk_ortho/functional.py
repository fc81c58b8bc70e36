"""The public ops: check, resolve, delegate.

A matrix x [M, N], dense or sparse, holds N features in its columns (with ``dim=0``, [N, M], in its rows). With
``x_hat[:, j] = x[:, j] / max(||x[:, j]||, 1e-12)`` the cosine of a pair (row, col), row < col, is an entry of
``gram = x_hat.T @ x_hat``, which is never held whole.
"""

from typing import Any

import torch
from torch import Tensor

from topk_ortho import custom_ops, sparse_ops
from topk_ortho.backends.registry import resolve_backend
from topk_ortho.backends.sparse.coordinates import Coordinates
from topk_ortho.definitions import BackendName, Precision, Query, Reduction, Similarity, Tau
from topk_ortho.pairs import NearestColumns, TopKPairs
from topk_ortho.selection import Selection
from topk_ortho.sparse_features import SparseFeatures, coordinates_of, is_dense
from topk_ortho.validation import (
    check_features,
    check_flag,
    check_generator,
    check_n_chunks,
    check_state,
    check_word,
    in_columns,
    resolve_priority,
    resolve_query,
)


def topk_pairs(
    x: Tensor | SparseFeatures,
    fraction: float = 1e-3,
    *,
    dim: int = 1,
    k: int | None = None,
    tau: Tau = None,
    n_std: float = 1.0,
    similarity: Similarity = "abs",
    priority: Tensor | None = None,
    backend: BackendName = "auto",
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
    dim : {1, 0}
        Where features are: 1 for columns of x, 0 for rows. So a decoder [n_features, d_in] goes in as it is with
        ``dim=0``: ``topk_pairs(W_dec, dim=0)``. Where this documentation, error messages and the results' ``rows`` and
        ``cols`` speak of columns, they mean features. A sparse x takes 1 alone.
    k : int, optional
        Number of pairs, in [1, N(N-1)/2]; replaces `fraction`.
    tau : None, float in [0, 1) or "adaptive"
        A pair counts only if |cosine| > tau. "adaptive" is ``mean + n_std * std`` (population) of |cosine| over all
        pairs.
    n_std : float, default 1.0
        Standard deviations above the mean of the adaptive tau.
    similarity : {"abs", "positive"}
        "positive" orders by the signed cosine and drops cosines <= 0. `train.py` and the plug-in for SAELens take
        "positive" where nothing else is said, these functions "abs".
    priority : Tensor, shape [N], optional
        One real number a column; for an SAE, how often each feature fires. In each selected pair the column of higher
        priority is held constant, so that only the other one gets gradient; equal priorities move both. Which pairs are
        selected, and their values, do not depend on it.
    backend : {"auto", "naive", "tiled", "triton", "sparse"}
        See `available_backends`. An explicit choice never falls back to another. "auto" is "sparse" for a sparse x,
        and on the CPU also for a dense x that has so many zeros that this is expected to take less time.
    precision : {"highest", "high", "medium"}
        Least precision of the products, as in `torch.set_float32_matmul_precision`; the process-wide setting is not
        used. Products accumulate in float32, or in float64 for float64 input.
    state : Tensor, optional
        Warm-start state from `initial_state`, updated in place: a call on slowly changing x starts from the last
        threshold. The state changes the time that a call takes, never which pairs are the k most similar; on the
        "triton" backend float32 values may differ in their last bits, see Notes. The "sparse"
        backend needs none.

    Returns
    -------
    TopKPairs
        ``rows``, ``cols``, ``values`` of the p <= k selected pairs, most similar first. ``values`` is differentiable in
        x, the choice of pairs is not. For a sparse x, pairs of cosine 0 are not listed, though they may be selected.

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
    Exact means: against float64, every selected pair has |cosine| >= t_k - e and every other one |cosine| <= t_k +
    e, where t_k is the k-th value and e the rounding of the precision asked for; the count is exact but for pairs
    within e of a limit. A call takes N**2 M / 2 multiply-adds, twice as many if the first guess was wrong
    ("triton": three to seven times; "tiled" where it screens: up to four). Extra memory is O(k) and a bounded number of
    tiles. "tiled" also copies x to float32 if it is bfloat16, float16 or has no unit stride, and keeps x_hat and a copy
    of it in bfloat16 where it screens; "triton" copies a float32 x to float16 where it screens it, and for `precision`
    "medium".

    "triton" screens float32 matrices of 1024 features or more in float16 for "highest" and "high": by a bound on its
    error it knows what may be selected, and computes only those products in float32. Where more are undecided than
    there is room for, all products are float32, and summed in another order. "tiled" screens in
    bfloat16 from N = 1024 and up to M = 4096, on CPUs that have instructions for it, at whatever precision.

    "sparse" computes the pairs of features that are active in the same row of x, and no others: L0 features in each row
    make M L0 (L0 - 1) / 2 products, whatever N is. Products are rounded to float32 (float64 for float64 input) and
    summed in float64, so `precision` makes no difference. Extra memory is O(k), O(1) for each non-zero, and a bounded
    number of products at a time. `topk_ortho.backends.sparse.cost` has the estimate by which "auto" chooses this route
    for a dense x.

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
    check_features(x, dim)
    x = in_columns(x, dim)
    query = resolve_query(
        x.shape[1], fraction=fraction, k=k, tau=tau, n_std=n_std, similarity=similarity, precision=precision
    )
    priority = resolve_priority(priority, x.shape[1], x.device)
    check_state(state, x.device)
    chosen = resolve_backend(backend, x.device, is_sparse=not is_dense(x))
    if is_dense(x):
        selection = _select(x, query, chosen, priority, state)
        is_full = tau is None and similarity == "abs"
    else:
        coordinates, n_products = coordinates_of(x)
        selection = _select_sparse(coordinates, n_products, query, priority, is_ordered=True)
        is_full = False
    rows, cols, cosines = selection.rows, selection.cols, selection.cosines
    if not is_full:
        p = selection.n_listed.item()
        rows, cols, cosines = rows[:p], cols[:p], cosines[:p]
    tau_used = selection.tau.item() if tau == "adaptive" else None if tau is None else float(tau)
    return TopKPairs(rows, cols, cosines.float(), selection.threshold.float(), tau_used, x.shape[1], query.k)


def topk_ortho_loss(
    x: Tensor | SparseFeatures,
    fraction: float = 1e-3,
    *,
    dim: int = 1,
    k: int | None = None,
    tau: Tau = None,
    n_std: float = 1.0,
    similarity: Similarity = "abs",
    reduction: Reduction = "mean",
    priority: Tensor | None = None,
    backend: BackendName = "auto",
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
    x, fraction, dim, k, tau, n_std, similarity
        As in `topk_pairs`.
    reduction : {"mean", "sum"}
        What is made of the squared cosines of the selected pairs. The mean over no pair is 0 with zero gradient.
    priority, backend, precision, state
        As in `topk_pairs`.
    structural_zeros : bool, default False
        Give zeros of a dense x no gradient. This changes nothing where ReLU or TopK made them, which pass none on, and
        saves time on the "sparse" backend. A sparse x has gradient in its entries alone.

    Returns
    -------
    Tensor, shape []
        float32, float64 for float64 input. Differentiable in x; the choice of pairs and tau are not differentiated
        through.

    Raises
    ------
    TypeError, ValueError
        As in `topk_pairs`; also if `reduction` is unknown.

    Notes
    -----
    The backward pass gathers the partners of each column, O(k M), and applies the Jacobian of the normalisation. The
    gradient of a dead column is zero. For a sparse x the backward pass computes the products once more.

    Where a sparse x makes no more products than k, every pair whose cosine is not 0 is selected. Then, for
    ``similarity="abs"`` and without `tau` and `priority`, no pairs are listed: the sum is taken over pairs of features
    that share rows; or, if these are fewer, over pairs of rows that share features, as
    ``(||x_hat @ x_hat.T||_F**2 - sum_j gram[j, j]**2) / 2``.

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
    loss, _ = loss_and_threshold(
        x, fraction, dim=dim, k=k, tau=tau, n_std=n_std, similarity=similarity, reduction=reduction, priority=priority,
        backend=backend, precision=precision, state=state, structural_zeros=structural_zeros,
    )  # fmt: skip
    return loss


def loss_and_threshold(
    x: Tensor | SparseFeatures,
    fraction: float,
    *,
    dim: int,
    reduction: Reduction,
    priority: Tensor | None,
    backend: BackendName,
    state: Tensor | None,
    structural_zeros: bool,
    **selection: Any,
) -> tuple[Tensor, Tensor]:
    """`topk_ortho_loss`, and the threshold of `topk_pairs`, which is NaN where no pairs are listed."""
    check_word("reduction", reduction, Reduction)
    check_flag("structural_zeros", structural_zeros)
    check_features(x, dim)
    x = in_columns(x, dim)
    query = resolve_query(x.shape[1], fraction=fraction, **selection)
    priority = resolve_priority(priority, x.shape[1], x.device)
    check_state(state, x.device)
    chosen = resolve_backend(backend, x.device, is_sparse=not is_dense(x))
    if is_dense(x):
        selected = _select(x, query, chosen, priority, state, structural_zeros)
    else:
        coordinates, n_products = coordinates_of(x)
        is_plain = query.tau is None and query.n_std is None and query.similarity == "abs" and priority is None
        if is_plain and n_products <= query.k:  # every pair whose cosine is not 0 is selected
            total: Tensor = sparse_ops.sum_of_squares(*coordinates)
            threshold = total.new_full((), 0.0 if n_products < query.k else torch.nan)
            return total / query.k if reduction == "mean" else total, threshold
        selected = _select_sparse(coordinates, n_products, query, priority, is_ordered=False)
    loss = selected.cosines.square().sum()  # padding is 0
    return loss / selected.n_selected.clamp_min(1) if reduction == "mean" else loss, selected.threshold


def max_cosine_loss(
    x: Tensor | SparseFeatures,
    n_chunks: int = 1,
    *,
    dim: int = 1,
    generator: torch.Generator | None = None,
    backend: BackendName = "auto",
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
    dim : {1, 0}
        Whether features are columns of x (1) or rows (0), as in `topk_pairs`.
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
    A call takes N**2 M / (2 n_chunks) multiply-adds, and O(N) memory beside one tile. For ``n_chunks > 1`` it copies
    one chunk of x at a time, or on "triton" as many small ones as fit a fixed size. On "sparse" only features that are
    active together are multiplied.

    References
    ----------
    .. [1] Korznikov et al., "OrtSAE: Orthogonal Sparse Autoencoders Uncover Atomic Features", arXiv:2509.22033.

    Examples
    --------
    >>> max_cosine_loss(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]))
    tensor(0.6000)
    """
    nearest = nearest_columns(x, n_chunks, dim=dim, generator=generator, backend=backend, precision=precision)
    return nearest.cosines.square().mean()


def nearest_columns(
    x: Tensor | SparseFeatures,
    n_chunks: int = 1,
    *,
    dim: int = 1,
    generator: torch.Generator | None = None,
    backend: BackendName = "auto",
    precision: Precision = "highest",
) -> NearestColumns:
    """The most similar other column of every column, by signed cosine, among all columns or those of its random chunk.

    Parameters
    ----------
    x, n_chunks, dim, generator, backend, precision
        As in `max_cosine_loss`.

    Returns
    -------
    NearestColumns
        ``cosines`` and ``partners`` of all N columns. ``cosines`` is differentiable in x, the choice of partners is
        not.

    Raises
    ------
    TypeError, ValueError
        As in `max_cosine_loss`.

    Examples
    --------
    >>> nearest = nearest_columns(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]))
    >>> nearest.partners
    tensor([2, 2, 0])
    >>> nearest.cosines
    tensor([0.8944, 0.4472, 0.8944])
    """
    check_features(x, dim)
    x = in_columns(x, dim)
    check_n_chunks(n_chunks, x.shape[1])
    check_generator(generator)
    check_word("precision", precision, Precision)
    chosen = resolve_backend(backend, x.device, is_sparse=not is_dense(x))
    permutation = None
    if n_chunks > 1:
        device = x.device if generator is None else generator.device
        permutation = torch.randperm(x.shape[1], generator=generator, device=device).to(x.device)
    if is_dense(x):
        cosines, partners, _ = custom_ops.max_cosine(x, permutation, int(n_chunks), precision, chosen)
    else:
        coordinates, _ = coordinates_of(x)
        cosines, partners, _ = sparse_ops.sparse_max_cosine(*coordinates, permutation, int(n_chunks))
    return NearestColumns(cosines, partners)


def _select(
    x: Tensor,
    query: Query,
    backend: str,
    priority: Tensor | None,
    state: Tensor | None,
    structural_zeros: bool = False,
) -> Selection:
    """Select among the columns of a dense x, and write the next state into the old one."""
    selection = Selection(*custom_ops.topk_pairs(x, *query, backend, priority, state, structural_zeros))
    if state is not None:
        state.copy_(selection.state)
    return selection


def _select_sparse(
    x: Coordinates, n_products: int, query: Query, priority: Tensor | None, *, is_ordered: bool
) -> Selection:
    """Select among the columns of a sparse x, of which at most `n_products` pairs meet."""
    size = min(query.k, n_products)
    return Selection(*sparse_ops.sparse_topk_pairs(*x, size, *query, priority, is_ordered))
