"""The ops for features that are spread over the processes of a `torch.distributed` group.

Each rank calls an op with its own columns of x, ``[M, N_local]``, in the order of ranks; all call it with the same
other arguments. What is selected is what one process selects among all the columns. The loss is the same number on
every rank, and its backward pass, which all of them must run, gives each the gradient of its own columns.
"""

from topk_ortho.distributed.ops import largest_cosines, max_cosine_loss, topk_ortho_loss, topk_pairs

__all__ = ["largest_cosines", "max_cosine_loss", "topk_ortho_loss", "topk_pairs"]
