"""What users get wrong: the error names the argument, what came and what is allowed."""

import numpy as np
import pytest
import torch

from tests.inputs import normal
from topk_ortho import available_backends, initial_state, max_cosine_loss, topk_ortho_loss, topk_pairs

X = normal(6, 10)
OPS = [topk_pairs, topk_ortho_loss, max_cosine_loss]
TOPK_OPS = [topk_pairs, topk_ortho_loss]

BAD_X = {
    "not_a_tensor": (np.ones((3, 4)), TypeError, r"x must be a torch\.Tensor or SparseFeatures, got ndarray"),
    "none": (None, TypeError, r"x must be a torch\.Tensor or SparseFeatures, got NoneType None"),
    "1d": (torch.ones(4), ValueError, r"x must be 2-D \[M, N\] with features in columns, got shape \[4\]"),
    "3d": (torch.ones(2, 3, 4), ValueError, r"x must be 2-D .* got shape \[2, 3, 4\]"),
    "0d": (torch.tensor(1.0), ValueError, r"x must be 2-D .* got shape \[\]"),
    "one_column": (torch.ones(4, 1), ValueError, r"x must have at least 1 row and 2 columns, got shape \[4, 1\]"),
    "no_column": (torch.ones(4, 0), ValueError, r"at least 1 row and 2 columns, got shape \[4, 0\]"),
    "no_row": (torch.ones(0, 4), ValueError, r"at least 1 row and 2 columns, got shape \[0, 4\]"),
    "int": (torch.ones(3, 4, dtype=torch.int64), TypeError, r"x must have dtype float16, .* got torch\.int64"),
    "bool": (torch.ones(3, 4, dtype=torch.bool), TypeError, r"x must have dtype .* got torch\.bool"),
    "complex": (torch.ones(3, 4, dtype=torch.complex64), TypeError, r"x must have dtype .* got torch\.complex64"),
    "float8": (torch.ones(3, 4).to(torch.float8_e4m3fn), TypeError, r"x must have dtype .* got torch\.float8_e4m3fn"),
}

BAD_ARGUMENTS = {
    "fraction_zero": ({"fraction": 0}, ValueError, r"fraction must be in \(0, 1\], got 0"),
    "fraction_negative": ({"fraction": -0.5}, ValueError, r"fraction must be in \(0, 1\], got -0\.5"),
    "fraction_above_one": ({"fraction": 1.5}, ValueError, r"fraction must be in \(0, 1\], got 1\.5"),
    "fraction_nan": ({"fraction": float("nan")}, ValueError, r"fraction must be in \(0, 1\], got nan"),
    "fraction_word": ({"fraction": "0.1"}, TypeError, r"fraction must be a number, got str '0\.1'"),
    "fraction_bool": ({"fraction": True}, TypeError, r"fraction must be a number, got bool True"),
    "fraction_huge": ({"fraction": 10**400}, ValueError, r"fraction must be in \(0, 1\]"),
    "fraction_none": ({"fraction": None}, TypeError, r"fraction must be a number, got NoneType"),
    "fraction_tensor": (
        {"fraction": torch.tensor(0.1)},
        TypeError,
        r"fraction must be a number, got a tensor of dtype",
    ),
    "k_zero": ({"k": 0}, ValueError, r"k must be in \[1, 45\], the pairs of 10 columns; got 0"),
    "k_negative": ({"k": -1}, ValueError, r"k must be in \[1, 45\].* got -1"),
    "k_above_all": ({"k": 46}, ValueError, r"k must be in \[1, 45\], the pairs of 10 columns; got 46"),
    "k_float": ({"k": 3.0}, TypeError, r"k must be an integer, got float 3\.0"),
    "k_bool": ({"k": True}, TypeError, r"k must be an integer, got bool True"),
    "k_tensor": ({"k": torch.tensor(3)}, TypeError, r"k must be an integer, got a tensor of dtype torch\.int64"),
    "tau_one": ({"tau": 1.0}, ValueError, r'tau must be None, "adaptive" or a number in \[0, 1\), got 1\.0'),
    "tau_negative": ({"tau": -0.1}, ValueError, r"tau must be .* number in \[0, 1\), got -0\.1"),
    "tau_nan": ({"tau": float("nan")}, ValueError, r"tau must be .* got nan"),
    "tau_word": ({"tau": "adaptative"}, ValueError, r"tau must be None, \"adaptive\" or .* got 'adaptative'"),
    "tau_bool": ({"tau": False}, TypeError, r"tau must be a number, got bool False"),
    "tau_list": ({"tau": [0.1]}, TypeError, r"tau must be a number, got list \[0\.1\]"),
    "n_std_infinite": ({"n_std": float("inf")}, ValueError, r"n_std must be finite, got inf"),
    "n_std_nan": ({"n_std": float("nan"), "tau": "adaptive"}, ValueError, r"n_std must be finite, got nan"),
    "n_std_word": ({"n_std": "1"}, TypeError, r"n_std must be a number, got str '1'"),
    "similarity": ({"similarity": "cos"}, ValueError, r"similarity must be one of 'abs', 'positive', got 'cos'"),
    "state_list": ({"state": [0.0] * 3}, TypeError, r"state must come from topk_ortho\.initial_state\(\).* got list"),
    "state_shape": ({"state": torch.zeros(4)}, TypeError, r"state must come from .* shape \[4\]"),
    "state_int": ({"state": torch.zeros(3, dtype=torch.int64)}, TypeError, r"state must come from .* torch\.int64"),
    "state_grad": ({"state": initial_state().requires_grad_()}, ValueError, r"state is updated in place, so it must"),
    "state_expanded": ({"state": torch.zeros(1).expand(3)}, ValueError, r"state is updated in place, so it must own"),
    "state_device": ({"state": initial_state("meta")}, ValueError, r"state must be on the device of x, cpu; got meta"),
}

