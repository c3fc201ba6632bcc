"""High bits that tell which neurons run, and what stands for those that do not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import oracle
import pumice
from pumice.arch.detect import detect
from pumice.errors import PumiceError
from pumice.forms import HighBits, Magnitude, Select, Threshold, Tokens
from pumice.kernels.planes import Grid, High
from pumice.methods.token.cats import Cats
from pumice.methods.token.lowbit import LowBit
from pumice.methods.token.planes import Planes
from pumice.plan import Plan
from test_token import CALIBRATION, cut_of, doors, logits, seen, sparse, whole_and_decoded
from tiny import tiny


def on_grid(shape, bits, has_low, seed=0):
    """Random codes of which every group has the ends that its storage would have, and the matrix they give."""
    rng = np.random.default_rng(seed)
    out, columns = shape
    groups = -(-columns // 32)
    codes = rng.integers(0, 1 << bits, (out, groups, 32))
    codes[..., 0] = 0
    codes[..., 1] = (1 << bits) - 1
    step = rng.uniform(0.01, 0.05, (out, groups, 1)).astype(np.float16).astype(np.float32)
    low = rng.uniform(-0.4, -0.1, (out, groups, 1)) if has_low else -(1 << bits - 1) * step
    weight = (low + step * codes).astype(np.float32).reshape(out, -1)[:, :columns]
    return codes, step, low, torch.from_numpy(weight)


def put_on_grid(model, family):
    """Give gate and up of every block values that 4 bits hold."""
    for at, (_, block) in enumerate(oracle.blocks(model, family)):
        for name in ("gate_proj", "up_proj", "gate_up_proj"):
            module = getattr(block.mlp, name, None)
            if module is not None:
                weight = on_grid(tuple(module.weight.shape), 4, True, seed=at)[-1]
                module.weight.data.copy_(weight - weight.mean())
    return model


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("has_low", [False, True])
@pytest.mark.parametrize("columns", [64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_found_again(bits, has_low, columns, dtype):
    codes, step, _, weight = on_grid((9, columns), bits, has_low)
    if dtype is torch.bfloat16 and has_low:
        weight = weight - weight.mean()
    grid = Grid.of(weight.to(dtype), "w")
    assert (grid.bits, grid.has_low, grid.shared_bits) == (bits, has_low, 1.0 if has_low else 0.5)
    found = grid.codes.flatten(1)[:, :columns].numpy()
    assert (found == codes.reshape(9, -1)[:, :columns]).all()
    np.testing.assert_allclose(grid.step.numpy(), step, rtol=1e-5 if dtype is torch.float32 else 2e-2)


def test_weights_that_are_no_codes_are_refused():
    model = tiny("llama")
    with pytest.raises(PumiceError, match="no codes of 4 or 5 bits"):
        sparse(model, Planes())
    with pytest.raises(PumiceError, match="no 5 high ones"):
        sparse(put_on_grid(model, "llama"), Planes(bits=5))


def high_of(weight, bits):
    """(Ŵ, v·step²) of a matrix stored in 4 bits with a least value, by loops."""
    out, columns = weight.shape
    groups = columns // 32
    w = weight.double().numpy().reshape(out, groups, 32)
    low, step = w.min(-1, keepdims=True), (w.max(-1, keepdims=True) - w.min(-1, keepdims=True)) / 15
    codes = np.rint((w - low) / step).astype(int)
    classes, weights = codes >> (4 - bits), np.broadcast_to(step**2, codes.shape)
    mean = np.array([np.average(codes[classes == c], weights=weights[classes == c]) for c in range(1 << bits)])
    variance = (weights * (codes - mean[classes]) ** 2).sum() / weights.sum()
    return (mean[classes] * step + low).reshape(out, columns), variance * step[..., 0] ** 2


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_high_bits_give_the_mean_of_what_they_leave_open(bits):
    model = put_on_grid(tiny("llama"), "llama")
    site = detect(model).of_kind("ffn")[0]
    x = torch.randn(3, 5, site.weight_of("up").shape[1], generator=torch.Generator().manual_seed(1))
    dense, squares = high_of(site.weight_of("up").detach(), bits)
    z, variance = High.of(site, "up", bits).reference(x)
    energy = (x.double().numpy() ** 2).reshape(3, 5, -1, 32).sum(-1)
    np.testing.assert_allclose(z.numpy(), x.double().numpy() @ dense.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance.numpy(), energy @ squares.T, rtol=1e-4, atol=1e-9)
    if bits == 4:  # all of the bits: the matrix itself
        np.testing.assert_allclose(dense, site.weight_of("up").detach().numpy(), atol=1e-6)
        assert variance.abs().max() < 1e-9


def test_the_score_is_the_expected_contribution():
    """Against a million samples of the normal g and u."""
    generator = torch.Generator().manual_seed(2)
    parts = {"gate": (0.7, 0.09), "up": (-0.4, 0.25)}
    tokens = Tokens(high=lambda role, bits: tuple(torch.tensor([[value]]) for value in parts[role]))
    drawn = {role: mean + variance**0.5 * torch.randn(1_000_000, generator=generator)
             for role, (mean, variance) in parts.items()}  # fmt: skip
    expected = (F.silu(drawn["gate"]).square().mean() * drawn["up"].square().mean()).sqrt() * 3
    found = HighBits(activation="silu", weight=torch.tensor([3.0])).of_tokens(tokens)
    assert found.item() == pytest.approx(expected.item(), rel=0.01)
    expected = F.silu(drawn["up"]).square().mean().sqrt() * 3
    found = HighBits(activation="silu", gated=False, weight=torch.tensor([3.0])).of_tokens(tokens)
    assert found.item() == pytest.approx(expected.item(), rel=0.01)


def scores_of(mlp, x, fused):
    both = mlp.gate_up_proj.weight.chunk(2) if fused else (mlp.gate_proj.weight, mlp.up_proj.weight)
    energy = x.square().unflatten(-1, (-1, 32)).sum(-1)
    (gate, vg), (up, vu) = (
        (x @ torch.from_numpy(dense).float().T, energy @ torch.from_numpy(squares).float().T)
        for dense, squares in (high_of(weight.detach(), 2) for weight in both)
    )
    far = (3 * vg).sqrt()
    square = (4 * F.silu(gate) ** 2 + F.silu(gate + far) ** 2 + F.silu(gate - far) ** 2) / 6
    return (square * (up**2 + vu)).sqrt() * mlp.down_proj.weight.norm(dim=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_planes_is_the_formula(family):
    model, edits = put_on_grid(tiny(family), family), {}
    for name in (f"{name}.mlp" for name, _ in oracle.blocks(model, family)):
        mlp, entered = model.get_submodule(name), {}
        found = seen(model, [name, f"{name}.down_proj"], before=edits)
        x, a = found[name], found[f"{name}.down_proj"]
        s = scores_of(mlp, x, family == "phi3")
        tau = cut_of(s.numpy(), 0.4)
        mean = (a * (s <= tau)).flatten(0, 1).mean(0)  # of what is dropped, counted over all tokens
        edits[name] = lambda x, entered=entered: entered.setdefault("x", x)

        def drop(a, mlp=mlp, entered=entered, tau=tau, mean=mean, fused=family == "phi3"):
            # a + mean passes through `down` as what is kept and what stands for the rest
            return a * (scores_of(mlp, entered.pop("x"), fused) > tau) + mean

        edits[f"{name}.down_proj"] = drop
    with doors(model, edits):
        expected = logits(model)
    twin, _ = sparse(model, Planes(sparsity=0.4, first=0))
    torch.testing.assert_close(logits(twin), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_mean_of_what_is_dropped_stands_for_it_where_tokens_are_sparse(family):
    model = tiny(family)
    method = LowBit if family == "llama" else Cats
    twin, plan = sparse(model, method(sparsity=0.5, first=3, compensate=True))
    bare = Plan(select={name: Select(score=f.score, cut=f.cut, units=f.units, scope="token", first=3)
                        for name, f in plan.select.items()})  # fmt: skip
    other, first = logits(pumice.attach(model, bare, exec="reference")), logits(twin)
    torch.testing.assert_close(first[:, :3], logits(model)[:, :3], rtol=1e-4, atol=1e-4)  # dense, so nothing is added
    assert (first[:, 3:] - other[:, 3:]).abs().max() > 1e-4


@torch.no_grad()
def test_a_plan_keeps_what_stands_for_the_dropped(tmp_path):
    model = tiny("llama")
    twin, plan = sparse(model, LowBit(sparsity=0.5))
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    torch.testing.assert_close(logits(pumice.attach(model, again, exec="reference")), logits(twin))


@torch.no_grad()
def test_less_is_lost_with_it():
    """On the calibration text the sparse FFNs of the first block are nearer to the dense ones."""
    model = tiny("llama")
    errors = []
    for compensate in (False, True):
        _, plan = sparse(model, LowBit(sparsity=0.6, first=0, compensate=compensate))
        name = next(iter(plan.select))
        twin = pumice.attach(model, Plan(select={name: plan.select[name]}), exec="reference")
        found = []
        for one in (model, twin):
            handle = one.get_submodule(name).register_forward_hook(lambda m, args, out, to=found: to.append(out))
            one(CALIBRATION)
            handle.remove()
        errors.append((found[0] - found[1]).square().sum())
    assert errors[1] < errors[0]


def test_what_stands_for_the_dropped_is_of_this_model():
    model = tiny("llama")
    name = detect(model).of_kind("ffn")[0].name
    units = detect(model).of_kind("ffn")[0].units
    form = Select(score=Magnitude(units=units), cut=Threshold(tau=0.1, sparsity=0.5), units=units, scope="token",
                  rest=torch.zeros(5))  # fmt: skip
    with pytest.raises(PumiceError, match="another model"):
        pumice.attach(model, Plan(select={name: form}))
    with pytest.raises(PumiceError, match="scope token"):
        pumice.forms.Select(
            score=pumice.forms.PromptNorm(), cut=pumice.forms.TopK(sparsity=0.5), units=units, rest=torch.zeros(5)
        )


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_decoding_is_the_whole_pass(family):
    model = put_on_grid(tiny(family), family)
    twin, _ = sparse(model, Planes(sparsity=0.5))
    whole, found = whole_and_decoded(twin)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
