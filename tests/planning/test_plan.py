"""Plans against real runs: tensors held, operations counted, parameters, and what the command prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rmoe.cli.arguments import parse
from rmoe.cli.main import main
from rmoe.cli.train import run as train
from rmoe.data import prepare
from rmoe.errors import RequestError
from rmoe.model import RMoEConfig, RMoEForCausalLM, count_parameters
from rmoe.parallel import ParallelConfig, PipelinePart
from rmoe.planning.hardware import ACCELERATORS, Cluster
from rmoe.planning.layouts import (
    layouts_for,
    longest_stage,
    memory_of,
    name_of,
    parameters_per_device,
    traffic_of,
)
from rmoe.planning.plan import plan_of
from rmoe.planning.trace import flops_of, needs_of, parameters_of
from rmoe.training.build import build_model, model_config
from rmoe.training.config import RunConfig
from tests.planning.peak import allocated_in_a_step, peak_of_a_step
from tests.training.tiny import text
from tests.versions import older

POST = {"norm_position": "post", "norm_type": "layernorm", "mlp_gated": False, "hidden_act": "relu"}
DENSE = {"first_k_dense_replace": 1, "num_shared_experts": 1, "num_key_value_heads": 2}
CLUSTER = Cluster(8, 8, ACCELERATORS["h100"])


def config(**changes: Any) -> RMoEConfig:
    sizes = {
        "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 96,
    }  # fmt: skip
    return RMoEConfig(**{**sizes, **changes})


def model(settings: RMoEConfig, attention: str, experts: str) -> RMoEForCausalLM:
    built = RMoEForCausalLM._from_config(
        settings, attn_implementation=attention, experts_implementation=experts
    )
    return built.train()


@pytest.mark.parametrize(("changes", "checkpointing"), [(DENSE, False), ({}, True), (POST, True)])
def test_memory_is_within_a_tenth_of_a_real_step(changes, checkpointing):
    settings = config(**changes)
    needs = needs_of(settings, 256, bf16=False)
    planned = memory_of(needs, settings, ParallelConfig(), 4, 256, bf16=False, checkpointing=checkpointing)
    net = model(settings, "sdpa", "grouped_mm")
    if checkpointing:
        net.gradient_checkpointing_enable()
    assert planned.peak == pytest.approx(peak_of_a_step(net, 4, 256), rel=0.1)


def test_memory_of_a_small_batch_is_gradients():
    settings = config(**DENSE)
    planned = memory_of(needs_of(settings, 32, bf16=False), settings, ParallelConfig(), 1, 32, False, False)
    real = peak_of_a_step(model(settings, "sdpa", "grouped_mm"), 1, 32)
    assert planned.peak == pytest.approx(real, rel=0.1)
    assert planned.gradients > planned.activations


@pytest.mark.parametrize(("batch", "length"), [(4, 256), (1, 32)])
def test_memory_of_a_step_in_several_passes_has_the_sum_of_the_earlier_ones(batch: int, length: int) -> None:
    settings = config(num_experts=16)
    needs = needs_of(settings, length, bf16=False)
    planned = memory_of(needs, settings, ParallelConfig(), batch, length, False, False, passes=2)

    def begin() -> Callable[[], None]:
        net = model(settings, "sdpa", "grouped_mm")
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        ids = torch.randint(0, 512, (batch, length))

        def step() -> None:
            for _ in range(2):
                net(input_ids=ids, labels=ids, use_cache=False, output_logits=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    assert planned.peak == pytest.approx(allocated_in_a_step(begin), rel=0.1)


@pytest.mark.parametrize(
    ("router", "changes"),
    [
        ("rmoe", {}),
        ("rmoe", DENSE),
        ("smoe", POST),
        ("rmoe-lstm", {}),
        ("rmoe", {"num_hidden_layers": 1}),
        *(("mcf-moe", {"num_hidden_layers": layers}) for layers in (1, 2, 4, 6)),
    ],
)
def test_flops_equal_torchs_counter(router, changes):
    settings = config(router=router, **changes)
    net = model(settings, "eager", "batched_mm")
    ids = torch.randint(0, 512, (1, 40))
    with FlopCounterMode(display=False) as counter:
        loss = net(input_ids=ids, labels=ids, use_cache=False).loss
        forward = counter.get_total_flops()
        loss.backward()
    flops = flops_of(settings, 40)
    assert flops.forward * 40 == forward
    assert flops.training * 40 == counter.get_total_flops()
    assert 0 < flops.router < flops.forward


def test_flops_by_hand():
    """Two per multiply-add: projections, attention's two squares, experts, router, output matrix."""
    length, d, layers = 40, 128, 6
    attention = 4 * d * d + 2 * length * d
    experts, router = 2 * 3 * d * 96, d * 8
    by_hand = 2 * (layers * (attention + experts + router) + d * 512)
    settings = config(router="smoe")
    if older("transformers", "5.23"):  # the rotary angles are a matrix product there
        by_hand += settings.head_dim
    assert flops_of(settings, length).forward == by_hand