BAD_COMMON = {
    "precision": ({"precision": "tf32"}, ValueError, r"precision must be one of 'highest', .* got 'tf32'"),
    "precision_array": ({"precision": np.array(["high", "medium"])}, ValueError, r"precision must .* got array"),
    "precision_none": ({"precision": None}, ValueError, r"precision must be one of .* got None"),
    "backend_unknown": (
        {"backend": "cuda"}, ValueError, r"""backend must be "auto" or one of \[.*'tiled'.*\], got 'cuda': there""",
    ),
    "backend_none": ({"backend": None}, ValueError, r"backend must be .* got None"),
    "backend_list": ({"backend": ["tiled"]}, (TypeError, ValueError), r"backend must be"),
}  # fmt: skip

BAD_PRIORITY = {
    "priority_short": (torch.ones(9), ValueError, r"priority must have shape \[10\], one number a feature; got \[9\]"),
    "priority_2d": (torch.ones(10, 1), ValueError, r"priority must have shape \[10\].* got \[10, 1\]"),
    "priority_number": (3.0, ValueError, r"priority must have shape \[10\].* got \[\]"),
    "priority_complex": (torch.ones(10) + 0j, TypeError, r"priority must hold real .* torch\.complex64"),
    "priority_nan": (torch.tensor([1, torch.nan] * 5), ValueError, r"priority has 5 NaN; every column needs a number"),
    "priority_uint16": (torch.ones(10, dtype=torch.uint16), TypeError, r"priority must hold real .* torch\.uint16"),
    "priority_sparse": (torch.ones(10).to_sparse(), TypeError, r"priority must be a dense tensor with data"),
    "priority_meta": (torch.ones(10, device="meta"), TypeError, r"priority must be a dense tensor with data"),
    "priority_words": (["a"] * 10, (TypeError, ValueError), r"priority must"),
}  # fmt: skip

BAD_MAX_COSINE = {
    "n_chunks_zero": ({"n_chunks": 0}, ValueError, r"n_chunks must be in \[1, 5\], two columns to a chunk .*; got 0"),
    "n_chunks_above_half": ({"n_chunks": 6}, ValueError, r"n_chunks must be in \[1, 5\].* got 6"),
    "n_chunks_float": ({"n_chunks": 2.0}, TypeError, r"n_chunks must be an integer, got float 2\.0"),
    "n_chunks_bool": ({"n_chunks": True}, TypeError, r"n_chunks must be an integer, got bool True"),
    "generator_seed": ({"generator": 3}, TypeError, r"generator must be a torch\.Generator or None, got int 3"),
}  # fmt: skip


def table(cases):
    return pytest.mark.parametrize(("bad", "error", "message"), cases.values(), ids=cases)


@pytest.mark.quick
@pytest.mark.parametrize("op", OPS)
@table(BAD_X)
def test_x(op, bad, error, message):
    with pytest.raises(error, match=message):
        op(bad)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("op", OPS)
def test_nested_x(op):
    with pytest.raises(TypeError, match="x must be a dense or sparse tensor, got a nested one"):
        op(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


@pytest.mark.quick
@pytest.mark.parametrize("op", TOPK_OPS)
@table(BAD_ARGUMENTS)
def test_selection_arguments(op, bad, error, message):
    with pytest.raises(error, match=message):
        op(X, **bad)


@pytest.mark.parametrize("op", OPS)
@table(BAD_COMMON)
def test_common_arguments(op, bad, error, message):
    with pytest.raises(error, match=message):
        op(X, **bad)


@pytest.mark.parametrize("op", [topk_pairs, topk_ortho_loss])
@table(BAD_PRIORITY)
def test_priority(bad, error, message, op):
    with pytest.raises(error, match=message):
        op(X, k=5, priority=bad)


@table(BAD_MAX_COSINE)
def test_max_cosine_arguments(bad, error, message):
    with pytest.raises(error, match=message):
        max_cosine_loss(X, **bad)


@pytest.mark.parametrize("bad", ["avg", None, "none"])
def test_reduction(bad):
    with pytest.raises(ValueError, match=rf"reduction must be one of 'mean', 'sum', got {bad!r}"):
        topk_ortho_loss(X, reduction=bad)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["triton", "sparse"])
