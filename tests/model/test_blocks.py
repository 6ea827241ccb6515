"""Parts of the model from their definitions: blocks, layers, masks, classifiers, initial values, sizes."""

from __future__ import annotations

import gc
import hashlib
import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, StaticCache
from transformers.masking_utils import AttentionMaskInterface

from rmoe.compat import CACHE
from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM, RMoEForSequenceClassification, count_parameters, head, initialize
from rmoe.model.experts import in_whole_16_bytes
from rmoe.model.layers import RMoEDecoderLayer, RMoESparseMoeBlock
from rmoe.model.norm import RMSNorm
from rmoe.routing import BalanceSpec, RouterContext, RouterStats, resolve, vary
from rmoe.routing.initial import initializers_of
from rmoe.routing.losses import SimilarityPreserving
from rmoe.routing.scorer import Linear
from tests import naive
from tests.model.small import POST, PRE, config, loss_and_gradients, model, tokens
from tests.versions import since


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- blocks and layers ------------------------------------------------------------------------------------


def naive_block(block: RMoESparseMoeBlock, x: Tensor, context: RouterContext, gated: bool) -> Tensor:
    """`sum_n g_n E_n(x) + passthrough * x + shared(x)`, token by token; a skipped or dropped slot adds nothing.

    With weights on the input `E_n(g_n x)`; constants add their own, and a weight may multiply each shared expert.
    """
    routing = block.gate(x, (), None, context)[0]
    on_input = block.gate.spec.to_dict()["router"].get("weight_on") == "input"
    own = dict(block.named_parameters())
    first = own["experts.gate_up_proj" if gated else "experts.up_proj"]
    out = []
    for t, token in enumerate(x):
        total = torch.zeros_like(token)
        for slot, n in enumerate(routing.experts[t].tolist()):
            if n < block.experts.num_experts:
                g = routing.weights[t, slot]
                out_n = naive.expert(
                    token * g if on_input else token, first[n], own["experts.down_proj"][n], gated
                )
                total = total + (out_n if on_input else g * out_n)
        if routing.passthrough is not None:
            total = total + routing.passthrough[t] * token
        if routing.added is not None:
            total = total + routing.added[t]
        if block.shared_experts is not None:
            up, down = own["shared_experts.up_proj.weight"], own["shared_experts.down_proj.weight"]
            size = block.experts.intermediate_dim
            for n in range(len(up) // size):
                part = slice(n * size, (n + 1) * size)
                first_n = up[part]
                if gated:
                    first_n = torch.cat((own["shared_experts.gate_proj.weight"][part], first_n))
                g = 1.0 if routing.shared_weights is None else routing.shared_weights[t, n]
                total = total + g * naive.expert(token, first_n, down[:, part], gated)
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("architecture", [PRE, POST], ids=["gated", "plain"])
@pytest.mark.parametrize(
    "router",
    [
        *("smoe", "stable-moe", "eda", "remoe", "smoe-capacity", "smoe-dropout", "hunyuan"),
        *("llama-4", "longcat", "moepp-experts", "inkling"),
    ],
)
def test_block_from_its_parts(router: str, architecture: dict, shared: int) -> None:
    settings = config(
        router=router,
        num_shared_experts=shared,
        num_experts_per_tok=1 if router == "stable-moe" else 2,
        **architecture,
    )
    settings._experts_implementation = "eager"
    block = RMoESparseMoeBlock(settings, 0).double()
    frozen = [
        value for name, value in block.named_buffers() if name.endswith(".weight")
    ]  # not drawn yet either
    for i, weight in enumerate([*block.parameters(), *frozen]):
        weight.data = 0.3 * randn(*weight.shape, seed=i)
    if router == "eda":
        block.gate.selection_bias.bias[-1] = 0.1  # some tokens skip, some do not
    x, ids = randn(14, 36, seed=9), tokens(2, 7).reshape(-1)
    context = RouterContext(2, 7, token_ids=ids)
    routing = block.gate(x, (), None, context)[0]
    if router in ("eda", "remoe", "longcat", "moepp-experts"):
        assert 0 < int((routing.experts == 5).sum()) < routing.experts.numel()
    if router == "stable-moe":
        assert (routing.passthrough - (1 - routing.weights[:, 0])).abs().max() < 1e-12
    got = block(x.view(2, 7, 36), routing)
    assert got.shape == (2, 7, 36)
    assert (got.view(14, 36) - naive_block(block, x, context, settings.mlp_gated)).abs().max() < 1e-10


class Halve(nn.Module):
    """In attention's place."""

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        return 0.5 * hidden_states.flip(1), None


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_layer_from_its_parts(norm: str, position: str, layer: int) -> None:
    """Pre-norm `x + f(norm(x))`, post-norm `norm(x + f(x))`; layer 0 is dense."""
    settings = config(router="smoe", norm_position=position, norm_type=norm, num_shared_experts=0)
    settings._experts_implementation = "eager"
    built = RMoEDecoderLayer(settings, layer).double().eval()
    for i, parameter in enumerate(built.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=i)
    built.self_attn = Halve()

    def normed(x: Tensor, module: nn.Module) -> Tensor:
        if norm == "rmsnorm":
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * module.weight
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-6) * module.weight + module.bias

    def mixed(x: Tensor) -> Tensor:
        if layer == 0:
            up = torch.cat((built.mlp.gate_proj.weight, built.mlp.up_proj.weight))
            assert built.mlp.down_proj.weight.shape == (36, 40)  # k experts wide
            return torch.stack([naive.expert(t, up, built.mlp.down_proj.weight, True) for t in x[0]])[None]
        return naive_block(built.mlp, x[0], RouterContext(1, 8), True)[None]

    x, first, second = randn(1, 8, 36, seed=7), built.input_layernorm, built.post_attention_layernorm
    got, _, routing, _ = built(x, (), None, RouterContext(1, 8))
    if position == "pre":
        after = x + 0.5 * normed(x, first).flip(1)
        wanted = after + mixed(normed(after, second))
    else:
        after = normed(x + 0.5 * x.flip(1), first)
        wanted = normed(after + mixed(after), second)
    assert (got - wanted).abs().max() < 1e-9
    assert (routing is None) == (layer == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (1, 5)])
