"""Pairs of features that are active together: the cost follows the non-zeros of x, whatever N is.

    cosine[i, j] = sum_m x_hat[m, i] * x_hat[m, j]    over the samples m (rows of x) in which both are active

A pair that never meets has cosine 0. All pairs that do meet are computed, one slab of products after the other, so the
selection needs no guess and takes one pass. With L0 active features in each of M samples there are M L0 (L0 - 1) / 2
products.

==============  ================================================================================
`coordinates`   the one form of a sparse x: checked, in order, scaled to unit columns
`products`      all pairs that meet and their cosines, in slabs, and the way back for the gradient
`selection`     the most similar of them
`max_cosine`    the most similar partner of each feature
`gradient`      the gradient of weighted cosines in the entries of x
`closed_form`   the sum of all squared cosines, and its gradient, without a list of pairs
`cost`          when a dense x takes less time here than as tiles
`backend`       all this behind the interface of every backend, for a dense x
==============  ================================================================================
"""
