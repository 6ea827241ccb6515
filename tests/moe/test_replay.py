"""A replayed pass takes the recorded experts, with weights and gradients of the live scores; all else stays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmoe.compat import CACHE, enable_checkpointing
from rmoe.errors import RequestError, RunError
from rmoe.graft import graft
from rmoe.moe import Recorder, Recording, listen, record, replay, routed_layers
from rmoe.moe.recording import UNKNOWN
from rmoe.results.trace import NO_EXPERT, Trace, TraceMeta, read_trace, write_trace
from tests.analysis.tiny_rmoe import tiny_rmoe
from tests.graft.conftest import SPEC, at_work
from tests.graft.tiny_families import tiny_model
from tests.versions import older

OLD = older("transformers", "5.23")  # families it lacks, or whose routers give no logits there

FAMILIES = (
    "olmoe",
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "llama4_text",
    "jamba",
    "zaya",
    *([] if OLD else ["longcat_flash"]),
    "deepseek_v4",
    "gemma4_text",
    *([] if OLD else ["inkling2_loop_text"]),
)
IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A family's tiny model, `rmoe`, or `graft`."""
    if name == "rmoe":
        return tiny_rmoe("rmoe").to(dtype).eval()
    if name == "graft":
        return at_work(graft(tiny_model("qwen3_moe", dtype=dtype), SPEC)).eval()
    return tiny_model(name, dtype=dtype)


