"""Sums over the samples of products of the values that meet there: expand, sum runs, and spread back to the entries.

    sum[i, j] = sum_m value[m, i] * value[m, j],    features i < j, over the samples m that hold both

An *entry* is a (sample, feature, value). The entries of a sample are consecutive, in the order of their features. A
product pairs an entry with one that follows it in its sample; all products of an entry are consecutive. The caller cuts
the products into slabs and sorts them by pair between the first step and the second. It may also hand over a transposed
matrix, where samples and features change places.

Nothing is added atomically: every number is the sum of one program in a fixed order, in float64.
"""

import triton
import triton.language as tl
from torch import Tensor

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
    _coactivation_products_kernel[(entries.numel(),)](
        entries, starts, features, values, keys, products, first_feature, n_features, BLOCK=_BLOCK_ENTRY, num_warps=1,
        enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _coactivation_sums_kernel(
    keys_ptr, products_ptr,     # [n] int32 or int64 >= 0, sorted; [n] floating
    sums_ptr,                   # [n] floating
    n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < n
    key = tl.load(keys_ptr + place, mask=mask, other=-1)
    going = mask & (key != tl.load(keys_ptr + place - 1, mask=mask & (place > 0), other=-1))
    following = place
    total = tl.zeros((BLOCK,), tl.float64)
    while tl.max(going.to(tl.int32), axis=0) > 0:
        total += tl.load(products_ptr + following, mask=going, other=0.0).to(tl.float64)
        following += 1
        going = going & (tl.load(keys_ptr + following, mask=going & (following < n), other=-1) == key)
    tl.store(sums_ptr + place, total.to(sums_ptr.dtype.element_ty), mask=mask)


def coactivation_sums(keys: Tensor, products: Tensor, sums: Tensor) -> None:
    """Write the sum of the products of every run of equal keys at the first place of the run, and 0 at the others."""
    n = keys.numel()
    _coactivation_sums_kernel[(triton.cdiv(n, _BLOCK_PRODUCT),)](
        keys, products, sums, n, BLOCK=_BLOCK_PRODUCT, num_warps=4, enable_fp_fusion=True
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
    _coactivation_spread_kernel[(values.numel(),)](
        first_product, first_weights, second_weights, begins, stops, ends, values, out, BLOCK=_BLOCK_ENTRY,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
