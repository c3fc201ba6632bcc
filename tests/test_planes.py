"""Planes of bits: as many of each column as the entry that it meets is worth."""

import itertools
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

import pumice
from pumice.errors import PumiceError
from pumice.eval.speed import decode_bytes
from pumice.forms import Levels, Magnitude, Select
from pumice.kernels.planes import BitPlanes, Grid, ReadPlanes
from pumice.methods.token.planes import Planes
from pumice.methods.token.teal import Teal
from pumice.plan import Plan
from test_token import CALIBRATION, DENSE_FAMILIES, IDS, fast, linears, logits, seen, sparse, steps, whole_and_decoded
from tiny import FAMILIES, tiny


def on_grid(shape, bits, has_low, seed=0):
    """Random codes of which every group has the ends that its storage would have, and the matrix they give."""
    rng = np.random.default_rng(seed)
    out, columns = shape
    groups = -(-columns // 32)
    codes = rng.integers(0, 1 << bits, (out, groups, 32))
    codes[..., 0] = 0
    codes[..., 1] = (1 << bits) - 1
    step = rng.uniform(0.01, 0.05, (out, groups, 1)).astype(np.float16).astype(np.float32)
    low = rng.uniform(-0.4, -0.1, (out, groups, 1)).astype(np.float16) if has_low else -(1 << bits - 1) * step
    weight = (low + step * codes).astype(np.float32).reshape(out, -1)[:, :columns]
    return codes.reshape(out, -1)[:, :columns], step[..., 0], torch.from_numpy(weight)


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("has_low", [False, True])
@pytest.mark.parametrize("columns", [64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_found_again(bits, has_low, columns, dtype):
    codes, step, weight = on_grid((9, columns), bits, has_low)
    if dtype is torch.bfloat16 and has_low:
        weight = weight - weight.mean()
    grid = Grid.of(weight.to(dtype))
    assert (grid.bits, grid.low is not None) == (bits, has_low)
    assert (grid.codes.numpy() == codes).all()
    np.testing.assert_allclose(grid.step.numpy(), step, rtol=1e-3 if dtype is torch.float32 else 2e-2)
    if dtype is torch.float32:
        whole = BitPlanes(grid).level(len(BitPlanes(grid).bits))
        np.testing.assert_allclose(whole.numpy(), weight.numpy(), atol=1e-5)


def test_other_weights_are_rounded_to_8_bits():
    weight = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    planes = BitPlanes(Grid.of(weight))
    assert planes.bits == (2, 2, 2, 2)
    assert (planes.level(4) - weight).abs().max() <= weight.abs().max() / 127 * 0.51


# ---- by loops -------------------------------------------------------------------------------------------------------


def by_loops(weight):
    """8-bit codes [out, in], steps [out, in] and the value of every level, 0 … 4 planes."""
    out, columns = weight.shape
    w, codes, steps = weight.double().numpy(), np.zeros((out, columns), int), np.zeros((out, columns))
    for start in range(0, columns, 32):
        group = w[:, start : start + 32]
        step = np.float64(np.float16(np.abs(group).max(1, keepdims=True) / 127))
        codes[:, start : start + 32] = np.clip(np.rint(group / step), -127, 127) + 128
        steps[:, start : start + 32] = step
    levels = [np.zeros((out, columns))]
    for unread in (6, 4, 2, 0):
        low = codes >> unread << unread
        levels.append(steps * ((low + low + (1 << unread) - 1) / 2 - 128))
    return levels


def taus_by_sorting(x, levels, bits):
    """Every plane of every entry in order of what it is worth; as many are read as were asked for."""
    errors = [((levels[-1] - level) ** 2).mean() for level in levels]
    gains = np.minimum.accumulate([np.sqrt(max(a - b, 0) / 2) for a, b in pairwise(errors)])
    worth = np.sort((np.abs(x).reshape(-1, 1) * gains).flatten())
    left_out = int(np.ceil(worth.size * (1 - bits / 8) - 1e-6))
    theta = (worth[left_out - 1] + worth[left_out]) / 2
    return theta / gains


def int8(x, depth):
    """x in groups of 32 as the kernel rounds it: sums of 16 bits hold what the first two planes give."""
    found = np.zeros_like(x)
    for start in range(0, x.shape[-1], 32):
        group, most = x[..., start : start + 32], np.array([0, 12, 15, 15, 15])[depth[..., start : start + 32]]
        size = np.abs(group)
        scale = np.maximum(size.max(-1) / 127, (size * most).sum(-1) / (32767 - 240))[..., None]
        found[..., start : start + 32] = np.rint(group / np.where(scale == 0, 1, scale)) * scale
    return found


def product(x, levels, taus):
    depth = sum((np.abs(x) > tau).astype(int) for tau in taus)
    rounded = int8(x, depth)
    return sum((rounded * (depth == planes)) @ level.T for planes, level in enumerate(levels))


@torch.no_grad()
@pytest.mark.parametrize("family", DENSE_FAMILIES)
@pytest.mark.parametrize("bits", [1.5, 4.0])
def test_planes_is_the_formula(family, bits):
    """Matrix by matrix on what the sparse model gives it: one entry at a threshold would move all that comes after."""
    model = tiny(family)
    twin, plan = sparse(model, Planes(bits=bits, first=0))
    names, gave = linears(model, family), {}
    assert set(plan.select) == set(names)
    entered = seen(twin, names)
    for name in names:  # falcon adds to what it is given, in place
        twin.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: gave.update({name: y.clone()}))
    twin(CALIBRATION)
    for name in names:
        module, x = model.get_submodule(name), entered[name].double().numpy()
        levels = by_loops(module.weight.T if isinstance(module, Conv1D) else module.weight)
        taus = taus_by_sorting(x, levels, bits)
        if taus.any():  # of a ReLU's zeros any θ leaves out all
            np.testing.assert_allclose(plan.select[name].cut.taus, taus, rtol=2e-3)
            assert plan.select[name].sparsity == pytest.approx(1 - bits / 8, abs=1e-3), name
        expected = product(x, levels, plan.select[name].cut.taus)
        expected += 0.0 if module.bias is None else module.bias.numpy()
        error = np.abs(gave[name].numpy().reshape(expected.shape) - expected)
        assert np.median(error) < 1e-5 and error.max() < 0.05, name  # half-way between two 8-bit codes to either


def test_levels_read_what_is_worth_most():
    score = torch.tensor([4.0, 2.0, 1.0, 0.5])
    cut = Levels.removing(score, (1.0, 0.25), (2, 2), 0.5)  # worth 4, 2, 1, 1, 0.5, 0.5, …: four of eight
    assert cut.depth(score).tolist() == [2, 1, 1, 0] and cut.sparsity == 0.5
    assert cut.share(cut.depth(score)).tolist() == [1.0, 0.5, 0.5, 0.0]
    assert Levels.removing(score, (1.0, 0.25), (2, 2), 0.0).depth(torch.zeros(3)).tolist() == [2, 2, 2]
    for odd in (torch.nan, torch.inf):
        with pytest.raises(PumiceError, match="NaN or infinity"):
            Levels.removing(torch.tensor([1.0, odd]), (1.0,), (2,), 0.5)
    with pytest.raises(PumiceError, match="no scores at all"):
        Levels.removing(torch.zeros(0), (1.0,), (2,), 0.5)
    with pytest.raises(PumiceError, match="none below the one before"):
        Levels(taus=(2.0, 1.0), bits=(2, 2), sparsity=0.5)
    with pytest.raises(PumiceError, match="none below the one before"):
        Levels(taus=(1.0,), bits=(2, 2), sparsity=0.5)


def test_a_plane_is_not_read_before_the_one_above_it():
    cut = Levels.removing(torch.rand(1000), (1.0, 3.0), (2, 2), 0.4)
    assert cut.taus[0] <= cut.taus[1] and cut.sparsity == pytest.approx(0.4, abs=2e-3)


def test_nan_reads_everything():
    cut = Levels(taus=(1.0, 2.0), bits=(2, 2), sparsity=0.5)
    assert cut.depth(torch.tensor([torch.nan, 3.0, 1.5, 0.0])).tolist() == [2, 2, 1, 0]


# ---- the kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["avx2", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 64), (200, 70), (1, 33), (300, 96)])
@pytest.mark.parametrize("bits, has_low", [(4, True), (4, False), (5, True), (5, False), (6, False), (8, False)])
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.8, 1.0])
def test_the_kernel_is_the_reference(isa, dtype, shape, bits, has_low, sparsity):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    step = (torch.rand(shape[0], -(-shape[1] // 32), generator=generator) / 20).half().float()
    low = (-step * 7).half().float() if has_low else None
    planes = BitPlanes(Grid(codes, step, low, bits))
    x = torch.randn(3, shape[1], generator=generator).to(dtype)
    x[1] *= 1e-3
    x[2, :40] = 0
    cut = Levels.removing(x.float().abs(), planes.gains, planes.bits, sparsity)
    bias = torch.randn(shape[0], generator=generator)
    kernel = ReadPlanes(planes, bias, cut.taus, dtype, isa)
    depth = cut.depth(x.float().abs())
    expected = planes.reference(x.float(), depth) + bias
    found = kernel(x).float()
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-4)
    assert kernel.live == pytest.approx(cut.share(depth).sum().item() * bits)
    groups = torch.nn.functional.pad(depth, (0, -shape[1] % 32)).unflatten(-1, (-1, 32)).amax(-1)
    width = torch.tensor([32] * (shape[1] // 32) + [shape[1] % 32] * (shape[1] % 32 > 0))
    read = (cut.share(groups) * width).sum().item() / shape[1] * kernel.plane_bytes
    assert kernel.union == pytest.approx(read + 3 * kernel.shared_bytes)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_sums_of_the_largest_codes_do_not_overflow(isa):
    for bits, sign, read in itertools.product((4, 5, 8), (1.0, -1.0), (1, 2, 3)):
        top = (1 << bits) - 1
        planes = BitPlanes(Grid(torch.full((128, 64), top, dtype=torch.uint8), torch.ones(128, 2), None, bits))
        taus = tuple(-1.0 if p < read else 9.0 for p in range(len(planes.bits)))
        x = torch.full((1, 64), sign)
        found = ReadPlanes(planes, None, taus, torch.float32, isa)(x)
        middle = planes.level(min(read, len(planes.bits)))[0, 0]
        torch.testing.assert_close(found, torch.full((1, 128), 64 * sign * middle.item()), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_numbers_too_small_for_a_scale_are_zeros(isa):
    planes, x = BitPlanes(Grid.of(torch.randn(8, 64))), torch.zeros(1, 64)
    x[0, 3], x[0, 40] = 1e-38, 1.0
    taus = (0.0,) * 4
    found = ReadPlanes(planes, None, taus, torch.float32, isa)(x)
    depth = Levels(taus=taus, bits=planes.bits, sparsity=0.0).depth(x.abs())
    torch.testing.assert_close(found, planes.reference(x, depth), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_nan_and_infinity_are_seen(isa):
    planes = BitPlanes(Grid.of(torch.randn(8, 64)))
    for odd in (torch.nan, torch.inf):
        x = torch.ones(1, 64)
        x[0, 5] = odd
        assert not ReadPlanes(planes, None, (0.5,) * 4, torch.float32, isa)(x).isfinite().any()


def test_the_kernel_refuses_what_it_cannot_take():
    kernel = ReadPlanes(BitPlanes(Grid.of(torch.randn(8, 64))), None, (0.5,) * 4, torch.float32)
    for x in (torch.randn(9, 64), torch.randn(1, 32), torch.randn(1, 64).bfloat16()):
        with pytest.raises(PumiceError, match="up to 8 rows"):
            kernel(x)
    with pytest.raises(PumiceError, match="a tau for each"):
        ReadPlanes(BitPlanes(Grid.of(torch.randn(8, 64))), None, (0.5,) * 2, torch.float32)
    with pytest.raises(PumiceError, match="4, 5, 6, 8 bits"):
        codes = torch.zeros(8, 64, dtype=torch.uint8)
        ReadPlanes(BitPlanes(Grid(codes, torch.ones(8, 2), None, 3)), None, (0.5,) * 2, torch.float32)
    with pytest.raises(PumiceError, match="fp32 and bf16"):
        ReadPlanes(BitPlanes(Grid.of(torch.randn(8, 64))), None, (0.5,) * 4, torch.float16)


# ---- in models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_is_the_reference(family):
    model = tiny(family)
    plan = pumice.sparsify(model, Planes(bits=2.0), CALIBRATION, resume=False)
    twin = fast(model, plan)
    found, expected = steps(twin), steps(pumice.attach(model, plan, exec="reference"))
    assert ((found - expected).abs() > 1e-3).float().mean() < 0.1  # between two 8-bit codes to either
    assert all(selection.skipped for selection in twin.pumice.selections.values())
    assert not torch.allclose(expected, steps(pumice.attach(model, Plan())), atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_fast_in_bf16(rows):
    model = tiny("llama").to(torch.bfloat16)
    ids = torch.randint(3, 96, (rows, 12), generator=torch.Generator().manual_seed(rows))
    plan = pumice.sparsify(model, Planes(), CALIBRATION, resume=False)
    twin = fast(model, plan)
    found, expected = steps(twin, ids).float(), steps(pumice.attach(model, plan, exec="reference"), ids).float()
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.02


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_planes_that_are_never_read_are_felt_at_every_site(family):
    model = tiny(family)
    dense = steps(pumice.attach(model, Plan()))
    _, plan = sparse(model, Planes(first=0))
    for name, form in plan.select.items():
        never = Levels(taus=(float("inf"),) * 4, bits=form.cut.bits, sparsity=1.0)
        off = Plan(select={name: Select(score=form.score, cut=never, units=form.units, scope="token")})
        found = steps(fast(model, off))
        torch.testing.assert_close(found, steps(pumice.attach(model, off, exec="reference")), rtol=2e-4, atol=2e-4)
        assert (found - dense).abs().max() > 1e-4, name


def test_all_bits_are_nearly_dense():
    model = tiny("llama")
    twin, _ = sparse(model, Planes(bits=8.0))
    error = (logits(twin) - logits(model)).norm(dim=-1) / logits(model).norm(dim=-1)
    assert error.mean() < 0.05


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_decoding_is_the_whole_pass(family):
    twin, _ = sparse(tiny(family), Planes())
    whole, found = whole_and_decoded(twin)
    assert ((found - whole).abs() > 1e-3).float().mean() < 0.1
    torch.testing.assert_close(whole[:, :9], logits(tiny(family))[:, :9], rtol=1e-4, atol=1e-4)  # the prompt is dense


def test_tokens_that_come_later_change_nothing_before_them():
    twin, _ = sparse(tiny("llama"), Planes())
    other = IDS.clone()
    other[:, 9:] = (other[:, 9:] + 7) % 93 + 3
    torch.testing.assert_close(logits(twin)[:, :9], logits(twin, other)[:, :9])


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_the_calibration_text_reads_the_bits_that_were_asked_for(family):
    twin, plan = sparse(tiny(family), Planes(bits=3.0, first=0))
    twin.pumice.counting = True
    logits(twin, CALIBRATION)
    for name, selection in twin.pumice.selections.items():
        assert selection.counter.density == pytest.approx(1 - plan.select[name].sparsity, abs=1e-3), name


@pytest.mark.parametrize("rows", [1, 3])
def test_bytes_are_those_that_were_read(rows):
    model = tiny("llama")
    plan = pumice.sparsify(model, Planes(bits=3.0, where="*mlp*"), CALIBRATION, resume=False)
    twin = fast(model, plan)
    steps(twin, IDS[:rows])
    expected = 0.0
    for selection in twin.pumice.selections.values():
        product, columns = selection.skip.product, selection.form.units
        assert product.plane_bytes == columns * 128  # 8 bits of what fills a tile
        assert product.shared_bytes == -(-columns // 32) * 128 * 2
        expected += product.union  # of the last call, for the mean of all
        assert rows * product.shared_bytes <= product.union <= rows * (product.plane_bytes + product.shared_bytes)
    assert decode_bytes(twin)[1] == pytest.approx(expected, rel=0.15)


@torch.no_grad()
def test_changed_weights_are_read_anew():
    model = tiny("llama")
    plan = pumice.sparsify(model, Planes(), CALIBRATION, resume=False)
    twins = [fast(model, plan), pumice.attach(model, plan, exec="reference")]
    before = [steps(twin) for twin in twins]
    model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    expected = steps(pumice.attach(model, plan, exec="reference", check=False))
    for twin, old in zip(twins, before, strict=True):
        found = steps(twin)
        assert (found - old).abs().max() > 1e-3
        assert ((found - expected).abs() > 1e-3).float().mean() < 0.1


def test_levels_of_other_codes_are_refused():
    model = tiny("llama")
    name = "model.layers.0.mlp.down_proj"
    levels = Levels(taus=(0.1, 0.2), bits=(2, 2), sparsity=0.5)
    plan = Plan(select={name: Select(score=Magnitude(units=44), cut=levels, units=44, scope="token")})
    with pytest.raises(PumiceError, match="made for other weights"):
        fast(model, plan)
    with pytest.raises(PumiceError, match="made for other weights"):
        logits(pumice.attach(model, plan, exec="reference"))


def test_training_is_refused():
    model = tiny("llama")
    twin, _ = sparse(model, Planes())
    with pytest.raises(PumiceError, match="no gradient passes"):
        twin.train()(IDS)


def test_a_plan_comes_back_from_disk(tmp_path):
    model = tiny("llama")
    twin, plan = sparse(model, Planes())
    plan.save(tmp_path)
    torch.testing.assert_close(logits(pumice.attach(model, Plan.load(tmp_path), exec="reference")), logits(twin))


def test_what_was_applied_is_taken_off_again_bit_for_bit():
    model = tiny("llama")
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    plan = pumice.sparsify(model, Planes(), CALIBRATION, resume=False)
    with plan.applied(model, kernels="always"):
        steps(model)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])


def test_what_makes_no_sense_is_refused():
    for bits in (0.0, 8.5, True):
        with pytest.raises(PumiceError, match=r"planes\.bits"):
            Planes(bits=bits)
    model = tiny("llama")
    levels = Levels(taus=(1.0,) * 4, bits=(2,) * 4, sparsity=0.5)
    form = Select(score=Magnitude(units=44), cut=levels, units=44, scope="token")
    name = "model.layers.0.mlp"
    with pytest.raises(PumiceError, match="cut of the columns of one"):
        pumice.attach(model, Plan(select={name: form}))
    with pytest.raises(PumiceError, match="scope token"):
        Select(score=pumice.forms.PromptNorm(), cut=levels, units=44)
    with pytest.raises(PumiceError, match="both decide"):
        pumice.attach(model, pumice.sparsify(model, [Planes(), Teal()], CALIBRATION, resume=False))


def test_fused_experts_run_whole_and_say_so():
    _, plan = sparse(tiny("mixtral"), Planes())
    assert not any("experts" in name for name in plan.select)
    assert any("runs whole" in note for note in plan.measurements["notes"])