def in_two_threads(model: nn.Module, calls: list[Callable[[], Any]]) -> list[Any]:
    """Both calls are in the first routed layer, each between its router and its experts, before either goes on."""
    both, found = threading.Barrier(2, timeout=30), dict[int, Any]()

    def call(at: int) -> None:
        found[at] = calls[at]()

    def wait(*given: Any) -> None:
        both.wait()

    handle = routed_layers(model)[0].gate.register_forward_hook(wait)
    threads = [threading.Thread(target=call, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    return [found[at] for at in range(2)]


@pytest.mark.parametrize("name", ["rmoe", "olmoe"])
@torch.no_grad()
def test_two_threads_in_one_model(name: str) -> None:
    """Each pass is its own thread's, recorded and replayed."""
    model = made(name)
    alone = []
    for row in IDS:
        with record(model) as recording:
            output_of(model, row[None])
        alone.append(recording.sequences[0].ids)
    calls = [lambda row=row: output_of(model, row[None]) for row in IDS]
    with record(model) as together:
        in_two_threads(model, calls)
    assert len(together.sequences) == 2
    for sequence in together.sequences:
        of = [at for at in range(2) if torch.equal(sequence.tokens, IDS[at])]
        assert [torch.equal(sequence.ids, alone[at]) for at in of] == [True]
    with replay(model, together):
        replayed = in_two_threads(model, calls)
    for found, row in zip(replayed, IDS, strict=True):
        torch.testing.assert_close(found, output_of(model, row[None]))


def output_of(model: nn.Module, ids: Tensor = IDS, **given: Any) -> Tensor:
    return model(input_ids=ids, use_cache=False, **given)[0]


def loss_of(model: nn.Module, ids: Tensor = IDS, **given: Any) -> Tensor:
    """Of a language model's logits; of another model's hidden states."""
    return output_of(model, ids, **given).float().square().mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def chosen(model: nn.Module, **given: Any) -> list[Tensor]:
    found: list[Tensor] = []
    layers = routed_layers(model)
    if layers[0].reader.at == "router":
        with listen(layers, lambda layer, one: found.append(one.experts)), torch.no_grad():
            output_of(model, **given)
        return found
    handles = [
        layer.experts.register_forward_pre_hook(lambda module, args: found.append(args[1]))
        for layer in layers
    ]
    with torch.no_grad():
        output_of(model, **given)
    for handle in handles:
        handle.remove()
    return found


def shift_gates(model: nn.Module) -> None:
    """Other router weights: other live choices."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in routed_layers(model):
            for parameter in layer.gate.parameters():
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("name", [*FAMILIES, "rmoe", "graft"])
def test_replay_is_the_recorded_pass_bit_for_bit(name: str) -> None:
    model = made(name)
    with record(model) as recording:
        loss = loss_of(model)
    want = gradients(model, loss)
    assert recording.ids.shape[0] == IDS.numel()
    assert torch.equal(recording.tokens, IDS.flatten())
    with replay(model, recording):
        again = loss_of(model)
    got = gradients(model, again)
    assert torch.equal(loss, again)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert all(not module._forward_hooks and "forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", [*FAMILIES, "rmoe", "graft"])
def test_other_weights_take_the_replayed_choice(name: str) -> None:
    exact = "inkling2_loop_text"  # some of its weights stay in float32
    model = made(name, torch.float32 if name == exact else torch.bfloat16)
    with record(model) as recording, torch.no_grad():
        output_of(model)
    shift_gates(model)
    live = chosen(model)
    with replay(model, recording):
        forced = chosen(model)
    assert any(not torch.equal(a, b) for a, b in zip(live, forced, strict=True))
    for index, experts in enumerate(forced):
        want = recording.ids[:, index, : experts.shape[1]].long()
        if name == "zaya":
            want = (
                want % routed_layers(model)[index].num_experts
            )  # it hands a skip on as expert 0 of weight 0
        assert torch.equal(experts.sort(-1).values, want.sort(-1).values)
    assert all(torch.equal(a, b) for a, b in zip(chosen(model), live, strict=True))


def test_weights_follow_from_the_live_scores_with_their_gradient() -> None:
    """Against a naive float64 mixture of Mixtral's experts with the ids given."""
    model = made("mixtral")
    with record(model) as recording, torch.no_grad():
        output_of(model)
    shift_gates(model)
    layer = routed_layers(model)[0]
    block = model.get_submodule(layer.name)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)

    block.register_forward_hook(keep)
    with replay(model, recording):
        output_of(model)
    outputs[0].square().sum().backward()
    x = inputs[0].detach().double().flatten(0, 1)
    gate = layer.gate.weight.detach().double().requires_grad_()
    ids = recording.ids[:, 0].long()
    weights = (x @ gate.T).softmax(-1).gather(1, ids)
    weights = weights / weights.sum(-1, keepdim=True)
    first, down = (getattr(layer.experts, n).detach().double() for n in ("gate_up_proj", "down_proj"))
    y = torch.zeros_like(x)
    for slot in range(ids.shape[1]):
        inner = torch.einsum("td,tid->ti", x, first[ids[:, slot]])
        a, b = inner.chunk(2, -1)
        y = y + weights[:, slot : slot + 1] * torch.einsum(
            "ti,tdi->td", nn.functional.silu(a) * b, down[ids[:, slot]]
        )
    torch.testing.assert_close(outputs[0].flatten(0, 1).double(), y.detach(), atol=1e-6, rtol=1e-4)
    y.square().sum().backward()
    torch.testing.assert_close(layer.gate.weight.grad.double(), gate.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gemma4_text", "rmoe", "graft"])
def test_checkpointing_and_accumulation(name: str) -> None:
    """Two passes before one backward pass, whose layers run again: each with the ids of its own pass."""
    model = made(name).train()
    batches = IDS[:1], IDS[1:]
    with record(model) as recording, torch.no_grad():
        for batch in batches:
            output_of(model, batch)
    shift_gates(model)
    with replay(model, recording):
        want = gradients(model, sum(loss_of(model, batch) for batch in batches))
    enable_checkpointing(model)
    with replay(model, recording):
        got = gradients(model, sum(loss_of(model, batch) for batch in batches))
    with record(model) as again:
        gradients(model, loss_of(model))
    assert len(again.sequences) == 2  # what ran again was not recorded again
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("name", ["olmoe", "rmoe", "graft"])
@pytest.mark.parametrize("left", [False, True])
def test_padding_and_packing(name: str, left: bool) -> None:
    model = made(name)
    short, long = IDS[0, :7], IDS[1]
    with record(model) as recording, torch.no_grad():
        output_of(model, short[None])
        output_of(model, long[None])
    shift_gates(model)
    with replay(model, recording), torch.no_grad():
        alone = [output_of(model, one[None])[0] for one in (short, long)]
    pad = torch.zeros(5, dtype=torch.int64)
    padded = torch.cat([pad, short] if left else [short, pad])
    ids = torch.stack([long, padded])  # in another order than recorded, too
    mask = torch.ones_like(ids)
    mask[1, slice(0, 5) if left else slice(7, 12)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with replay(model, recording), torch.no_grad():
        together = output_of(model, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(together[0], alone[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[1][mask[1].bool()], alone[0], atol=1e-5, rtol=1e-4)
    packed = torch.cat([short, long])[None]
    at = torch.cat([torch.arange(7), torch.arange(12)])[None]
    with replay(model, recording), torch.no_grad():
        row = output_of(model, packed, position_ids=at)[0]
    torch.testing.assert_close(row, torch.cat(alone), atol=1e-5, rtol=1e-4)
    with record(model) as again, torch.no_grad():
        output_of(model, packed, position_ids=at)
        output_of(model, ids, attention_mask=mask, position_ids=positions)
    assert again.lengths == [7, 12, 12, 7]


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "rmoe", "graft"])
def test_a_generation_is_replayed_in_training_and_in_generation(name: str) -> None:
    model = made(name)
    prompt = torch.cat([torch.zeros(1, 2, dtype=torch.int64), IDS[:1, :4]], dim=1)
    prompts = torch.cat([IDS[1:, :6], prompt])
    mask = torch.ones_like(prompts)
    mask[1, :2] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with record(model) as recording:
        texts = model.generate(prompts, attention_mask=mask, **options)
    assert recording.lengths == [10, 8]  # the last token was never read
    assert torch.equal(recording.sequences[1].tokens, texts[1, 2:-1])
    shift_gates(model)
    whole = torch.cat([mask, torch.ones(2, 5, dtype=torch.int64)], dim=1)
    positions = (whole.cumsum(-1) - 1).clamp(min=0)
    with replay(model.train(), recording):
        loss = model(input_ids=texts, attention_mask=whole, position_ids=positions, labels=texts).loss
        loss.backward()
        forced = chosen(model, ids=texts, attention_mask=whole, position_ids=positions)
    real = whole.flatten().bool()
    last = torch.zeros_like(whole)
    last[:, -1] = 1
    rows = real & ~last.flatten().bool()
    for index, experts in enumerate(forced):
        assert torch.equal(experts[rows], recording.ids[:, index].long())
    gates = [layer.gate for layer in routed_layers(model)]
    assert all(any(p.grad is not None and p.grad.any() for p in gate.parameters()) for gate in gates)
    model = made(name)
    with replay(model, recording), record(model) as again:
        assert torch.equal(model.generate(prompts, attention_mask=mask, **options), texts)
    assert torch.equal(again.ids, recording.ids)


def test_what_a_capacity_limit_dropped_is_recorded_as_no_expert_and_not_replayed() -> None:
    """What is dropped depends on the batch: a recording cannot say it for another one."""
    model = tiny_rmoe("smoe-capacity")
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    with record(model) as recording:
        routing = model(ids, use_cache=False, output_routing=True).routing
    recorded = torch.cat([sequence.ids for sequence in recording.sequences])
    for layer, one in enumerate(routing):
        assert one.dropped is not None
        assert one.dropped.any()
        assert torch.equal(recorded[:, layer] == model.config.num_experts, one.dropped)
    with pytest.raises(RequestError, match="a router without a capacity limit"), replay(model, recording):
        model(ids, use_cache=False)


def test_what_does_not_fit_is_refused() -> None:
    model = made("olmoe")
    with record(model) as recording, torch.no_grad():
        output_of(model)
    with (
        replay(model, recording),
        torch.no_grad(),
        pytest.raises(RequestError, match="a sequence of the recording"),
    ):
        output_of(model, IDS + 1)
    fewer = Recording(recording.layers, (4,) * 4, recording.top_k, recording.sequences)
    other = Recording(("model.layers.9.mlp",), (8,), (2,), [])
    for wrong in (fewer, other):
        with pytest.raises(RequestError, match="recording is"), replay(model, wrong):
            pass
    with pytest.raises(RunError, match="outside a forward pass"), replay(model, recording):
        model.model(input_ids=IDS)
    with pytest.raises(RequestError, match="one stack of routed layers"), record(made("switch_transformers")):
        pass
    sampled = made("phimoe")
    with record(sampled) as recording, torch.no_grad():
        output_of(sampled)
    with replay(sampled.train(), recording), pytest.raises(RunError, match="did not take the choice"):
        output_of(sampled)


def test_a_recording_is_its_arrays() -> None:
    model = made("hunyuan_v1_moe")
    with record(model) as recording, torch.no_grad():
        output_of(model)
        output_of(model, IDS[:, :5])
    assert recording.lengths == [12, 12, 5, 5]
    part = recording.select([3, 0])
    assert torch.equal(part.tokens, torch.cat([IDS[1, :5], IDS[0]]))
    want = Recorder(model)(IDS)
    assert all(torch.equal(recording.ids[:24, i].long(), one.experts) for i, one in enumerate(want))


@pytest.mark.parametrize(
    "name", ["olmoe", "zaya", "rmoe"]
)  # zaya: tokens that skip, which must be forced too
def test_a_recording_comes_back_from_a_trace_on_file(name: str, tmp_path: Path) -> None:
    model = made(name)
    with record(model) as recording, torch.no_grad():
        want = output_of(model)
    write_trace(tmp_path / "t.safetensors", recording.trace("m"))
    trace = read_trace(tmp_path / "t.safetensors")
    assert (trace.experts == NO_EXPERT).any() == (name == "zaya")
    back = Recording.of(trace)
    assert (back.layers, back.num_experts, back.top_k) == (
        recording.layers,
        recording.num_experts,
        recording.top_k,
    )
    assert back.lengths == recording.lengths
    assert torch.equal(back.ids, recording.ids)
    assert torch.equal(back.tokens, recording.tokens)
    shift_gates(model)
    with torch.no_grad():
        assert not torch.equal(output_of(model), want)
    forced = made(name)
    with replay(forced, trace), torch.no_grad():
        assert torch.equal(output_of(forced), want)


def test_layers_of_fewer_slots_come_back_from_a_trace() -> None:
    ids = np.array([[[0, 3], [1, NO_EXPERT]], [[2, NO_EXPERT], [NO_EXPERT, NO_EXPERT]]], np.int16)
    meta = TraceMeta(
        model="m", source="vllm", layer_names=["a", "b"], num_experts=[4, 2], experts_per_token=[2, 1]
    )
    recording = Recording.of(Trace(ids, None, np.array([2]), meta))
    assert recording.ids.tolist() == [[[0, 3], [1, UNKNOWN]], [[2, 4], [2, UNKNOWN]]]
    assert recording.tokens.tolist() == [UNKNOWN, UNKNOWN]
    again = recording.trace("m")
    np.testing.assert_array_equal(again.experts, ids)
    assert again.tokens is None


def test_the_longest_of_the_recorded_sequences_that_agree_is_replayed() -> None:
    """Also where the start of a sequence was recorded before it, or the one before it begins alike."""
    model = made("olmoe")
    with record(model) as recording, torch.no_grad():
        for length in (2, 12, 5):
            output_of(model, IDS[:1, :length])
    shift_gates(model)
    with replay(model, recording), record(model) as again, torch.no_grad():
        output_of(model, IDS[:1])
        output_of(model, IDS[:1, :5])
    assert torch.equal(again.sequences[0].ids.sort(-1).values, recording.sequences[1].ids.sort(-1).values)
    assert torch.equal(again.sequences[1].ids.sort(-1).values, recording.sequences[2].ids.sort(-1).values)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])  # one mask, and one for each kind of attention
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_generation_of_padded_prompts_is_recorded_without_padding(name: str, cache: str | None) -> None:
    model = made(name)
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS[:, :4]], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    given = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    with record(model) as recording:
        made_ids = model.generate(ids, attention_mask=mask, cache_implementation=cache, **given)
    # The last token was never read.
    want = [made_ids[0, 3:-1].tolist(), made_ids[1, :-1].tolist()]
    assert [one.tokens.tolist() for one in recording.sequences] == want