def test_norm_from_its_definition(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = RMSNorm(7, 0.1).to(dtype)
    assert (norm.weight == 1).all()
    norm.weight.data = randn(7, seed=1).to(dtype)
    x = randn(*rows, 7).to(dtype).requires_grad_()
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    wanted = weight * wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 0.1)
    direction = randn(*rows, 7, seed=2)
    got = norm(x)
    want_gradients = torch.autograd.grad((wanted * direction).sum(), (wide, weight))
    got_gradients = torch.autograd.grad((got * direction.to(dtype)).sum(), (x, norm.weight))
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for a, b in zip((got, *got_gradients), (wanted, *want_gradients), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() < bound * max(1.0, float(b.abs().max()))
    with torch.no_grad():
        assert (norm(x).double() - wanted).abs().max() < bound * max(1.0, float(wanted.abs().max()))


# ---- masks, caches, classifiers -----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [3, 5, 8])
def test_a_chunk_after_a_cache_has_its_own_columns_of_the_mask(cut: int) -> None:
    """Rows of 9, the second with 4 pads on the left: each chunk routes and counts its own real tokens."""
    net = model(router="smoe").eval()
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = net(ids, attention_mask=mask, position_ids=positions, output_routing=True)
    first = net(ids[:, :cut], attention_mask=mask[:, :cut], position_ids=positions[:, :cut], use_cache=True)
    rest = net(
        ids[:, cut:], attention_mask=mask, position_ids=positions[:, cut:], past_key_values=first.past_key_values,
        use_cache=True, output_routing=True,
    )  # fmt: skip
    assert int(first.router_stats.tokens) == int(mask[:, :cut].sum())
    if cut < 8:
        assert int(rest.router_stats.tokens) == int(mask[:, cut:].sum())
        assert torch.equal(first.router_stats.counts + rest.router_stats.counts, whole.router_stats.counts)
    else:
        assert rest.router_stats is None  # one token a sequence: decoding
    real = mask[:, cut:].bool()
    assert (rest.logits[real] - whole.logits[:, cut:][real]).abs().max() < 1e-5


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_classifier_reads_the_last_real_token(side: str) -> None:
    net = RMoEForSequenceClassification(config(num_labels=4))
    initialize(net, 0)
    net.eval()
    left, right = {"left": (5, 0), "right": (0, 5), "both": (2, 3)}[side]
    rows = [tokens(1, n, seed=n) for n in (8, 3, 6)]
    alone = torch.cat([net(row).logits for row in rows])
    whole = 8 + left + right
    ids, mask = torch.full((3, whole), 66), torch.zeros(3, whole, dtype=torch.int64)
    for i, row in enumerate(rows):
        start = whole - right - row.shape[1]  # shorter rows have more pads on the left
        if side == "right":
            start = 0
        ids[i, start : start + row.shape[1]] = row
        mask[i, start : start + row.shape[1]] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = net(ids, attention_mask=mask, position_ids=positions).logits
    assert (got - alone).abs().max() < 1e-5
    assert (got - net(ids, attention_mask=mask.bool(), position_ids=positions).logits).abs().max() < 1e-6


def test_each_layers_router_is_updated_with_its_own_stats() -> None:
    net = model(router="smoe-bias", num_hidden_layers=4)
    counts = torch.tensor([[9, 1, 1, 1, 3], [1, 9, 1, 1, 3], [3, 3, 3, 3, 3]])
    net.update_routers(RouterStats(counts, torch.tensor(5), *torch.zeros(3, 3)), 1, 10)
    wanted = [[-1, 1, 1, 1, 0], [1, -1, 1, 1, 0], [0, 0, 0, 0, 0]]
    for router, signs in zip(net.routers, wanted, strict=True):
        assert torch.equal(router.selection_bias.bias, 1e-3 * torch.tensor(signs, dtype=torch.float32))


def test_hash_tables_differ_by_layer_and_repeat_by_model() -> None:
    first, second = (
        model(router="hash", num_hidden_layers=4),
        model(seed=1, router="hash", num_hidden_layers=4),
    )
    tables = [router.table for router in first.routers]
    assert all(torch.equal(a, b.table) for a, b in zip(tables, second.routers, strict=True))
    for i in range(3):
        for j in range(i):
            assert 0.1 < (tables[i] == tables[j]).double().mean() < 0.4  # by chance, 1 in 5


def test_noise_is_drawn_in_training_only_and_from_a_key_that_advances() -> None:
    seen: list[object] = []

    def keep(gate: nn.Module, inputs: tuple, named: dict) -> None:
        noise = named["context"].noise
        seen.append(None if noise is None else int(noise.key))

    for router, noisy in (("noisy-topk", True), ("smoe", False)):
        net = model(router=router, num_hidden_layers=2).train()
        net.routers[0].register_forward_pre_hook(keep, with_kwargs=True)
        net.set_routing_noise(3, 5)
        for training in (True, False, True):
            net.train(training)(tokens(1, 4))
        first = (3 << 32) + 6
        assert seen == ([first, None, first + 1] if noisy else [None] * 3)
        seen.clear()


def test_exactly_one_input_and_its_context() -> None:
    net = model(router="smoe").eval()
    ids = tokens(2, 5)
    embeds = net.model.embed_tokens(ids)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            net(**wrong)
    out = net.model(ids)
    assert (out.context.batch, out.context.length, out.context.mask) == (2, 5, None)
    assert torch.equal(out.context.token_ids, ids.reshape(-1))
    assert net.model(inputs_embeds=embeds).context.token_ids is None
    assert (net(inputs_embeds=embeds).logits - net(ids).logits).abs().max() < 1e-6


@pytest.mark.parametrize("wanted", [False, True])
@torch.no_grad()
def test_hidden_states_live_only_as_long_as_they_are_needed(wanted: bool) -> None:
    """A long prompt's would be a good part of the peak of memory."""
    net, made, alive = model(router="rmoe").eval(), [], []

    def count(module: nn.Module, args: object, result: tuple[Tensor, ...]) -> None:
        gc.collect()
        alive.append(sum(one() is not None for one in made))
        made.append(weakref.ref(result[0]))

    for layer in net.model.layers:
        layer.register_forward_hook(count)
    net(tokens(2, 6), use_cache=False, output_hidden_states=wanted)
    # While a layer runs, the layer before it is its input.
    assert alive == ([0, 1, 2] if wanted else [0, 1, 1])


@pytest.mark.parametrize("position", ["pre", "post"])
def test_trunk_from_its_layers(position: str) -> None:
    """Embedding, layers, and in a pre-norm model a last norm; hidden states before each layer and after the last."""
    net = model(router="smoe", norm_position=position).eval()
    ids = tokens(2, 6)
    out = net.model(ids, output_hidden_states=True, output_router_logits=True, use_cache=False)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], net.model.embed_tokens(ids))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    raw: list[Tensor] = []
    net.model.layers[-1].register_forward_hook(lambda module, args, result: raw.append(result[0]))
    net.model(ids, use_cache=False)
    last = raw[0]
    if position == "pre":
        last = last / torch.sqrt((last * last).mean(-1, keepdim=True) + 1e-6) * net.model.norm.weight
    assert (last - out.last_hidden_state).abs().max() < 1e-5
    assert len(out.routing) == len(out.router_logits) == 2  # the first layer is dense
    for routing, logits in zip(out.routing, out.router_logits, strict=True):
        assert torch.equal(routing.logits[:, :5], logits)
    plain = net(ids)
    assert plain.router_logits is None
    assert plain.routing is None
    assert len(net(ids, output_routing=True).routing) == 2
    assert plain.loss is None
    assert torch.equal(plain.logits, net.lm_head(out.last_hidden_state))
    assert torch.equal(net(ids, logits_to_keep=2).logits, plain.logits[:, -2:])
    assert torch.equal(net(ids, logits_to_keep=torch.tensor([0, 3])).logits, plain.logits[:, [0, 3]])


