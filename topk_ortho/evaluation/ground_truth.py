"""How well a dictionary recovers true features that are known, and where it absorbs a parent into its children."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from topk_ortho.activations.true_features import TrueFeatures


@torch.no_grad()
def ground_truth_metrics(
    W_dec: Tensor, features: Tensor, truth: TrueFeatures, coefficients: Tensor, *, min_samples: int = 10
) -> dict[str, float | None]:
    r"""Agreement of a dictionary with the true features, and absorption; all tensors are on one device.

    Features are matched to true ones one to one, so that the sum of the cosines of their directions is largest. A true
    feature that is left without one has cosine 0 and a feature that never fires.

    Parameters
    ----------
    W_dec : Tensor, shape [n_features, d_in]
        Decoder directions, of any length.
    features : Tensor, shape [n, n_features]
        Feature activations of n samples; above 0 is firing.
    truth : TrueFeatures
        The true features.
    coefficients : Tensor, shape [n, n_true]
        Amounts of the true features in the same samples; above 0 is on.
    min_samples : int, default 10
        A parent and its child count for absorption only if the child is on, and the parent alone, in so many samples,
        and in at least one.

    Returns
    -------
    dict of str to float or None
        - ``mcc``, ``mcc_parent``, ``mcc_child``: mean matched cosine of all true features, of parents, of children;
        - ``f1``: mean over true features of the F1 score of firing against being on;
        - ``parent_recall``, ``child_recall``: mean over parents, over children, of P(feature fires | true feature on);
        - ``uniqueness``: number of true features that are some feature's closest, by \|cosine\|, over n_features: 1
          if no two features have the same one [1]_;
        - ``absorption_rate``: mean over pairs of parent and child of P(parent's feature is silent | child on);
        - ``excess_absorption``: that minus P(parent's feature is silent | parent on without a child), over the same
          pairs: the plain rate counts ordinary misses too;
        - ``absorption_rate_level_1``, ``excess_absorption_level_1``, ``..._2`` and so on: the same over the children of
          that level alone, if there are several levels.

        A child that has children counts as a parent and as a child. True features that are never on are left out of
        f1 and the recalls. A mean over nothing (no parents, too few samples) is None.

    References
    ----------
    .. [1] SynthSAEBench, arXiv:2602.14687, whose measure it is.
    """
    on = coefficients > 0
    cosine = normalize(truth.directions, dim=1) @ normalize(W_dec.float(), dim=1).T
    assignment = linear_sum_assignment(cosine.cpu().numpy(), maximize=True)
    matched, own = (torch.from_numpy(numbers).to(cosine.device) for numbers in assignment)
    matched_cosine = cosine.new_zeros(on.shape[1]).index_copy(0, matched, cosine[matched, own])
    fires = torch.zeros_like(on).index_copy(1, matched, features[:, own] > 0)

    n_on, n_both = on.sum(dim=0), (fires & on).sum(dim=0)
    f1 = 2 * n_both / (n_on + fires.sum(dim=0))
    recall = n_both / n_on

    children = truth.is_child.nonzero().squeeze(1)
    parents = truth.parent[children]
    has_child = on.new_zeros(on.shape, dtype=torch.int32).index_add(1, parents, on[:, children].int()) > 0
    alone = (on & ~has_child)[:, parents]
    child_on, silent = on[:, children], ~fires[:, parents]
    n_child_on, n_alone = child_on.sum(dim=0), alone.sum(dim=0)
    absorption = (child_on & silent).sum(dim=0) / n_child_on
    missed = (alone & silent).sum(dim=0) / n_alone
    enough = torch.minimum(n_child_on, n_alone) >= max(1, min_samples)

    closest = cosine.abs().argmax(dim=0)
    parts = {
        "mcc": matched_cosine,
        "mcc_parent": matched_cosine[truth.is_parent],
        "mcc_child": matched_cosine[truth.is_child],
        "f1": f1[n_on > 0],
        "parent_recall": recall[truth.is_parent & (n_on > 0)],
        "child_recall": recall[truth.is_child & (n_on > 0)],
        "absorption_rate": absorption[enough],
        "excess_absorption": (absorption - missed)[enough],
    }
    level = truth.level[children]
    levels = level.unique().tolist()
    for number in levels if len(levels) > 1 else []:
        is_meant = enough & (level == number)
        parts[f"absorption_rate_level_{number}"] = absorption[is_meant]
        parts[f"excess_absorption_level_{number}"] = (absorption - missed)[is_meant]
    means = {name: part.mean().item() if part.numel() else None for name, part in parts.items()}
    return means | {"uniqueness": closest.unique().numel() / W_dec.shape[0]}