@pytest.mark.parametrize("pad", [None, 0, "end"])
def test_what_generation_writes_behind_an_end_token_is_not_recorded(pad: Any) -> None:
    model, options = made("olmoe"), {"max_new_tokens": 6, "do_sample": False}
    free = model.generate(IDS, **options, eos_token_id=None)[:, IDS.shape[1] :].tolist()
    end = next(token for token in free[0][:4] if token not in free[1])  # ends the first row alone
    model.generation_config.eos_token_id = [end, 63]
    model.generation_config.pad_token_id = end if pad == "end" else pad
    with record(model) as recording:
        texts = model.generate(IDS, **options)
    assert texts.shape[1] == IDS.shape[1] + 6
    first = IDS.shape[1] + free[0].index(end) + 1
    assert recording.lengths == [first, texts.shape[1] - 1]
    assert recording.sequences[0].tokens.tolist() == texts[0, :first].tolist()


def test_an_end_token_in_a_text_is_kept() -> None:
    model = made("olmoe")
    model.generation_config.eos_token_id = 5
    ids = torch.tensor([[3, 4, 5, 5, 5]])
    with record(model) as recording, torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        model(input_ids=torch.tensor([[7, 5, 9]]), **{CACHE: out[CACHE]})
    assert recording.sequences[0].tokens.tolist() == [3, 4, 5, 5, 5, 7, 5, 9]