# ---- initial values and sizes -------------------------------------------------------------------------------


def drawn(name: str, shape: torch.Size, seed: int, std: float) -> Tensor:
    """A normal draw from the generator of (seed, name), by hand."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    return torch.empty(shape).normal_(0, std, generator=torch.Generator().manual_seed(number))


def test_every_parameter_has_a_stream_of_its_full_name() -> None:
    net = model(seed=4, router="smoe")
    normal = {name: p for name, p in net.named_parameters() if p.dim() > 1 and "norm" not in name}
    for name, parameter in normal.items():
        assert torch.equal(parameter, drawn(name, parameter.shape, 4, 0.1)), name
    by_leaf: dict[tuple, list[Tensor]] = {}
    for name, parameter in normal.items():
        by_leaf.setdefault((name.split(".")[-1], parameter.shape), []).append(parameter)
    alike = [group for group in by_leaf.values() if len(group) > 1]
    assert len(alike) >= 4
    for group in alike:
        for i, one in enumerate(group):
            assert not any(torch.equal(one, other) for other in group[:i])
    for name, parameter in net.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()


def test_rules_by_kind() -> None:
    linear, norm, embedding = nn.Linear(30, 40), nn.LayerNorm(30), nn.Embedding(50, 30)
    for module in (linear, norm, embedding):
        for name, rule in initializers_of(module, 0.3).items():
            if (tensor := getattr(module, name, None)) is not None:
                rule(tensor.data, None)
    assert float(linear.weight.std()) == pytest.approx(0.3, rel=0.1)
    assert float(embedding.weight.std()) == pytest.approx(0.3, rel=0.1)
    assert (linear.bias == 0).all()
    assert (norm.weight == 1).all()
    assert (norm.bias == 0).all()
    assert initializers_of(nn.Identity(), 0.3) == {}
    bare = model(router="smoe")
    bare.extra = nn.Conv1d(1, 1, 1)
    with pytest.raises(ValueError, match=r"no initial value is defined for \['bias', 'weight'\] of extra"):
        initialize(bare, 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("router", ["smoe", "rmoe", "random-smoe"])
def test_parameter_counts_from_the_sizes(router: str, tied: bool) -> None:
    d, v, e, k, width, layers = 36, 67, 5, 2, 20, 3
    net = RMoEForCausalLM(config(router=router, tie_word_embeddings=tied))
    attention = d * 36 + 2 * d * 18 + 36 * d
    experts, shared, dense = 2 * e * 3 * width * d, 2 * 3 * width * d, 3 * k * width * d
    of_router = 2 * e * d
    if router == "rmoe":
        of_router = 2 * (128 * d + 128 * e) + 6 * 128 * 128 + 6 * 128
    embeddings = v * d * (1 if tied else 2)
    body = layers * (attention + 2 * d) + d + experts + shared + dense + of_router
    found = count_parameters(net)
    assert found == {
        "total": body + embeddings,
        "non_embedding": body,
        "router": of_router,
        "active": body + embeddings - experts + experts * k // e,
    }


@pytest.mark.parametrize(
    ("field", "fine", "wrong"),
    [
        ("vocab_size", (1,), (0, -1)),
        ("hidden_size", (1,), (0,)),
        ("moe_intermediate_size", (1,), (0,)),
        ("num_hidden_layers", (2, 10_000), (0, 10_001)),
        ("num_attention_heads", (3,), (0, -3)),
        ("num_key_value_heads", (1, 2, 6), (0, 4, 12)),
        ("head_dim", (2,), (0, 5)),
        ("num_experts", (2,), (0, 1)),
        ("num_experts_per_tok", (1, 5), (0, 6)),
        ("first_k_dense_replace", (0, 2), (-1, 3)),
        ("norm_position", ("pre", "post"), ("both",)),
        ("norm_type", ("rmsnorm", "layernorm"), ("batchnorm",)),
        ("hidden_act", ("gelu",), ("sine",)),
        ("hidden_dropout", (0.0, 0.99), (1.0, -0.1)),
        ("attention_dropout", (0.0, 0.99), (1.0, -0.1)),
    ],
)
def test_limits_of_the_configuration(field: str, fine: tuple, wrong: tuple) -> None:
    for value in fine:
        assert getattr(config(**{field: value}), field) == value
    for value in wrong:
        with pytest.raises(RequestError):
            config(**{field: value})


def test_what_a_configuration_fills_in() -> None:
    built = config(num_key_value_heads=None, head_dim=None, intermediate_size=None)
    assert (built.num_key_value_heads, built.head_dim, built.intermediate_size) == (6, 6, 40)
    assert config(intermediate_size=17).intermediate_size == 17
    assert built.num_moe_layers == 2
    sizes = built.router_geometry(1)
    assert (sizes.hidden_size, sizes.num_experts, sizes.top_k, sizes.num_layers) == (36, 5, 2, 2)
    assert (sizes.layer_index, sizes.vocab_size, sizes.initializer_range) == (1, 67, 0.1)
    assert config(router="hash", norm_topk_prob=True).norm_topk_prob is True  # no gate that could disagree
    assert config(router="remoe", norm_topk_prob=False).norm_topk_prob is False  # a gate without the option
    assert config(router="smoe", norm_topk_prob=True).router_spec.gate.renormalize is True


def test_losses_add_up() -> None:
    net, ids = model(router="smoe-z"), tokens()
    out = net(ids, labels=ids)
    assert math.isclose(float(out.loss), float(out.lm_loss + out.balance_loss), rel_tol=1e-6)
    assert math.isclose(
        float(out.balance_loss), 0.01 * float(out.aux_loss), rel_tol=1e-6
    )  # as transformers weigh it
    logits = out.logits[:, :-1].double().log_softmax(-1)
    nats = -logits.gather(-1, ids[:, 1:, None]).mean()
    assert math.isclose(float(out.lm_loss), float(nats), rel_tol=1e-5)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    for options in ({"shift_labels": shifted}, {"shift_labels": shifted, "output_logits": False}):
        assert math.isclose(float(net(ids, **options).lm_loss), float(nats), rel_tol=1e-5)
    summed = net(ids, labels=ids, num_items_in_batch=100)
    assert math.isclose(float(summed.lm_loss), float(nats) * 36 / 100, rel_tol=1e-5)


def packed(*examples: list[int]) -> tuple[Tensor, Tensor]:
    """Positions and mask of one row per argument: a negative length is padding."""
    rows, masks = [], []
    for lengths in examples:
        rows.append([i for n in lengths for i in range(abs(n))])
        masks.append([int(n > 0) for n in lengths for _ in range(abs(n))])
    return torch.tensor(rows), torch.tensor(masks)


def by_lengths(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, cu_seq_lens_q: Tensor | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """As FlashAttention is told: a mask of padding, or lengths of sequences that lie one behind the other."""
    batch, _, length, _ = query.shape
    if cu_seq_lens_q is None:
        real = (
            torch.ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        )
        sees = (real[:, None, :] & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    else:
        assert attention_mask is None
        sequence = torch.bucketize(torch.arange(batch * length), cu_seq_lens_q[1:], right=True)
        same = sequence[:, None] == sequence
        query, key, value = (t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value))
        sees = (same & torch.ones_like(same).tril())[None, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, sees, scale=scaling, enable_gqa=True
    )
    if cu_seq_lens_q is not None:
        out = out[0].unflatten(1, (batch, length)).transpose(0, 1)
    return out.transpose(1, 2), None


AttentionInterface.register("flash_by_lengths", by_lengths)
AttentionMaskInterface.register("flash_by_lengths", lambda *_, attention_mask=None, **__: attention_mask)


@pytest.mark.parametrize(
    ("attention", "compiled"),
    [("sdpa", False), ("sdpa", True), ("eager", False), ("eager", True), ("flash_by_lengths", False)],
)
@pytest.mark.parametrize("use_cache", [False, None])
def test_packed_examples_with_padding_do_not_see_each_other(
    attention: str, compiled: bool, use_cache: bool | None
) -> None:
    net, one, two = model(router="rmoe", experts="batched_mm").eval(), tokens(1, 5), tokens(1, 6, seed=1)
    net.config._attn_implementation = attention
    positions, mask = packed([5, 6, -3], [-3, 5, 6])
    both = torch.cat((one, two), 1)
    ids = torch.cat((torch.nn.functional.pad(both, (0, 3)), torch.nn.functional.pad(both, (3, 0))))
    call = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
    with torch.no_grad():
        got = call(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
        for start, example in ((0, one), (5, two)):
            want = net(example, use_cache=False).logits[0]
            for row, shift in ((0, 0), (1, 3)):
                begin = start + shift
                torch.testing.assert_close(got[row, begin : begin + len(want)], want)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_by_lengths"])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_packed_alike_may_share_their_positions(attention: str, masked: bool) -> None:
    net, one, two = model(router="rmoe", experts="batched_mm").eval(), tokens(1, 5), tokens(1, 6, seed=1)
    net.config._attn_implementation = attention
    ids = torch.cat((one, two), 1).repeat(2, 1)
    positions, _ = packed([5, 6])
    with torch.no_grad():
        mask = torch.ones_like(ids) if masked else None
        got = net(ids, attention_mask=mask, position_ids=positions).logits
        want = torch.cat([net(example, use_cache=False).logits for example in (one, two)], 1)
    torch.testing.assert_close(got, want.expand_as(got))


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_that_are_not_packed_keep_their_mask(compiled: bool) -> None:
    """Positions beside a mask, as `generate` gives them: FlashAttention is told of padding by the mask."""
    net, ids = model(router="rmoe", experts="batched_mm").eval(), tokens(1, 6)
    net.config._attn_implementation = "flash_by_lengths"
    positions, mask = packed([-3, 6], [-3, 6])
    rows = torch.nn.functional.pad(ids, (3, 0)).repeat(2, 1)
    call = torch.compile(net, backend="eager") if compiled else net
    with torch.no_grad():
        got = call(rows, attention_mask=mask, position_ids=positions, use_cache=False).logits
        want = net(ids, use_cache=False).logits
    torch.testing.assert_close(got[:, 3:], want.expand(2, -1, -1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("compiled", [False, True])
def test_padding_inside_an_example_does_not_split_it(compiled: bool, attention: str) -> None:
    net, whole = model(router="rmoe", experts="batched_mm").eval(), tokens(1, 9)
    net.set_attn_implementation(attention)
    ids = torch.cat((whole[:, :4], tokens(1, 2, seed=1), whole[:, 4:]), 1)
    mask = torch.tensor([[1] * 4 + [0] * 2 + [1] * 5])
    positions = mask.cumsum(-1) - 1
    call = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
    with torch.no_grad():
        got = call(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        want = net(whole, use_cache=False).logits
        torch.testing.assert_close(got[mask.bool()][None], want)
        if attention == "sdpa":  # the same in a row with another example
            got = call(
                torch.cat((ids, whole), 1),
                attention_mask=torch.cat((mask, torch.ones_like(whole)), 1),
                position_ids=torch.cat((positions, torch.arange(9)[None]), 1),
                use_cache=False,
            ).logits
            torch.testing.assert_close(got[:, :11][mask.bool()][None], want)
            torch.testing.assert_close(got[:, 11:], want)


@since("transformers", "5.24", "the attention function updates a paged cache, not the layer")
def test_a_cache_without_a_length_is_one_of_packed_requests() -> None:
    """Continuous batching: one row, whose mask says which keys a token sees and not which tokens are real."""
    net, seen = model(router="smoe", num_hidden_layers=2).eval(), []

    def keep(gate: nn.Module, inputs: tuple, named: dict) -> None:
        seen.append(named["context"])

    net.routers[0].register_forward_pre_hook(keep, with_kwargs=True)

    class Paged:
        is_compileable = False

        def update(
            self, keys: Tensor, values: Tensor, *args: object, **kwargs: object
        ) -> tuple[Tensor, Tensor]:
            return tuple(
                torch.cat((part, torch.zeros_like(part)), 2) for part in (keys, values)
            )  # free pages

    mask = torch.zeros(1, 1, 4, 8)
    mask[..., 4:] = -torch.inf
    ids = tokens(1, 4)
    out = net.model(ids, attention_mask=mask, position_ids=torch.arange(4)[None], cache=Paged())
    assert seen[0].mask is None
    assert out.last_hidden_state.isfinite().all()


def test_what_a_forward_pass_is_asked_for() -> None:
    """Raw scores of experts alone, also beside a skip class; the balance loss without labels; a classifier's cache."""
    net, ids = model(router="eda").eval(), tokens(2, 5)
    out = net(ids, output_router_logits=True)
    assert [tuple(logits.shape) for logits in out.router_logits] == [(10, 5)] * 2
    assert out.loss is None
    assert net(ids).aux_loss is None
    asked = model(router="smoe").eval()(ids, output_router_logits=True)
    assert asked.loss is None
    assert float(asked.aux_loss.detach()) > 0
    classifier = RMoEForSequenceClassification(config(num_labels=3, router="smoe"))
    initialize(classifier, 0)
    classifier.eval()
    first = classifier(ids[:, :3], use_cache=True)
    whole = classifier(ids)
    rest = classifier(
        ids[:, 3:], past_key_values=first.past_key_values, position_ids=torch.tensor([[3, 4]]), use_cache=True
    )
    assert (rest.logits - whole.logits).abs().max() < 1e-5
    assert (rest.logits - classifier(ids, position_ids=torch.arange(5)[None] + 7).logits).abs().max() < 1e-4
    assert (whole.logits - classifier(ids, position_ids=2 * torch.arange(5)[None]).logits).abs().max() > 1e-4
    assert whole.router_logits is None
    assert len(classifier(ids, output_router_logits=True).router_logits) == 2
    for labels, kind in ((torch.tensor([0, 2]), "one"), (torch.rand(2, 3), "several")):
        out = classifier(ids, labels=labels)
        logits = out.logits.double()
        if kind == "one":
            wanted = -logits.log_softmax(-1)[torch.arange(2), labels].mean()
        else:
            wanted = -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).mean()
        assert math.isclose(float(out.task_loss), float(wanted), rel_tol=1e-5)
        assert math.isclose(float(out.loss), float(out.task_loss + out.balance_loss), rel_tol=1e-6)
        classifier.config.problem_type = None


