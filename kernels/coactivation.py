"""Sums over groups of products of the values that meet there: expand, (sort,) sum runs, and back to the entries.

    sum[i, j] = sum_g value[g, i] * value[g, j],    i < j

An *entry* is a (group, member, value); the entries of a group are consecutive, members ascending. A product pairs an
entry with one that follows it in its group. All products of an entry are consecutive, from its first product on. How
products are cut into slabs and sorted by pair is up to the caller, `topk_ortho.backends.coactivation`.

Nothing is added atomically: every number is the sum of one program in a fixed order, in float64.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ENTRY = 64  # entries of a group at a step: of an SAE's sample, few more are active
_BLOCK_PRODUCT = 128


@triton.jit
def _coactivation_products_kernel(
    entries_ptr, starts_ptr,    # [e] int64, [e + 1] int64
    members_ptr, values_ptr,    # [n] int64, [n] floating
    keys_ptr, products_ptr,     # [products] int32 or int64, [products] floating
    first_member, n_members,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    entry = tl.load(entries_ptr + place)
    start = tl.load(starts_ptr + place)
    n_partners = (tl.load(starts_ptr + place + 1) - start).to(tl.int32)
    first_key = (tl.load(members_ptr + entry) - first_member) * n_members
    value = tl.load(values_ptr + entry)
    for step in range(0, n_partners, BLOCK):
        offs = step + tl.arange(0, BLOCK)
        mask = offs < n_partners
        partner = entry + 1 + offs
        member = tl.load(members_ptr + partner, mask=mask, other=0)
        product = value * tl.load(values_ptr + partner, mask=mask, other=0.0)
        tl.store(keys_ptr + start + offs, (first_key + member).to(keys_ptr.dtype.element_ty), mask=mask)
        tl.store(products_ptr + start + offs, product, mask=mask)


def coactivation_products(
    entries: Tensor, starts: Tensor, members: Tensor, values: Tensor, first_member: int, n_members: int, keys: Tensor,
    products: Tensor,
) -> None:  # fmt: skip
    """Write products of the given entries with those that follow them, and keys of their pairs.

    A key is ``(first - first_member) * n_members + second``, which the dtype of `keys` must hold.

    The products of ``entries[i]`` are at ``starts[i]`` up to ``starts[i + 1]``, which must be as many as follow it.
    """
    _coactivation_products_kernel[(entries.numel(),)](
        entries, starts, members, values, keys, products, first_member, n_members, BLOCK=_BLOCK_ENTRY, num_warps=1,
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
    """Write at the first place of every run of equal keys the sum of its products, elsewhere 0."""
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
    tl.store(out_ptr + entry, tl.load(out_ptr + entry) + tl.sum(total, axis=0))


def coactivation_spread(
    first_product: Tensor, first_weights: Tensor, second_weights: Tensor, begins: Tensor, stops: Tensor, ends: Tensor,
    values: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Add to out [n] for each entry the weighted values of those that it meets in its group.

    `first_product` is where the products of an entry start, -1 if it has none among the weights. In a product the first
    entry sees its first weight times the value of the second, and the other way round. Of the entries before it in its
    group, those from `begins` up to `stops`, at most itself, have products among the weights; the group is over at
    `ends`.
    """
    _coactivation_spread_kernel[(values.numel(),)](
        first_product, first_weights, second_weights, begins, stops, ends, values, out, BLOCK=_BLOCK_ENTRY,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