@pytest.mark.parametrize("name", ["olmoe", "rmoe"])
def test_drafts_of_an_early_exit_are_not_recorded(name: str) -> None:
    model, options = made(name), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with record(model) as plain:
        texts = model.generate(IDS[:1], **options)
    with record(model) as recording:
        assert torch.equal(model.generate(IDS[:1], **options, assistant_early_exit=1), texts)
    assert recording.layers == plain.layers
    (got,), (want,) = recording.sequences, plain.sequences
    length = min(len(got), len(want))
    assert length >= IDS.shape[1] + 4
    assert torch.equal(got.tokens[:length], want.tokens[:length])
    assert torch.equal(got.ids[:length].sort(-1).values, want.ids[:length].sort(-1).values)


def test_rejected_candidates_are_forgotten() -> None:
    model = made("olmoe")
    prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with record(model) as recording:
        ids = model.generate(prompt, prompt_lookup_num_tokens=3, **given)[0]
    (sequence,) = recording.sequences
    count = min(len(sequence), len(ids))
    assert count >= len(ids) - 1
    assert torch.equal(sequence.tokens[:count], ids[:count])
    with record(model) as whole, torch.no_grad():
        output_of(model, ids[None])
    assert torch.equal(sequence.ids[:count], whole.ids[:count])


