"""Stores, packed matrices and their kernels, held to plain formulas: every kind, odd shapes, 1 … 8 rows and more."""

import pytest
import torch

from pumice.errors import PumiceError
from pumice.kernels import reference
from pumice.kernels.cpu.library import describe, library
from pumice.kernels.ops import Product
from pumice.kernels.pack import pack
from pumice.store import Store

KINDS = ["fp32", "bf16", "int8", "int4"]
SHAPES = [(1, 1), (3, 7), (5, 8), (4, 31), (6, 33), (9, 100), (130, 264), (2, 576)]
absent = describe().startswith("absent")
kernels = pytest.mark.skipif(absent, reason=describe())


def isas() -> list[str]:
    return ["portable"] if absent or not library().pumice_has_avx2() else ["avx2", "portable"]


def matrix(out: int, columns: int, share: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(out * 1000 + columns)
    weight, keep = torch.randn(out, columns, generator=g), torch.rand(out, columns, generator=g) < share
    keep[0] = False  # an empty row
    keep[-1] = True  # a full one
    return weight, keep


# ---- Store ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_nearest_of_255_steps_in_each_group(shape):
    weight, _ = matrix(*shape)
    store = Store.rounded(weight, "int8")
    for row, values in zip(weight, store.dense(), strict=True):
        for start in range(0, shape[1], 32):
            w = row[start : start + 32]
            scale = (w.abs().max() / 127).half().float()
            assert torch.equal(values[start : start + 32], (w / scale).round().clamp(-127, 127) * scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_takes_its_scale_from_the_weight_of_largest_magnitude(shape):
    weight, _ = matrix(*shape)
    store = Store.rounded(weight, "int4")
    for row, values in zip(weight, store.dense(), strict=True):
        for start in range(0, shape[1], 32):
            w = row[start : start + 32]
            scale = (w[w.abs().argmax()] / -8).half().float()
            assert torch.equal(values[start : start + 32], (w / scale).round().clamp(-8, 7) * scale)


def test_rounding_what_was_rounded_changes_nothing():
    weight, _ = matrix(9, 100)
    for kind in KINDS:
        once = Store.rounded(weight, kind).dense()
        torch.testing.assert_close(Store.rounded(once, kind).dense(), once, rtol=2e-3, atol=0)


def test_a_store_says_its_kind_and_counts_its_bytes():
    weight, _ = matrix(4, 33)
    bytes_of = {"fp32": 4 * 33 * 4, "bf16": 4 * 33 * 2, "int8": 4 * 33 + 4 * 2 * 2, "int4": 4 * 17 + 4 * 2 * 2}
    for kind in KINDS:
        store = Store.rounded(weight, kind)
        assert (store.kind, store.bytes) == (kind, bytes_of[kind])


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(PumiceError, match="int7"):
        Store.rounded(torch.ones(2, 2), "int7")
    with pytest.raises(PumiceError, match="NaN"):
        Store.rounded(torch.tensor([[1.0, torch.nan]]), "int8")
    with pytest.raises(PumiceError, match="too large"):
        Store.rounded(torch.tensor([[1e9]]), "int8")


# ---- Packed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_and_unpacking_is_exact(shape, kind):
    weight, keep = matrix(*shape)
    packed = pack(weight, keep, kind)
    assert torch.equal(packed.keep, keep)
    assert torch.equal(packed.dense(), Store.rounded(weight.masked_fill(~keep, 0), kind).dense())


def test_a_store_is_packed_without_rounding_again():
    weight, keep = matrix(6, 70)
    store = Store.rounded(weight, "int4")
    assert torch.equal(pack(store, keep).dense(), store.dense().masked_fill(~keep, 0))


def test_bytes_are_those_of_the_formula():
    weight, keep = torch.randn(64, 256), torch.zeros(64, 256, dtype=torch.bool)
    keep[:, ::2] = True
    for kind, bits in zip(KINDS, (32, 16, 8, 4), strict=True):
        spare = 16 * bits // 8 if kind == "int4" else 8 * bits // 8
        scales = 64 * 8 * 2 if bits < 16 else 0
        assert pack(weight, keep, kind).bytes == 64 * 128 * bits // 8 + 64 * 32 + scales + 65 * 4 + spare


def test_groups_of_other_sizes_are_refused():
    with pytest.raises(PumiceError, match="groups of 32"):
        pack(Store.rounded(torch.randn(2, 64), "int8", group=16), torch.ones(2, 64, dtype=torch.bool))


# ---- kernels -------------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_packed_product_is_the_dense_one_to_accumulation_order(shape, kind, isa):
    weight, keep = matrix(*shape)
    packed, bias = pack(weight, keep, kind), torch.randn(shape[0])
    product = Product(packed, bias, isa=isa)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 19):
        x = torch.randn(rows, shape[1])
        exact = x.double() @ packed.dense().double().T + bias
        torch.testing.assert_close(product(x).double(), exact, rtol=1e-5, atol=1e-5 * shape[1] ** 0.5)


@kernels
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_dense_product_of_stored_codes(shape, kind, isa):
    store = Store.rounded(matrix(*shape)[0], kind)
    product = Product(store, isa=isa)
    for rows in (1, 3, 8):
        x = torch.randn(rows, shape[1])
        torch.testing.assert_close(product(x), reference.linear(store, x), rtol=1e-5, atol=1e-5 * shape[1] ** 0.5)


@kernels
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_in_and_out(kind, isa):
    weight, keep = matrix(9, 100)
    packed, x = pack(weight, keep, kind), torch.randn(2, 3, 100, dtype=torch.bfloat16)
    torch.testing.assert_close(Product(packed, isa=isa)(x), reference.linear(packed, x), rtol=8e-3, atol=1e-5)


@kernels
@pytest.mark.parametrize("isa", isas())
def test_what_is_not_finite_stays_seen_as_in_dense(isa):
    weight, keep = matrix(5, 40)
    packed, x = pack(weight, keep, "fp32"), torch.randn(3, 40)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    finite = Product(packed, isa=isa)(x).isfinite()
    assert torch.equal(finite, (x @ packed.dense().T).isfinite())


@kernels
def test_threads_share_the_rows_without_a_gap():
    weight, keep = matrix(301, 512)
    keep[:200] = False  # nearly all of the weights lie in the last rows
    product, x = Product(pack(weight, keep)), torch.randn(2, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        both = product(x)
        torch.set_num_threads(1)
        assert torch.equal(both, product(x))
    finally:
        torch.set_num_threads(before)


@kernels
def test_inputs_that_are_views_and_batches_of_none():
    weight, keep = matrix(9, 33)
    packed = pack(weight, keep)
    x = torch.randn(33, 4).T
    torch.testing.assert_close(Product(packed)(x), x @ packed.dense().T)
    assert Product(packed)(x[:0]).shape == (0, 9)


@kernels
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_an_operator_of_the_dispatcher(kind):
    weight, keep = matrix(9, 100)
    product, x = Product(pack(weight, keep, kind), torch.randn(9)), torch.randn(2, 100)
    arguments = (x, *product.tensors, product.out, product.kind)
    torch.library.opcheck(torch.ops.pumice.linear.default, arguments)
    assert torch.equal(torch.ops.pumice.linear(*arguments), product(x))
