"""Sums over the samples of products of the values that meet there: expand, sum runs, and spread back to the entries.

    sum[i, j] = sum_m value[m, i] * value[m, j],    features i < j, over the samples m that hold both

An *entry* is a (sample, feature, value). The entries of a sample are consecutive, in the order of their features. A
product pairs an entry with one that follows it in its sample; all products of an entry are consecutive. The caller cuts
the products into slabs and sorts them by pair between the first step and the second. It may also hand over a transposed
matrix, where samples and features change places.

Sorted products of a pair are a *run*. Two features that are active in every sample have a run as long as the batch, so
the places are cut into blocks: each block sums what it has of every run, and then the sums of a run that is in several
blocks are added up. Nothing is added atomically: every sum has a fixed order, and is float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_ortho.kernels.launch import launch

_BLOCK_ENTRY = 64  # entries of a sample at a step; few SAEs have more features active in a sample
_BLOCK_PRODUCT = 128


@triton.jit
def _coactivation_products_kernel(
    entries_ptr, starts_ptr,    # [e] int64, [e + 1] int64
    features_ptr, values_ptr,    # [n] int64, [n] floating
    keys_ptr, products_ptr,     # [products] int32 or int64, [products] floating
    first_feature, n_features,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    entry = tl.load(entries_ptr + place)
    start = tl.load(starts_ptr + place)
    n_partners = (tl.load(starts_ptr + place + 1) - start).to(tl.int32)
    first_key = (tl.load(features_ptr + entry) - first_feature) * n_features
    value = tl.load(values_ptr + entry)
    for step in range(0, n_partners, BLOCK):
        offs = step + tl.arange(0, BLOCK)
        mask = offs < n_partners
        partner = entry + 1 + offs
        feature = tl.load(features_ptr + partner, mask=mask, other=0)
        product = value * tl.load(values_ptr + partner, mask=mask, other=0.0)
        tl.store(keys_ptr + start + offs, (first_key + feature).to(keys_ptr.dtype.element_ty), mask=mask)
        tl.store(products_ptr + start + offs, product, mask=mask)


def coactivation_products(
    entries: Tensor, starts: Tensor, features: Tensor, values: Tensor, first_feature: int, n_features: int,
    keys: Tensor, products: Tensor,
) -> None:  # fmt: skip
    """Write the products of the given entries with those that follow them in their sample, and the keys of their pairs.

    A key is ``(feature - first_feature) * n_features + second feature``, which the dtype of `keys` must hold. The
    products of ``entries[i]`` go to the places from ``starts[i]`` to ``starts[i + 1]``, as many as entries follow it.
    """
    launch(
        _coactivation_products_kernel, (entries.numel(),),
        entries, starts, features, values, keys, products, first_feature, n_features, BLOCK=_BLOCK_ENTRY, num_warps=1,
        enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _add_within_run(sum_after, key_after, product, key):
    """A step of a scan from right to left: the sum from a place to the end of its run, and the key of the run.

    Keys are sorted, so places of equal keys have no other key between them, which makes the step associative.
    """
    return tl.where(key_after == key, sum_after + product, product), key


@triton.jit
def _coactivation_sums_kernel(
    keys_ptr, products_ptr,     # [n] int32 or int64 >= 0, sorted; [n] floating
    sums_ptr, leading_ptr,      # [n] floating, [n_blocks] float64
    n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    place = block * BLOCK + offs
    mask = place < n
    key = tl.load(keys_ptr + place, mask=mask, other=-1)
    is_first = key != tl.load(keys_ptr + place - 1, mask=mask & (place > 0), other=-1)
    product = tl.load(products_ptr + place, mask=mask, other=0.0).to(tl.float64)
    total, _ = tl.associative_scan((product, key), 0, _add_within_run, reverse=True)
    tl.store(sums_ptr + place, tl.where(is_first, total, 0.0).to(sums_ptr.dtype.element_ty), mask=mask)
    tl.store(leading_ptr + block, tl.sum(tl.where(offs == 0, total, 0.0), axis=0))


def coactivation_sums(keys: Tensor, products: Tensor, sums: Tensor) -> Tensor:
    """Write what each block of places has of each run of equal keys; `coactivation_long_sums` must follow.

    At the first place of a run `sums` receives the sum up to the end of the run or of the block, at the others 0. What
    each block has of the run that its first place belongs to is returned, float64 [n_blocks].
    """
    n_blocks = triton.cdiv(keys.numel(), _BLOCK_PRODUCT)
    leading = torch.empty(n_blocks, dtype=torch.float64, device=keys.device)
    launch(
        _coactivation_sums_kernel,
        (n_blocks,),
        keys,
        products,
        sums,
        leading,
        keys.numel(),
        BLOCK=_BLOCK_PRODUCT,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return leading


@triton.jit
def _coactivation_long_sums_kernel(
    keys_ptr, products_ptr,     # [n] int32 or int64 >= 0, sorted; [n] floating
    leading_ptr, sums_ptr,      # [n_blocks] float64, [n] floating
    n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    end = (block + 1) * BLOCK
    key = tl.load(keys_ptr + end - 1, mask=end < n, other=-1)
    if tl.load(keys_ptr + end, mask=end < n, other=-2) != key:
        return  # no run goes on beyond this block
    place = block * BLOCK + tl.arange(0, BLOCK)
    in_run = tl.load(keys_ptr + place) == key
    first = end - tl.sum(in_run.to(tl.int32), axis=0)
    if tl.load(keys_ptr + first - 1, mask=first > 0, other=-1) == key:
        return  # the run began in an earlier block, whose program sums it
    total = tl.load(products_ptr + place, mask=in_run, other=0.0).to(tl.float64)
    following = block + 1 + tl.arange(0, BLOCK)
    begin = following * BLOCK
    going = tl.load(keys_ptr + begin, mask=begin < n, other=-1) == key
    while tl.max(going.to(tl.int32), axis=0) > 0:
        total += tl.load(leading_ptr + following, mask=going, other=0.0)
        following += BLOCK
        begin = following * BLOCK
        going = tl.load(keys_ptr + begin, mask=begin < n, other=-1) == key
    tl.store(sums_ptr + first, tl.sum(total, axis=0).to(sums_ptr.dtype.element_ty))


def coactivation_long_sums(keys: Tensor, products: Tensor, leading: Tensor, sums: Tensor) -> None:
    """Write to `sums` the sum of every run that is in more than one block, at the first place of the run.

    Then `sums` holds the sum of the products of every run at its first place, and 0 at the others.
    """
    launch(
        _coactivation_long_sums_kernel,
        (leading.numel(),),
        keys,
        products,
        leading,
        sums,
        keys.numel(),
        BLOCK=_BLOCK_PRODUCT,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
def _coactivation_spread_kernel(
    first_product_ptr,                      # [n] int64, -1 where there is none
    first_weights_ptr, second_weights_ptr,  # [products] floating x 2
    begins_ptr, stops_ptr, ends_ptr,        # [n] int64 x 3
    values_ptr,                             # [n] floating
    out_ptr,                                # [n] float64
    BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    begin = tl.load(begins_ptr + entry)
    n_before = (tl.load(stops_ptr + entry) - begin).to(tl.int32)
    last_before = (entry - begin - 1).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float64)
    for step in range(0, n_before, BLOCK):
        offs = step + tl.arange(0, BLOCK)
        mask = offs < n_before
        start = tl.load(first_product_ptr + begin + offs, mask=mask, other=0)
        weight = tl.load(second_weights_ptr + start + (last_before - offs), mask=mask, other=0.0)
        total += weight.to(tl.float64) * tl.load(values_ptr + begin + offs, mask=mask, other=0.0)
    start = tl.load(first_product_ptr + entry)
    n_after = (tl.load(ends_ptr + entry) - entry - 1).to(tl.int32)
    n_after = tl.where(start >= 0, n_after, 0)
    for step in range(0, n_after, BLOCK):
        offs = step + tl.arange(0, BLOCK)
        mask = offs < n_after
        weight = tl.load(first_weights_ptr + start + offs, mask=mask, other=0.0)
        total += weight.to(tl.float64) * tl.load(values_ptr + entry + 1 + offs, mask=mask, other=0.0)
    so_far = tl.load(out_ptr + entry)
    tl.debug_barrier()  # all threads load it, and one of them stores it
    tl.store(out_ptr + entry, so_far + tl.sum(total, axis=0))


def coactivation_spread(
    first_product: Tensor, first_weights: Tensor, second_weights: Tensor, begins: Tensor, stops: Tensor, ends: Tensor,
    values: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Add to each entry of `out` [n] the values of the entries that it meets in its sample, times weights.

    In a product of two entries, the first one receives its first weight times the value of the second, and the second
    one its second weight times the value of the first. `first_product` is the place of an entry's first product, -1 if
    it has none in this slab. Of the entries before it in its sample, those from `begins` up to `stops` have products in
    this slab. `ends` is where the sample ends.
    """
    launch(
        _coactivation_spread_kernel, (values.numel(),),
        first_product, first_weights, second_weights, begins, stops, ends, values, out, BLOCK=_BLOCK_ENTRY,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