def test_caches_may_take_turns() -> None:
    model = made("olmoe")
    with record(model) as recording, torch.no_grad():
        first = model(IDS[:1, :3], use_cache=True)[CACHE]
        model(IDS[1:, :3], use_cache=True)
        model(IDS[:1, 3:4], **{CACHE: first})
    assert [one.tokens.tolist() for one in recording.sequences] == [
        IDS[0, :4].tolist(),
        IDS[1, :3].tolist(),
    ]
    refused = pytest.raises(RequestError, match="the cache of passes that were recorded")
    with refused, record(model), torch.no_grad():
        model(IDS[:1, 4:5], **{CACHE: first})


def test_virtual_tokens_of_a_wrapper_are_refused() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(made("olmoe"), settings).eval()
    with pytest.raises(RequestError, match="not 30 for 24"), record(model), torch.no_grad():
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    with record(model.get_base_model()) as recording, torch.no_grad():
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert recording.lengths == [15, 15]


def test_a_forward_put_on_an_instance_stays() -> None:
    """Accelerate's hooks do it, and so does an outer replay."""
    model = made("olmoe")
    with record(model) as recording, torch.no_grad():
        want = output_of(model)
    block, calls = model.get_submodule(routed_layers(model)[0].name), []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return type(block).forward(block, *args)

    block.forward = counted
    with torch.no_grad():
        with replay(model, recording), replay(model, recording):
            assert torch.equal(output_of(model), want)
        assert block.forward is counted
        output_of(model)
    assert len(calls) == 2


@pytest.mark.parametrize("family", ["olmoe", "rmoe", "graft"])
def test_a_router_that_peft_trains_whole_is_read(family: str) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["gate"])
    model = peft.get_peft_model(made(family), settings).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])
    with torch.no_grad():
        with record(model) as recording:
            want = model(input_ids=ids).logits
        with replay(model, recording):
            assert torch.equal(model(input_ids=ids).logits, want)