@pytest.mark.parametrize(
    "changes", [{}, DENSE, {"tie_word_embeddings": True}], ids=["plain", "dense", "tied"]
)
def test_parameters_are_the_models(changes):
    settings = config(**changes)
    found, counted = parameters_of(settings), count_parameters(RMoEForCausalLM(settings))
    assert {name: getattr(found, name) for name in counted} == counted
    assert parameters_per_device(found, ParallelConfig()) == counted["total"]


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"num_hidden_layers": 5}, 4),
        (DENSE, 4),
        ({"vocab_size": 64, **DENSE}, 3),
        ({"num_hidden_layers": 2}, 2),
    ],
)
def test_a_pipeline_is_planned_by_its_fullest_stage(changes: dict[str, Any], stages: int) -> None:
    settings, layout = config(**changes), ParallelConfig(pipeline=stages)
    with torch.device("meta"):
        parts = [PipelinePart(RMoEForCausalLM(settings), index, stages) for index in range(stages)]
    fullest = max(sum(p.numel() for p in part.parameters()) for part in parts)
    assert parameters_per_device(parameters_of(settings), layout) == fullest
    assert longest_stage(settings.num_hidden_layers, layout) == max(len(part.trunk.layers) for part in parts)


def test_a_pipeline_waits_for_its_longest_stage() -> None:
    settings, four = config(num_hidden_layers=5), Cluster(4, 4, ACCELERATORS["h100"])
    plan = plan_of(settings, four, sequence_length=64, batch_size=8, gradient_checkpointing=False)
    seconds = {item.layout: item.seconds["compute"] for item in plan.layouts}
    assert seconds["PP 4"] == pytest.approx(seconds["DDP 4"] * 4 * 2 / 5)
    needs = needs_of(settings, 64, bf16=True)
    one, staged = (
        memory_of(needs, settings, layout, 1, 64, bf16=True, checkpointing=False).activations
        for layout in (ParallelConfig(), ParallelConfig(pipeline=4))
    )
    kept = needs.activations
    assert staged - 4 * kept.ends == pytest.approx(
        (one - kept.ends - kept.fixed) * 4 * 2 / 5 + kept.fixed * 2 / 5
    )


