"""The first k pairs of the order among what all ranks have kept: counted, not gathered.

The k-th similarity is found digit by digit, from the highest 8 bits down. At each digit the ranks add up how many of
their similarities have which value there, so that the one that holds the k-th is known exactly. Where more pairs tie at
the k-th similarity than are wanted, the index of the last one is found in the same way.
"""

import torch
from torch import Tensor

from topk_ortho.definitions import integers_in_order, numbers_in_order
from topk_ortho.distributed.ranks import Ranks

_DIGIT = 8
"""Bits that are counted at a time"""


def first_of_all(similarity: Tensor, index: Tensor, count: int, ranks: Ranks) -> Tensor:
    """Which pairs [n] of this rank are among the first `count` of all ranks, which have at least as many together.

    `similarity` [n] and `index` [n] are those of the pairs of this rank.
    """
    keys = integers_in_order(similarity)
    bits = 8 * keys.element_size()
    keys = keys.long()
    last_key, n_larger, n_equal = _at_rank(keys, count, bits, ranks)
    if n_larger + n_equal == count:
        return keys >= last_key
    reversed_index = ~index
    last_reversed, _, _ = _at_rank(reversed_index[keys == last_key], count - n_larger, 64, ranks)
    return (keys > last_key) | ((keys == last_key) & (reversed_index >= last_reversed))


class RankedSimilarities:
    """The similarities of all ranks in descending order, of which single ones are looked up by all ranks together."""

    def __init__(self, similarity: Tensor, ranks: Ranks):
        self._keys = integers_in_order(similarity)
        self._ranks = ranks
        self._count = int(ranks.sum(torch.tensor(similarity.numel(), device=similarity.device)))

    def numel(self) -> int:
        """How many there are."""
        return self._count

    def __getitem__(self, position: int) -> Tensor:
        """The similarity at a position, from 0."""
        key, _, _ = _at_rank(self._keys.long(), position + 1, 8 * self._keys.element_size(), self._ranks)
        return numbers_in_order(self._keys.new_tensor(key))


def _at_rank(keys: Tensor, rank: int, bits: int, ranks: Ranks) -> tuple[int, int, int]:
    """The key at a rank, from 1, of those of all processes in descending order; how many are larger, how many equal.

    `keys` are int64 of which so many `bits` are used.
    """
    n_larger, n_equal, key = 0, 0, 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        digits = keys >> shift
        # the highest digit has the sign
        digits = digits + 2 ** (_DIGIT - 1) if shift == bits - _DIGIT else digits & (2**_DIGIT - 1)
        counts = ranks.sum(torch.bincount(digits, minlength=2**_DIGIT))
        n_from = counts.flip(0).cumsum(0)  # how many have at least the digit 2 ** 8 - 1 - i
        position = int(torch.searchsorted(n_from, torch.tensor(rank - n_larger, device=keys.device)))
        if position:
            n_larger += int(n_from[position - 1])
        digit = 2**_DIGIT - 1 - position
        n_equal = int(counts[digit])
        keys = keys[digits == digit]
        key = digit - 2 ** (_DIGIT - 1) if shift == bits - _DIGIT else (key << _DIGIT) | digit
    return key, n_larger, n_equal
