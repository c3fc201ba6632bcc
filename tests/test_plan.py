"""A plan is data: it comes back as it was written, is refused when it is damaged, and knows the weights it is for."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import pumice
from pumice.errors import PumiceError
from pumice.forms import Mask, PromptNorm, RankFusion, Sample, Select, Slim, Static, TopK, Uniform
from pumice.plan import Plan, fingerprint_model
from tiny import FAMILIES, tiny

ODD = torch.rand(7, 13, generator=torch.Generator().manual_seed(0))
FORMS = {
    "mask": Mask.keeping(ODD > 0.4, "row"),
    "mask of all": Mask.keeping(ODD >= 0, "free"),
    "mask of nothing": Mask.keeping(ODD < 0, "2:4"),
    "mask with values": Mask.keeping(ODD > 0.4, "row", values=ODD.to(torch.bfloat16)),
    "slim": Slim(kept=torch.tensor([0, 3, 11]), units=13),
    "slim of nothing": Slim(kept=torch.tensor([], dtype=torch.long), units=13),
    "prompt": Select(score=PromptNorm(), cut=TopK(sparsity=0.3), units=13, batch="shared"),
    "prior": Select(score=PromptNorm(prior=ODD[0], eps=1e-3), cut=Sample(sparsity=0.3, top=0.5, seed=7), units=13),
    "static": Select(score=Static(values=ODD[0]), cut=TopK(sparsity=1.0), units=13),
    "rank": Select(score=RankFusion(values=ODD[0], weight=0.1), cut=TopK(sparsity=0.0), units=13),
    "uniform": Select(score=Uniform(), cut=Sample(sparsity=0.3), units=13),
}


def same(one, two):
    """Equal to the bit, in type too."""
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and one.shape == two.shape
        assert torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
    elif hasattr(one, "__dataclass_fields__"):
        for name in one.__dataclass_fields__:
            same(getattr(one, name), getattr(two, name))
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for name in one:
            same(one[name], two[name])
    else:
        assert one == two


def plan_of(**settings):
    weights = {name: form for name, form in FORMS.items() if isinstance(form, (Mask, Slim))}
    select = {name: form for name, form in FORMS.items() if isinstance(form, Select)}
    plain = dict(
        recipe=[{"method": "wanda", "sparsity": 0.3, "pattern": "row", "where": "*"}],
        calibration={"source": "file:Ärger.txt", "windows": 3, "bos": False},
        base={"name": "a/b", "fingerprint": "0" * 32},
        measurements={"perplexity": 12.25, "speeds": [1, 2.5, None]},
    )
    return Plan(weights=weights, select=select, **{**plain, **settings})


@pytest.fixture
def saved(tmp_path):
    plan_of().save(tmp_path)
    return tmp_path


# ---- round trip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_every_form_comes_back_as_it_was(name, tmp_path):
    field = "select" if isinstance(FORMS[name], Select) else "weights"
    plan = Plan(**{field: {"site": FORMS[name]}})
    plan.save(tmp_path)
    same(Plan.load(tmp_path), plan)


def test_a_whole_plan_comes_back_as_it_was(saved):
    same(Plan.load(saved), plan_of())


def test_forms_that_share_a_tensor_are_saved(tmp_path):
    row = ODD[1]
    forms = [Select(score=Static(values=values), cut=TopK(sparsity=0.5), units=13) for values in (row, row, ODD[1])]
    plan = Plan(select=dict(zip("abc", forms, strict=True)))
    plan.save(tmp_path)
    found = Plan.load(tmp_path).select
    same(found, plan.select)
    assert found["a"].score.values is found["b"].score.values


def test_saving_again_replaces(saved):
    Plan(base={"name": "other"}).save(saved)
    same(Plan.load(saved), Plan(base={"name": "other"}))
    assert sorted(path.name for path in saved.iterdir()) == ["pumice.json", "pumice.safetensors"]


def test_a_loaded_plan_runs_like_the_one_that_was_saved(tmp_path):
    model, ids = tiny("mixtral"), torch.arange(3, 15)[None]
    plan = pumice.sparsify(model, ["magnitude", "griffin"])
    plan.save(tmp_path)
    one, two = pumice.attach(model, plan), pumice.attach(model, Plan.load(tmp_path))
    with one.pumice.phase(8), two.pumice.phase(8):
        assert torch.equal(one(ids).logits, two(ids).logits)


@pytest.mark.parametrize("keep", [ODD > 0.4, ODD >= 0, ODD < 0, torch.ones(1, 1) > 0, torch.zeros(0, 5) > 0], ids=str)
def test_a_mask_keeps_what_it_was_given(keep):
    form = Mask.keeping(keep)
    assert torch.equal(form.keep, keep) and form.bits.numel() == (keep.numel() + 7) // 8
    assert form.removed == int((~keep).sum())
    assert form.sparsity == ((~keep).float().mean().item() if keep.numel() else 0.0) or form.removed
    weight = torch.randn(keep.shape, dtype=torch.bfloat16)
    assert torch.equal(form.reference(weight), torch.where(keep, weight, torch.zeros_like(weight)))
    assert torch.equal(Mask.keeping(keep.T).keep, keep.T)


# ---- damage ---------------------------------------------------------------------------------------------------------


def refused(folder, file, more=""):
    with pytest.raises(PumiceError, match=f"{re.escape(str(folder / file))}.*{more}|{more}.*{re.escape(file)}"):
        Plan.load(folder)


def edit(folder, change):
    data = json.loads((folder / "pumice.json").read_text())
    change(data)
    (folder / "pumice.json").write_text(json.dumps(data))


@pytest.mark.parametrize("file", ["pumice.json", "pumice.safetensors"])
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    refused(saved, file)


@pytest.mark.parametrize("file", ["pumice.json", "pumice.safetensors"])
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_truncated_file_is_named(saved, file, share):
    data = (saved / file).read_bytes()
    (saved / file).write_bytes(data[: int(len(data) * share)])
    refused(saved, file)


@pytest.mark.parametrize("file", ["pumice.json", "pumice.safetensors"])
@pytest.mark.parametrize("data", [b"\x80\x04]\x94.", b"\xff\xfe\x00", b"[]", b"null", b"{}", b"GGUF" * 20])
def test_a_foreign_file_is_named(saved, file, data):
    (saved / file).write_bytes(data)
    refused(saved, file)


@pytest.mark.parametrize("file", ["pumice.json", "pumice.safetensors"])
def test_a_folder_in_place_of_a_file_is_named(saved, file):
    (saved / file).unlink()
    (saved / file).mkdir()
    refused(saved, file)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_named(saved, version):
    edit(saved, lambda data: data.update(pumice=version))
    refused(saved, "pumice.json", "version")


@pytest.mark.parametrize("key", ["weights", "select", "recipe", "base", "calibration", "measurements"])
def test_a_missing_part_is_named(saved, key):
    edit(saved, lambda data: data.pop(key))
    refused(saved, "pumice.json", key)


@pytest.mark.parametrize("change", [
    lambda form: form.update(type="Pickle"),
    lambda form: form.update(type=["Mask"]),
    lambda form: form.pop("type"),
    lambda form: form.pop("shape"),
    lambda form: form.update(more=1),
    lambda form: form.update(shape=[7]),
    lambda form: form.update(shape=[7, 14]),
    lambda form: form.update(bits=3),
], ids=["unknown", "list", "untyped", "lacking", "surplus", "flat", "too large", "no tensor"])  # fmt: skip
def test_a_form_that_is_none_is_refused(saved, change):
    edit(saved, lambda data: change(data["weights"]["mask"]))
    refused(saved, "pumice.json")


def test_a_missing_tensor_is_named(saved):
    tensors = load_file(saved / "pumice.safetensors")
    tensors.pop("weights/mask.bits")
    save_file(tensors, saved / "pumice.safetensors")
    refused(saved, "pumice.safetensors", "weights/mask.bits")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(PumiceError, match=r"cannot write .*nowhere"):
        plan_of().save(tmp_path / "nowhere")


# ---- merge ----------------------------------------------------------------------------------------------------------


def test_plans_of_different_sites_join_in_order():
    one = Plan(weights={"a": FORMS["mask"]}, recipe=[{"method": "wanda"}], base={"name": "m"}, calibration={"x": 1})
    two = Plan(select={"a": FORMS["static"]}, recipe=[{"method": "griffin"}], base={"name": "n"}, calibration={"y": 2})
    both = one.merge(two)
    assert both.weights == one.weights and both.select == two.select
    assert [entry["method"] for entry in both.recipe] == ["wanda", "griffin"]
    assert both.base == {"name": "m"} and both.calibration == {"x": 1, "y": 2}


@pytest.mark.parametrize("field, form", [("weights", "mask"), ("select", "static")])
def test_two_decisions_on_one_site_are_refused_with_both_recipes(field, form):
    one = Plan(**{field: {"a": FORMS[form], "b": FORMS[form]}}, recipe=[{"method": "first"}])
    two = Plan(**{field: {"b": FORMS[form]}}, recipe=[{"method": "second"}])
    with pytest.raises(PumiceError, match=r"first and second both decide b\. Keep"):
        one.merge(two)


def test_sparsity_is_over_weights_or_units():
    masks = Plan(weights={"a": Mask.keeping(torch.ones(2, 5) > 0), "b": Mask.keeping(torch.zeros(1, 10) > 0)})
    assert masks.sparsity() == 0.5
    units = Plan(select={"a": Select(score=PromptNorm(), cut=TopK(sparsity=0.5), units=11),
                         "b": Select(score=PromptNorm(), cut=TopK(sparsity=0.0), units=9)})  # fmt: skip
    assert units.sparsity() == pytest.approx(5 / 20)
    assert Plan().sparsity() == 0 and not Plan().changes_weights


# ---- fingerprint ----------------------------------------------------------------------------------------------------


def linear(weight):
    module = torch.nn.Linear(*weight.shape[::-1], bias=False)
    module.weight.data = weight
    return fingerprint_model(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_checkpoint_in_fp32_and_bf16_has_one_fingerprint(family, tmp_path):
    from transformers import AutoModelForCausalLM

    for stored in (torch.float32, torch.bfloat16):
        model = tiny(family).to(stored)
        model.save_pretrained(tmp_path)
        loads = [AutoModelForCausalLM.from_pretrained(tmp_path, dtype=d) for d in (torch.float32, torch.bfloat16)]
        assert {fingerprint_model(one) for one in (model, *loads)} == {fingerprint_model(model)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_change_of_any_one_tensor_is_seen(family):
    model = tiny(family)
    seen = {fingerprint_model(model)}
    for parameter in model.parameters():
        before = parameter.data.clone()
        parameter.data *= 1.02
        seen.add(fingerprint_model(model))
        parameter.data = before
    assert len(seen) == 1 + len(list(model.parameters()))
    assert fingerprint_model(model) in seen


@pytest.mark.parametrize(
    "shape", [(1023, 100), (2046, 100), (1024, 128), (341, 100), (100, 1023), (2000, 999)], ids=str
)
def test_a_hundredth_of_a_tensor_is_seen_wherever_it_lies(shape):
    """1024 values of each tensor are read, spread so that no row, column or run of 1 % falls between them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain, (rows, columns) = linear(weight), shape

    def changed(*where):
        other = weight.clone()
        other[where] += 1
        return linear(other) != plain

    for start in torch.linspace(0, 0.99, 34).tolist():
        row, column = int(start * rows), int(start * columns)
        assert changed(slice(row, row + -(-rows // 100)))
        assert changed(slice(None), slice(column, column + -(-columns // 100)))


def test_a_tensor_of_up_to_1024_values_is_read_whole():
    weight = torch.randn(32, 32)
    for index in range(0, 1024, 31):
        other = weight.clone()
        other.view(-1)[index] += 1
        assert linear(other) != linear(weight)


def test_names_and_shapes_are_seen_and_order_is_not():
    one, two = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
    two.weight.data, two.bias.data = one.weight.data.reshape(4, 6), one.bias.data[:4]
    assert fingerprint_model(one) != fingerprint_model(two)
    first = torch.nn.ModuleDict({"a": one, "b": two})
    second = torch.nn.ModuleDict({"b": two, "a": one})
    swapped = torch.nn.ModuleDict({"a": two, "b": one})
    assert fingerprint_model(first) == fingerprint_model(second) != fingerprint_model(swapped)


def test_a_plan_is_printed_in_a_line():
    plan = Plan(weights={"a": FORMS["mask"]}, recipe=[{"method": "wanda"}], base={"name": "m"})
    assert repr(plan).startswith("<Plan wanda: 1 of weights, 0 selected") and len(repr(plan)) < 100
    assert len(repr(FORMS["mask"])) < 60