def test_what_layouts_send():
    settings = config()
    needs = needs_of(settings, 64, bf16=False)
    total = needs.parameters.total

    def sent(layout: ParallelConfig) -> dict[str, float]:
        found = traffic_of(needs, settings, layout, 4, 64, 2, bf16=False, checkpointing=False)
        return {f"{t.collective}/{t.purpose.split()[0]}": t.bytes for t in found}

    assert sent(ParallelConfig(replicate=4))["all_reduce/gradients"] == pytest.approx(2 * 3 / 4 * 4 * total)
    fsdp = sent(ParallelConfig(fsdp=4))
    assert fsdp["all_gather/weights,"] == pytest.approx(2 * 2 * 3 / 4 * 4 * total)
    assert fsdp["reduce_scatter/gradients"] == pytest.approx(2 * 3 / 4 * 4 * total)
    ep = sent(ParallelConfig(fsdp=4, expert=4))
    experts = needs.parameters.experts
    assert ep["all_gather/weights,"] == pytest.approx(2 * 2 * 3 / 4 * 4 * (total - experts))
    # 2 passes, 6 layers, there and back, forward and backward: each of 4 x 64 tokens to 2 experts, 3 of 4 elsewhere
    assert ep["all_to_all/tokens"] == 2 * 6 * 2 * 2 * (4 * 64 * 2 * 128 * 4 * 3 / 4)
    pipeline = traffic_of(
        needs, settings, ParallelConfig(pipeline=2), 4, 64, 2, bf16=False, checkpointing=False
    )
    states = next(t for t in pipeline if t.collective == "send")
    assert states.bytes == 2 * 4 * 2 * 64 * (128 + 128) * 4
    assert states.router_bytes == 2 * 4 * 2 * 64 * 128 * 4


def test_layouts_fit_the_cluster_and_the_model():
    names = [name_of(layout) for layout in layouts_for(config(), Cluster(16, 8, ACCELERATORS["h100"]))]
    assert names[:3] == ["DDP 16", "FSDP2 16", "HSDP 2 x FSDP2 8"]
    assert "FSDP2 16 + EP 8" in names
    assert "FSDP2 4 + TP 4" in names
    assert "FSDP2 2 + TP 8" not in names  # 4 heads
    assert all(layout.processes == 8 for layout in layouts_for(config(), CLUSTER))


def test_more_is_never_predicted_to_be_less():
    plan = plan_of(config(), CLUSTER, sequence_length=64, batch_size=64)
    assert plan.layouts[0].fits
    for item in plan.layouts:
        assert item.memory_gib["peak"] <= CLUSTER.memory_bytes / 2**30
        assert item.step_seconds >= item.seconds["compute"]
        assert (
            item.micro_batch_size * item.accumulation * item.groups["replicate"] * item.groups["fsdp"] == 64
        )
    assert plan.layouts[0].step_seconds == min(item.step_seconds for item in plan.layouts)


@pytest.mark.parametrize(
    ("name", "bf16", "tflops"), [("h100", True, 989), ("h100", False, 67), ("a100-80", False, 19.5)]
)
def test_time_is_the_precisions(name, bf16, tflops):
    """Float32 at its own peak: TF32, which is half of bfloat16's, is off."""
    one = Cluster(1, 1, ACCELERATORS[name])
    plan = plan_of(config(), one, sequence_length=64, batch_size=8, gradient_checkpointing=False, bf16=bf16)
    reached = 8 * 64 * plan.flops_per_token["training"] / plan.layouts[0].seconds["compute"]
    assert reached == pytest.approx(0.4 * tflops * 1e12)


def test_a_model_that_fits_nowhere_says_so():
    tiny = Cluster(1, 1, ACCELERATORS["a100-40"])
    wide = config(hidden_size=8192, moe_intermediate_size=8192, num_experts=64)
    assert not any(item.fits for item in plan_of(wide, tiny, sequence_length=64, batch_size=1).layouts)