def test_chunks_of_the_loss_hold_as_many_rows_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float32 logits; 262 rows at a vocabulary of 32,000. What is not asked for is empty."""
    assert head.CHUNK_BYTES // (4 * 32_000) == 262
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 11 * 4)
    rows: list[int] = []
    plain = torch.nn.functional.log_softmax

    def record(logits: Tensor, dim: int) -> Tensor:
        rows.append(logits.shape[0])
        return plain(logits, dim)

    monkeypatch.setattr("torch.nn.functional.log_softmax", record)
    hidden, weight, targets = randn(10, 5), randn(11, 5, seed=1), torch.arange(10)
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        rows.clear()
        found = head.chunked_cross_entropy(hidden, weight, targets, torch.tensor(10), torch.float64, *wanted)
        assert rows == [4, 4, 2]
        assert [part.numel() for part in found[1:]] == [50 * wanted[0], 55 * wanted[1]]


# ---- precision, defaults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sorted_mm", "grouped_mm", "batched_mm", "auto"])
def test_block_in_bfloat16_gives_bfloat16_back(implementation: str, autocast: bool) -> None:
    """Weights in float32 come from the router; the stream keeps its own dtype, also under autocast."""
    settings = config(router="smoe", hidden_size=48, moe_intermediate_size=24)
    settings._experts_implementation = implementation
    block = RMoESparseMoeBlock(settings, 0)
    for i, parameter in enumerate(block.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=i).float()
    x = randn(2, 7, 48, seed=9).float()
    context = RouterContext(2, 7)
    routing = block.gate(x.view(14, 48), (), None, context)[0]
    exact = block(x, routing)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            low = block(x, routing)
    else:
        low = block.bfloat16()(x.bfloat16(), routing)
        assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("architecture", [PRE, POST], ids=["gated", "plain"])
def test_one_token_without_gradients_in_every_dtype(architecture: dict) -> None:
    """Weights that differ, an empty slot: the shortest path adds up what the plain loop does."""
    settings = config(router="smoe", num_experts_per_tok=3, num_shared_experts=0, **architecture)
    settings._experts_implementation = "sorted_mm"
    block = RMoESparseMoeBlock(settings, 0).double()
    for i, parameter in enumerate(block.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=i)
    x, index = randn(1, 36, seed=9), torch.tensor([[3, 5, 1]])
    weights = torch.tensor([[0.7, 0.0, 0.2]], dtype=torch.float64)
    own = dict(block.experts.named_parameters())
    first = own["gate_up_proj" if settings.mlp_gated else "up_proj"]
    wanted = sum(
        w * naive.expert(x[0], first[n], own["down_proj"][n], settings.mlp_gated)
        for n, w in ((3, 0.7), (1, 0.2))
    )
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        block.to(dtype)
        with torch.no_grad():
            got = block.experts(x.to(dtype), index, weights.to(dtype))
        assert got.dtype == dtype
        assert (got[0].double() - wanted).norm() < bound * wanted.norm()


def test_whole_16_bytes() -> None:
    for hidden, width, whole in (
        (48, 24, True),
        (48, 20, False),
        (36, 24, False),
        (36, 20, False),
        (8, 8, True),
    ):
        assert in_whole_16_bytes(hidden, width, torch.bfloat16) == whole
    assert in_whole_16_bytes(36, 20, torch.float32)
    assert not in_whole_16_bytes(36, 18, torch.float32)


def test_defaults() -> None:
    """Of a configuration without a word: what transformers' MoE models do, and this package's experts."""
    net, ids = model(router="smoe").eval(), tokens(1, 4)
    out = net(ids)
    assert out.past_key_values.get_seq_length() == 4
    assert net(ids, use_cache=False).past_key_values is None
    assert (out.router_logits, out.hidden_states, out.attentions, out.routing) == (None, None, None, None)
    assert net.lm_head.weight is not net.model.embed_tokens.weight
    assert net.model.layers[0].self_attn.q_proj.bias is None
    assert int(net.model.routing_noise_key) == 0
    for asked in ("eager", "grouped_mm", "auto"):
        assert model(experts=asked).config._experts_implementation == asked
    assert RMoEForCausalLM(config()).config._experts_implementation == "auto"
    classifier = RMoEForSequenceClassification(config(num_labels=3))
    initialize(classifier, 0)
    assert classifier.eval()(ids).routing is None
    assert len(classifier(ids, output_routing=True).routing) == 2
    with pytest.raises(RequestError, match="num_attention_heads is 0; allowed: 1 or more"):
        config(num_attention_heads=0, head_dim=None)
    with pytest.raises(
        RequestError, match=r"num_attention_heads is 7; allowed: a divisor of hidden_size \(36\)"
    ):
        config(num_attention_heads=7, num_key_value_heads=None, head_dim=None)


@pytest.mark.parametrize("name", ["prelu", "xielu"])
def test_activations_with_parameters_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"hidden_act is '{name}'; allowed: one of gelu, "):
        config(hidden_act=name)


def test_balance_loss_sees_what_the_layers_share() -> None:
    """One scorer for all layers, held near orthogonal: `1e-2 |R R^T - I|_1 / E^2`, the same for each."""
    balance = BalanceSpec(losses=(SimilarityPreserving(),))
    spec = vary(resolve("smoe"), scorer=Linear.Config(shared_layers=0), balance=balance)
    net, ids = model(router=spec.to_dict()), tokens()
    matrix = net.model.router_shared.scorer.groups[0].weight
    wanted = 1e-2 * (matrix @ matrix.T - torch.eye(5)).abs().sum() / 25
    assert math.isclose(float(net(ids, labels=ids).balance_loss), float(wanted), rel_tol=1e-5)


def test_packed_examples_do_not_see_each_other_with_the_default_cache() -> None:
    """`config.use_cache` is True by default: a cache of our own would join them."""
    net, ids = model(router="rmoe").eval(), tokens(2, 8)
    positions = torch.arange(4).repeat(2)[None].expand(2, -1)
    got = net(ids, position_ids=positions)
    assert got.get(CACHE) is None
    assert torch.allclose(got.logits[:, 4:], net(ids[:, 4:]).logits, atol=1e-5)
    assert net(ids, position_ids=torch.arange(8)[None].expand(2, -1)).get(CACHE) is not None


def test_a_classifier_behind_a_cache_takes_a_mask_of_all_it_has_seen() -> None:
    settings = config(num_labels=3, router="smoe", pad_token_id=0)
    net = RMoEForSequenceClassification(settings).eval()
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    cache = net.model(ids[:, :4], use_cache=True).get(CACHE)
    got = net(ids[:, 4:], attention_mask=mask, **{CACHE: cache})
    assert torch.allclose(got.logits, net(ids, attention_mask=mask).logits, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_classifier_takes_a_mask_of_who_sees_whom(batch: int) -> None:
    """`[B, 1, S, S]` says nothing of padding: the token ids do."""
    net = RMoEForSequenceClassification(config(num_labels=3, router="smoe", pad_token_id=0)).eval()
    ids = tokens(batch, 7).clamp(min=1)
    ids[-1, 5:] = 0
    causal = torch.ones(batch, 1, 7, 7).tril().bool()
    assert torch.allclose(net(ids, attention_mask=causal).logits, net(ids).logits, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_one_mask_of_who_sees_whom_for_all_rows(rows: int) -> None:
    """`[1, 1, S, size]` is broadcast, as attention does, where a static cache has more columns than tokens."""
    net, ids = model(router="smoe").eval(), tokens(2, 7)
    least = torch.finfo(torch.float32).min
    mask = torch.zeros(rows, 1, 7, 16).masked_fill(~torch.ones(7, 16).tril().bool(), least)
    cache = StaticCache(config=net.config, max_cache_len=16)
    got = net(ids, attention_mask=mask, **{CACHE: cache})
    want = net(ids, use_cache=False)
    assert torch.allclose(got.logits, want.logits, atol=1e-5)
    assert torch.equal(got.router_stats.counts, want.router_stats.counts)


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
@pytest.mark.parametrize("changes", [{"router": "rmoe"}, {"router": "smoe", "dense_gradients": "densemixer"}])
def test_gradients_by_torch_func(changes: dict, experts: str) -> None:
    """Per-sample gradients, influence functions: what is written by hand must not be in their way.

    torch's custom operators cannot be, so not with `sorted_mm`, nor `auto`, which may choose it.
    """
    net, ids = model(experts=experts, **changes).train(), tokens()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        return torch.func.functional_call(net, parameters, (), inputs).loss

    found = torch.func.grad(loss)(dict(net.named_parameters()))
    _, want = loss_and_gradients(net, ids)
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient)