def test_unavailable_backend_says_why(op, name):
    if name in available_backends():
        pytest.skip(f"{name} runs here")
    with pytest.raises(
        ValueError, match=rf"""backend must be "auto" or one of \['naive', 'tiled'.*\], got '{name}': .+"""
    ):
        op(X, backend=name)


# the two ops that select pairs look for NaN and Inf in the same place
@pytest.mark.parametrize("op", [topk_pairs, max_cosine_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nan(op, dtype, small_backend):
    x = normal(6, 40, dtype=dtype)
    x[2, 7] = torch.nan
    with pytest.raises(ValueError, match=r"x has 1 column with NaN or Inf: 7$"):
        op(x, backend=small_backend)


@pytest.mark.parametrize(
    ("columns", "value", "message"),
    [
        pytest.param([0, 39], torch.inf, r"x has 2 columns with NaN or Inf: 0, 39$", id="two_inf"),
        pytest.param([3], -torch.inf, r"x has 1 column with NaN or Inf: 3$", id="minus_inf"),
        pytest.param(
            range(10), torch.nan, r"x has 10 columns with NaN or Inf: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9$", id="ten"
        ),
        pytest.param(
            range(5, 17), torch.nan, r"x has 12 columns .* 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, \.\.\.$", id="twelve"
        ),
    ],
)
def test_non_finite_columns_are_named(columns, value, message, small_backend):
    x = normal(6, 40)
    x[2, list(columns)] = value
    with pytest.raises(ValueError, match=message):
        topk_pairs(x, backend=small_backend)


@pytest.mark.parametrize("op", [topk_pairs, max_cosine_loss])
def test_non_finite_beside_huge(op, small_backend):
    x = normal(6, 40)
    x[:, 4], x[:, 5] = 1e30, 2e38  # the square of one overflows, the norm of the other does
    x[0, 9] = torch.nan
    with pytest.raises(ValueError, match=r"x has 1 column with NaN or Inf: 9$"):
        op(x, backend=small_backend)
    x[0, 9] = 0
    with pytest.raises(ValueError, match=r"x has 1 column whose norm is too large for torch\.float32: 5; scale x down"):
        op(x, backend=small_backend)


@pytest.mark.parametrize("integer", [np.int64(7), np.int32(7)], ids=["int64", "int32"])
def test_numpy_numbers_are_numbers(integer):
    assert topk_pairs(X, k=integer).k == 7
    assert torch.equal(topk_ortho_loss(X, k=integer), topk_ortho_loss(X, k=7))
    assert torch.equal(topk_ortho_loss(X, np.float32(0.5), tau=np.float64(0.1)), topk_ortho_loss(X, 0.5, tau=0.1))
    assert torch.equal(max_cosine_loss(X, np.int64(1)), max_cosine_loss(X, 1))


def test_numpy_fractions_count_in_float64():
    x = normal(2, 300)
    for fraction in (np.float32(1e-3), np.float16(1e-3), np.float16(1)):
        assert topk_pairs(x, fraction).k == topk_pairs(x, float(fraction)).k


def test_state_from_inference_mode_is_refused_outside_it():
    with torch.inference_mode():
        state = initial_state()
        topk_pairs(X, state=state)
    with pytest.raises(ValueError, match=r"state is updated in place.* not come from inference mode"):
        topk_pairs(X, state=state)


def test_priority_is_taken_as_it_is_now():
    x = X.clone().requires_grad_()
    priority = np.arange(10)
    loss = topk_ortho_loss(x, k=5, priority=priority)
    priority[:] = 0
    (gradient,) = torch.autograd.grad(loss, x)
    expected = torch.autograd.grad(topk_ortho_loss(x, k=5, priority=torch.arange(10)), x)[0]
    assert torch.equal(gradient, expected)


def test_the_limits_are_allowed():
    assert topk_pairs(X, k=45).rows.numel() == topk_pairs(X, fraction=1).rows.numel() == 45
    assert topk_pairs(X, k=1).rows.numel() == 1
    topk_pairs(X, tau=0)
    topk_pairs(X, tau=0.9999999)
    max_cosine_loss(X, 5)