def test_command(capsys):
    assert main(["plan", "--preset", "pretrain-0.9b", "--devices", "8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["total"] == pytest.approx(0.9e9, rel=0.02)
    assert plan["parameters"]["router"] - 24 * 1280 * 16 == pytest.approx(3.5e6, rel=0.05)  # the paper's
    assert {"weights", "gradients", "optimizer", "activations", "peak"} <= plan["layouts"][0][
        "memory_gib"
    ].keys()
    assert plan["layouts"][0]["fits"]
    assert plan["layouts"][0]["options"].startswith("--parallel.fsdp 8")


def test_command_prints_a_table(capsys):
    assert main(["plan", "--preset", "quick", "--devices", "2"]) == 0
    out = capsys.readouterr().out
    assert "DDP 2" in out
    assert "FSDP2 2 + EP 2" in out
    assert "PP 2" in out


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "total", "devices"), [("15b", 15.2e9, 64), ("70b", 70.7e9, 128)])
def test_large_presets(preset, total, devices, capsys):
    arguments = [
        "--devices",
        str(devices),
        "--vocab-size",
        "102400" if preset == "15b" else "32000",
        "--json",
    ]
    assert main(["plan", "--preset", f"pretrain-{preset}", *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["total"] == pytest.approx(total, rel=0.01)
    assert plan["layouts"][0]["fits"]


def test_what_is_given_binds_also_where_the_preset_says_the_same(capsys):
    own = RunConfig.from_preset("pretrain-0.9b").training.micro_batch_size
    base = ["plan", "--preset", "pretrain-0.9b", "--devices", "8", "--json"]
    chosen = []
    for more in ([], ["--training.micro-batch-size", str(own)], ["--as-set"]):
        assert main([*base, *more]) == 0
        layouts = json.loads(capsys.readouterr().out)["layouts"]
        chosen.append({item["micro_batch_size"] for item in layouts})
    assert chosen[1] == chosen[2] == {own}
    assert chosen[0] != {own}
    assert main([*base, "--engine", "slurm"]) == 2
    assert capsys.readouterr().err == "error: --engine is 'slurm'; allowed: unset without --grid\n"


def told(preset: str, options: str) -> RunConfig:
    """What `rmoe train --preset PRESET` makes of a plan's options."""
    bound = parse(train, ["--preset", preset, "--out", "run", *options.split()], "rmoe train")
    assert bound is not None
    found: RunConfig = bound.keywords["config"]
    return found


OWN = """
[training]
batch_size = 16
gradient_checkpointing = true
[parallel]
fsdp = 4
expert = 2
replicate = 2
"""


@pytest.mark.parametrize("preset", ["pretrain-0.9b", "quick", "own"])
def test_the_printed_options_train_what_was_priced(preset: str, tmp_path: Path, capsys: Any) -> None:
    if preset == "own":
        preset = str(tmp_path / "own.toml")
        Path(preset).write_text(OWN)
    assert main(["plan", "--preset", preset, "--devices", "8", "--json"]) == 0
    layouts = json.loads(capsys.readouterr().out)["layouts"]
    assert len(layouts) > 3
    for item in layouts:
        run = told(preset, item["options"])
        assert run.training.gradient_checkpointing == item["gradient_checkpointing"]
        assert run.training.micro_batch_size == item["micro_batch_size"]
        groups = item["groups"]
        if groups["replicate"] == 8:  # DDP: any number of copies
            groups = {**groups, "replicate": 1}
        assert asdict(run.parallel) == groups


def test_of_equally_fast_micro_batches_the_largest() -> None:
    one = Cluster(1, 1, ACCELERATORS["h100"])
    plan = plan_of(config(), one, sequence_length=64, batch_size=12, gradient_checkpointing=False)
    assert [item.micro_batch_size for item in plan.layouts] == [12]
    needs = needs_of(config(), 64, bf16=True)
    four, six = (
        memory_of(needs, config(), ParallelConfig(), micro, 64, True, False, passes=12 // micro).peak
        for micro in (4, 6)
    )
    gib = (four + six) / 2 / 2**30 / one.usable_memory
    small = replace(one, accelerator=replace(one.accelerator, memory_gib=gib))
    plan = plan_of(config(), small, sequence_length=64, batch_size=12, gradient_checkpointing=False)
    assert [item.micro_batch_size for item in plan.layouts] == [4]
    assert plan.layouts[0].fits


def test_a_plan_chooses_the_layout_itself(capsys: Any) -> None:
    for value in ("4", "1"):
        assert main(["plan", "--preset", "quick", "--parallel.fsdp", value, "--devices", "2"]) == 2
        said = f"error: --parallel.fsdp is {value}; allowed: unset: the plan chooses the layout\n"
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("more", "offered"),
    [
        (["--training.router-learning-rate", "1e-3"], {"DDP 2"}),
        (["--training.average", "2"], {"DDP 2"}),
        (["--training.compile"], {"DDP 2", "FSDP2 2", "FSDP2 2 + EP 2", "TP 2"}),
        (
            ["--training.micro-batch-size", "8"],
            {"TP 2"},
        ),  # a pipeline would have one micro-batch for two stages
        (["--training.micro-batch-size", "4"], {"DDP 2", "FSDP2 2", "FSDP2 2 + EP 2", "TP 2", "PP 2"}),
    ],
)
def test_what_training_refuses_is_not_offered(more: list[str], offered: set[str], capsys: Any) -> None:
    base = ["plan", "--preset", "quick", "--devices", "2", "--json", "--training.gradient-checkpointing"]
    assert main([*base, *more]) == 0
    assert {item["layout"] for item in json.loads(capsys.readouterr().out)["layouts"]} == offered


def test_a_plan_of_bytes_counts_the_trained_models_parameters(tmp_path: Path, capsys: Any) -> None:
    assert main(["plan", "--preset", "quick", "--devices", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    preset = RunConfig.from_preset("quick")
    corpus = prepare(replace(preset.data, path=str(text(tmp_path))), preset.training.sequence_length)
    trained = build_model(model_config(preset, corpus.vocab_size), seed=0)
    assert plan["parameters"]["total"] == count_parameters(trained)["total"]
    assert plan["assumptions"]["vocab_size"] == corpus.vocab_size


def test_a_plan_of_competition_names_it(capsys: Any) -> None:
    assert main(["plan", "--preset", "quick", "--router", "smoe", "--model.competition-rate", "0.5"]) == 2
    assert capsys.readouterr().err.startswith("error: model.competition_rate is 0.5; allowed: 0 in a plan")


@pytest.mark.parametrize(
    "arguments",
    [["--devices", "0"], ["--devices", "12"], ["--accelerator", "abacus"], ["--efficiency", "2"]],
)
def test_wrong_requests(arguments, capsys):
    assert main(["plan", "--preset", "quick", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_batch_nobody_can_share():
    with pytest.raises(RequestError, match=r"training\.batch_size is 3"):
        plan_of(config(num_hidden_layers=2), CLUSTER, sequence_length=16, batch_size=3, micro_batch_size=2)


def test_a_micro_batch_that_no_share_is_a_multiple_of_is_named():
    with pytest.raises(
        RequestError, match=r"training\.micro_batch_size is 7; allowed: a divisor of a device's share, 2"
    ):
        plan_of(config(num_hidden_layers=2), CLUSTER, sequence_length=16, batch_size=16, micro_batch_size=7)


def test_slots_that_may_stay_empty_are_said_to_be_counted():
    for router, said in (("smoe", False), ("top-p", True)):
        model = config(num_hidden_layers=2, router=router)
        plan = plan_of(model, CLUSTER, sequence_length=16, batch_size=16)
        assert ("slots" in plan.assumptions) == said


@pytest.mark.parametrize(
    ("fsdp", "tensor", "over_nodes"), [(8, 1, False), (4, 2, False), (8, 2, True), (2, 8, True)]
)
def test_a_sharding_group_behind_tensor_parallelism_reaches_over_nodes(
    fsdp: int, tensor: int, over_nodes: bool
) -> None:
    """transformers' mesh has TP innermost: devices that hold shards of one matrix are `tensor` apart."""
    settings, cluster = config(), Cluster(16, 8, ACCELERATORS["h100"])
    layout = ParallelConfig(fsdp=fsdp, tensor=tensor)
    found = traffic_of(needs_of(settings, 64, bf16=False), settings, layout, 1, 64, 1, False, False)
    slow, fast = cluster.bandwidth(16), cluster.bandwidth(8)
    assert slow < fast
    for collective, purpose in (("all_gather", "weights"), ("reduce_scatter", "gradients")):
        (sent,) = (one for one in found if one.collective == collective and one.purpose.startswith(purpose))
        assert cluster.bandwidth(sent.group) == (slow if over_nodes else fast)
