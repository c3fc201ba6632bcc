"""What `detect` says of a model is what the model does."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from pumice.arch import detect, hidden_of, trace
from pumice.arch.experts import confirm_experts, expert_forward
from pumice.arch.trace import same
from pumice.errors import PumiceError
from tiny import FAMILIES, tiny

GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "mixtral", "qwen3_moe"}

# units, then role -> (linear, start, stride, width), as each family's own code slices its projections
HEADS = {
    "llama": (2, dict(q=("q_proj", 0, 16, 16), k=("k_proj", 0, 8, 8), v=("v_proj", 0, 8, 8), o=("o_proj", 0, 16, 16))),
    "qwen3": (2, dict(q=("q_proj", 0, 24, 24), k=("k_proj", 0, 12, 12), v=("v_proj", 0, 12, 12),
                      o=("o_proj", 0, 24, 24))),
    "phi3": (2, dict(q=("qkv_proj", 0, 16, 16), k=("qkv_proj", 32, 8, 8), v=("qkv_proj", 48, 8, 8),
                     o=("o_proj", 0, 16, 16))),
    "opt": (4, dict(q=("q_proj", 0, 8, 8), k=("k_proj", 0, 8, 8), v=("v_proj", 0, 8, 8), o=("out_proj", 0, 8, 8))),
    "gpt2": (4, dict(q=("c_attn", 0, 8, 8), k=("c_attn", 32, 8, 8), v=("c_attn", 64, 8, 8), o=("c_proj", 0, 8, 8))),
    "gpt_neox": (4, dict(q=("query_key_value", 0, 24, 8), k=("query_key_value", 8, 24, 8),
                         v=("query_key_value", 16, 24, 8), o=("dense", 0, 8, 8))),
    "bloom": (4, dict(q=("query_key_value", 0, 24, 8), k=("query_key_value", 8, 24, 8),
                      v=("query_key_value", 16, 24, 8), o=("dense", 0, 8, 8))),
    "falcon": (2, dict(q=("query_key_value", 0, 32, 16), k=("query_key_value", 16, 32, 8),
                       v=("query_key_value", 24, 32, 8), o=("dense", 0, 16, 16))),
}  # fmt: skip
HEADS |= {"mistral": HEADS["llama"], "qwen2": HEADS["llama"], "mixtral": HEADS["llama"]}
HEADS |= {"gemma3": HEADS["qwen3"], "qwen3_moe": HEADS["qwen3"]}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ids(length=16):
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model(input_ids=ids()).logits


def described(site):
    return site.units, {role: (part.module.rpartition(".")[2], part.start, part.stride, part.width)
                        for role, part in site.parts.items()}  # fmt: skip


def build(model_type, **settings):
    config = AutoConfig.for_model(model_type, vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


SMALL = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_the_blocks_is_a_site(family):
    model, arch = tiny(family), detect(tiny(family))
    inside = {f"{block.name}.{name}" for block in arch.blocks for name, module in block.module.named_modules()
              if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"}  # fmt: skip
    linears = {site.name: site for site in arch.of_kind("linear")}
    assert inside == {name for name, site in linears.items() if site.expert is None} | set(arch.refused)
    for site in linears.values():
        parameter = model.get_parameter(site.parts["weight"].view.parameter)
        assert site.weight.numel() == parameter.numel() // (1 if site.expert is None else parameter.shape[0])
        assert site.input in linears or site.input.endswith((".in", ".mid"))


@pytest.mark.parametrize("family", FAMILIES)
def test_ffn_roles_and_shapes(family):
    arch = detect(tiny(family))
    assert all(block.of_kind("ffn") for block in arch.blocks)
    for site in arch.of_kind("ffn"):
        assert set(site.parts) == ({"gate", "up", "down"} if family in GATED else {"up", "down"})
        assert site.rows("up").shape == (site.units, 32)
        assert site.matrix("down").shape == (32, site.units)
        assert site.input == (site.parts["down"].module if site.expert is None else f"{site.name}.mid")


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_where_the_family_slices_them(family):
    sites = detect(tiny(family)).of_kind("heads")
    assert len(sites) == tiny(family).config.num_hidden_layers
    assert all(described(site) == HEADS[family] for site in sites)


def test_phi3_gate_comes_before_up():
    site = detect(tiny("phi3")).sites["model.layers.1.mlp"]
    assert (site.parts["gate"].start, site.parts["up"].start) == (0, 44)


def test_opt_ffn_lies_in_the_block_itself():
    site = detect(tiny("opt")).sites["model.decoder.layers.0.ffn"]
    assert [part.module for part in site.parts.values()] == ["model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"]


def test_linears_that_read_one_tensor_share_its_key():
    sites = detect(tiny("llama")).sites
    q, gate = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"
    assert {sites[f"model.layers.0.self_attn.{name}_proj"].input for name in "qkv"} == {q}
    assert {sites[f"model.layers.0.mlp.{name}_proj"].input for name in ("gate", "up")} == {gate}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_matters(family):
    model = tiny(family)
    base = logits(model)
    for site in detect(model).sites.values():
        if site.expert is not None:
            continue
        matrix = site.matrix(site.out_role if site.kind != "experts" else "down_proj")
        saved = matrix.detach().clone()
        with torch.no_grad():
            matrix.zero_()
        assert not torch.equal(logits(model), base), site.name
        with torch.no_grad():
            matrix.copy_(saved)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ffn", "heads"])
@torch.no_grad()
def test_rows_of_dropped_units_count_for_nothing(family, kind):
    model = tiny(family)
    for site in detect(model).of_kind(kind):
        units = torch.arange(0, site.units, 2)
        site.matrix(site.out_role)[:, site.parts[site.out_role].index(units)] = 0
        base = logits(model)
        for role in site.in_roles:
            rows = site.parts[role].index(units)
            site.matrix(role)[rows] = torch.randn(len(rows), site.matrix(role).shape[1])
        assert torch.allclose(logits(model), base, atol=1e-5), site.name


@pytest.mark.parametrize("family", FAMILIES)
def test_detection_leaves_no_trace(family):
    model = tiny(family).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    detect(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert module.training and not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_may_be_on_meta(family):
    model = tiny(family)
    resident = list(detect(model).sites.items())
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"))
    assert list(detect(model).sites.items()) == resident
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_replaying_the_calls_is_the_model(family):
    model = tiny(family)
    blocks = [block.module for block in detect(model).blocks]
    results = []
    hook = blocks[-1].register_forward_hook(lambda module, args, output: results.append(hidden_of(output)))
    logits(model)
    hook.remove()
    calls = trace(model, blocks, ids())
    hidden = calls[0].hidden
    for block, call in zip(blocks, calls, strict=True):
        hidden = hidden_of(call.with_hidden(hidden)(block))
    assert torch.equal(hidden, results[0])


def test_trace_keeps_each_block_its_own_mask():
    model = tiny("gemma3")
    masks = [call.others()["attention_mask"] for call in trace(model, model.model.layers, ids())]
    assert not same(masks[0], masks[1]) and same(masks[0], masks[2])


@pytest.mark.parametrize(
    "hook, message",
    [
        (lambda module, args, kwargs: ((2 * args[0],), kwargs), "changes the hidden state between its blocks"),
        (lambda module, args, kwargs: (args, kwargs | {"extra": args[0] + 1}), "'extra' of block 1 depends on"),
    ],
)
def test_trace_refuses_what_it_cannot_replay(hook, message):
    model = tiny("llama")
    model.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(PumiceError, match=message):
        trace(model, model.model.layers, ids())


def test_trace_refuses_a_block_that_is_called_twice():
    model = tiny("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(PumiceError, match="times in one forward"):
        trace(model, model.model.layers, ids())


def test_a_shared_weight_is_listed_once():
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    arch = detect(model)
    assert "model.layers.1.mlp.down_proj" not in arch.sites and "model.layers.1.mlp" not in arch.sites
    assert "is that of model.layers.0.mlp.down_proj" in arch.refused["model.layers.1.mlp.down_proj"]


def test_experts_site_names_and_views():
    sites = detect(tiny("mixtral")).sites
    name = "model.layers.0.mlp.experts"
    assert sites[name].kind == "experts" and sites[name].units == 4
    assert sites[f"{name}.gate_up_proj[3]"].weight.shape == (88, 32)
    assert sites[f"{name}.down_proj[3]"].input == f"{name}[3].mid"
    assert sites[f"{name}[3]"].parts["up"].start == 44
    assert sites[f"{name}[3]"].expert == 3


def test_gpt_oss_experts_are_interleaved_transposed_and_biased():
    model = build("gpt_oss", **SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    sites = detect(model).sites
    ffn = sites["model.layers.1.mlp.experts[2]"]
    assert ffn.parts["gate"].view.transposed
    assert [(p.start, p.stride) for p in ffn.parts.values()] == [(0, 2), (1, 2), (0, 1)]
    assert described(sites["model.layers.0.self_attn"]) == HEADS["llama"]  # sinks do not hide the roles


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_expert_forward_is_the_module_and_taps_both_points(family):
    module = tiny(family).model.layers[1].mlp.experts
    hidden, weights = torch.randn(7, 32), torch.rand(7, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    assert confirm_experts(module, (hidden, index, weights)) == ""
    seen = {}

    def at(expert, point, tokens, x):
        seen[expert, point] = len(tokens)
        return x if point == "in" else torch.zeros_like(x)

    assert expert_forward(module, hidden, index, weights, at).abs().max() == 0
    assert sum(count for (_, point), count in seen.items() if point == "in") == index.numel()


def test_routers_stay_dense():
    model = build("qwen2_moe", **SMALL, moe_intermediate_size=20, shared_expert_intermediate_size=24, num_experts=4,
                  num_experts_per_tok=2)  # fmt: skip
    arch = detect(model)
    assert "router" in arch.refused["model.layers.0.mlp.shared_expert_gate"]
    assert arch.sites["model.layers.0.mlp.shared_expert"].units == 24


def test_a_router_derived_from_linear_is_no_linear():
    model = build("phimoe", **SMALL, num_local_experts=4, num_experts_per_tok=2)
    arch = detect(model)
    assert "router" in arch.refused["model.layers.0.mlp.router"]
    assert arch.sites["model.layers.0.mlp.experts"].units == 4


class ListMoE(nn.Module):
    """Experts as a list of MLPs, each called on the tokens that are routed to it."""

    def __init__(self, config, count=4):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, count, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(count))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        chosen, result = self.gate(flat).argmax(-1), torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            result[chosen == index] = expert(flat[chosen == index])
        return result.reshape(x.shape)


def test_each_expert_of_a_list_is_an_ffn():
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = ListMoE(model.config).eval()
    arch = detect(model)
    assert [site.name for site in arch.blocks[0].of_kind("ffn")] == [
        f"model.layers.0.mlp.experts.{i}" for i in range(4)
    ]
    assert set(arch.refused) == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}


def test_latent_attention_has_units_where_rows_belong_to_heads():
    model = build("deepseek_v3", **SMALL | {"num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2,
                  moe_intermediate_size=20, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=12,
                  kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12)  # fmt: skip
    units, parts = described(detect(model).sites["model.layers.0.self_attn"])
    assert units == 4
    assert parts == dict(q=("q_b_proj", 0, 12, 12), k=("kv_b_proj", 0, 20, 8), v=("kv_b_proj", 8, 20, 12),
                         o=("o_proj", 0, 12, 12))  # fmt: skip


def test_what_cannot_be_read_is_refused_with_the_reason():
    refused = detect(build("bitnet", **SMALL)).blocks[0].refused
    assert "mixed before it" in refused["model.layers.0.heads"] and "model.layers.0.ffn" in refused
    mamba = detect(build("mamba", hidden_size=32, num_hidden_layers=2, state_size=4)).blocks[0]
    assert mamba.of_kind("linear") and not mamba.of_kind("heads", "ffn")
    assert set(mamba.refused) >= {f"{mamba.name}.ffn", f"{mamba.name}.heads"}


def test_a_model_without_blocks_is_an_error():
    with pytest.raises(PumiceError, match="not a Hugging Face language model"):
        detect(nn.Linear(4, 4))
