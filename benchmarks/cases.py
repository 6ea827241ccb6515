"""The registered cases: each measures its contestants in one run and gives rows for the table."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache, ZayaConfig
from transformers.models.zaya.modeling_zaya import ZayaRouter

from benchmarks import peers
from benchmarks.measure import Roofline, compare
from benchmarks.sizes import Size
from rmoe.routing.contract import RouterContext, State
from rmoe.routing.router import build_router, build_shared
from rmoe.routing.spec import Geometry
from rmoe.routing.zoo import resolve

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One size on one device. `bf16`: autocast for steps, bfloat16 weights for inference."""

    size: Size
    device: str
    roofline: Roofline
    rounds: int
    bf16: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Case:
    """A benchmark and the tests without which its figures mean nothing."""

    name: str
    measure: Callable[[Setting], list[Row]]
    tests: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(
    name: str, *tests: str
) -> Callable[[Callable[[Setting], list[Row]]], Callable[[Setting], list[Row]]]:
    """Register a case."""

    def keep(measure: Callable[[Setting], list[Row]]) -> Callable[[Setting], list[Row]]:
        CASES[name] = Case(name, measure, tests)
        return measure

    return keep


def rows(
    contestants: dict[str, Callable[[], object]], setting: Setting, flops: dict[str, float] | None = None
) -> list[Row]:
    """Measure, and put the roofline beside: `share` is the least time by count over the time measured."""
    timings = compare(contestants, setting.rounds, setting.device)
    found = []
    for name, timing in timings.items():
        row: Row = {"contestant": name, **timing._asdict()}
        if flops and name in flops:
            row["roofline_ms"] = 1e3 * setting.roofline.seconds(flops[name])
            row["share_of_roofline"] = row["roofline_ms"] / _spent(timing, setting)
        found.append(row)
    return found


def _spent(timing: Any, setting: Setting) -> float:
    """Milliseconds as the roofline counts them: with all threads at work."""
    return timing.cpu_ms / torch.get_num_threads() if setting.device == "cpu" else timing.wall_ms


@case("router", "tests/routing", "tests/contract/test_contract.py")
def router(setting: Setting) -> list[Row]:
    """All layers' routers alone, forward and backward, on random hidden states."""
    size = setting.size
    names = ("smoe", "rmoe", "eda")
    contestants: dict[str, Callable[[], object]] = {name: partial(_route(name, setting)) for name in names}
    contestants["ZAYA1 (transformers, k = 1)"] = _route_zaya(setting)
    flops = {name: 3.0 * size.tokens * size.router_flops(name) for name in names}
    return rows(contestants, setting, flops | {"ZAYA1 (transformers, k = 1)": flops["eda"]})


def _hidden(setting: Setting) -> Tensor:
    size = setting.size
    hidden = torch.randn(size.tokens, size.hidden, generator=torch.Generator().manual_seed(0))
    return hidden.to(setting.device).requires_grad_()


def _route(name: str, setting: Setting) -> Callable[[], object]:
    size, spec = setting.size, resolve(name)

    def geometry(layer: int) -> Geometry:
        return Geometry(size.hidden, size.experts, size.top_k, num_layers=size.layers, layer_index=layer)

    shared = build_shared(spec, geometry(0))
    routers = nn.ModuleList(build_router(spec, geometry(i)) for i in range(size.layers))
    everything = nn.ModuleList([routers, *([] if shared is None else [shared])]).to(setting.device)
    for parameter in everything.parameters():
        nn.init.normal_(parameter, 0.0, 0.05)
    hidden, context = _hidden(setting), RouterContext(size.batch, size.length)

    def step() -> None:
        state: State = ()
        total = hidden.new_zeros(())
        for layer in routers:
            routing, state = layer(hidden, state, shared, context)
            total = total + routing.weights.square().sum() + routing.probs.square().sum()
        total.backward()

    return step


def _route_zaya(setting: Setting) -> Callable[[], object]:
    """transformers refuses ZAYA1 with k above 1."""
    size = setting.size
    config = ZayaConfig(
        hidden_size=size.hidden, num_experts=size.experts, num_experts_per_tok=1, router_hidden_size=256
    )
    routers = nn.ModuleList(ZayaRouter(config, i) for i in range(size.layers)).to(setting.device)
    hidden = _hidden(setting)

    def step() -> None:
        state, total = None, hidden.new_zeros(())
        for layer in routers:
            logits, weights, _, state = layer(hidden.view(size.batch, size.length, -1), state)
            total = total + weights.square().sum() + logits.softmax(-1).square().sum()
        total.backward()

    return step


@case("block", "tests/model/test_experts.py")
def block(setting: Setting) -> list[Row]:
    """One layer's experts, forward and backward, on one random decision; `share` is that of the matrix products."""
    size = setting.size
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(size.tokens, size.experts, generator=generator).topk(size.top_k, -1).indices
    weights = torch.rand(size.tokens, size.top_k, generator=generator)
    hidden, index, weights = _hidden(setting), index.to(setting.device), weights.to(setting.device)
    one = Size(**{**vars(size), "layers": 1})
    made = {
        "sorted_mm": peers.ours(one, "smoe", "sorted_mm").model.layers[0].mlp.experts,
        "transformers grouped_mm": peers.ours(one, "smoe", "grouped_mm").model.layers[0].mlp.experts,
        "transformers eager": peers.ours(one, "smoe", "eager").model.layers[0].mlp.experts,
        "per-expert loop": peers.LoopExperts(one),
    }

    def run(experts: nn.Module) -> None:
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.bf16):
            out = experts(hidden, index, weights)
        out.sum().backward()
        experts.zero_grad(set_to_none=True)

    contestants: dict[str, Callable[[], object]] = {
        name: partial(run, experts.to(setting.device)) for name, experts in made.items()
    }
    flops = dict.fromkeys(contestants, 3.0 * size.tokens * one.expert_flops())
    return rows(contestants, setting, flops)


STEPS: dict[str, Callable[[Size], Any]] = {
    "smoe": partial(peers.ours, router="smoe"),
    "rmoe": partial(peers.ours, router="rmoe"),
    "OLMoE grouped_mm": partial(peers.olmoe, experts="grouped_mm"),
    "OLMoE eager": partial(peers.olmoe, experts="eager"),
    "Mixtral grouped_mm": partial(peers.mixtral, experts="grouped_mm"),
    "smoe, per-expert loop": partial(peers.ours, router="smoe", experts="loop"),
    "rmoe, per-expert loop": partial(peers.ours, router="rmoe", experts="loop"),
    "dense, equal active parameters": peers.dense,
}


@case("step", "tests/model")
def step(setting: Setting) -> list[Row]:
    """A whole training step: forward, loss with balance, backward, fused AdamW."""
    size = setting.size
    names = ["smoe", "rmoe", "OLMoE grouped_mm"] if setting.compiled else list(STEPS)
    contestants: dict[str, Callable[[], object]] = {
        name: peers.training_step(STEPS[name](size), size, setting.device, setting.compiled, setting.bf16)
        for name in names
    }
    flops = {name: float(size.step_flops("rmoe" if name.startswith("rmoe") else "smoe")) for name in names}
    found = rows(contestants, setting, flops)
    smoe, rmoe = found[0], found[1]
    extra = setting.roofline.seconds(
        3.0 * size.tokens * (size.router_flops("rmoe") - size.router_flops("smoe"))
    )
    spent = smoe["roofline_ms"] / smoe["share_of_roofline"]
    rmoe["extra"] = rmoe["ratio"] - 1
    rmoe["extra_by_roofline"] = 1e3 * extra / spent
    return found


@case("peak memory", "tests/model")
def peak_memory(setting: Setting) -> list[Row]:
    """Peak resident memory that three training steps add to a process (CPU), or of the device's allocator."""
    found: list[Row] = []
    for name in ("smoe", "rmoe", "OLMoE grouped_mm", "OLMoE eager", "smoe, per-expert loop"):
        command = [sys.executable, "-m", "benchmarks.cases", setting.size.name, setting.device, name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        mib = float(done.stdout.split()[-1])
        found.append(
            {"contestant": name, "peak_mib": mib, "ratio": mib / (found[0]["peak_mib"] if found else mib)}
        )
    return found


def peak_mib_of(name: str, size: Size, device: str) -> float:
    """Run in a process of its own: three steps; MiB above what the imports took."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if device == "cpu" else 0
    before = pages * resource.getpagesize() / 2**20
    work = peers.training_step(STEPS[name](size), size, device)
    for _ in range(3):
        work()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


@case("prefill", "tests/model")
def prefill(setting: Setting) -> list[Row]:
    """A forward pass without gradients, logits of the last position."""
    size = setting.size
    ids = torch.randint(0, size.vocab, (size.batch, size.length), generator=torch.Generator().manual_seed(0))

    def run(model: Any) -> None:
        with torch.no_grad():
            model(input_ids=ids.to(setting.device), use_cache=False, logits_to_keep=1)

    names = ("smoe", "rmoe", "OLMoE grouped_mm", "OLMoE eager")
    return rows({name: partial(run, _for_inference(name, setting)) for name in names}, setting)


def _for_inference(name: str, setting: Setting) -> Any:
    model = STEPS[name](setting.size).eval().to(setting.device)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    return model.to(torch.bfloat16) if setting.bf16 else model


@case("decode", "tests/model")
def decode(setting: Setting) -> list[Row]:
    """One more token for each of 1, 8 and 64 sequences, static cache of 256 positions; `ratio` per batch size."""
    found: list[Row] = []
    for batch in (1, 8, 64):
        contestants = {
            f"{name}, batch {batch}": _decode_step(_for_inference(name, setting), batch, setting)
            for name in ("smoe", "rmoe", "OLMoE grouped_mm", "OLMoE eager")
        }
        for row in rows(contestants, setting):
            found.append(
                {
                    **row,
                    "tokens_per_s": batch / (row["cpu_ms" if setting.device == "cpu" else "wall_ms"] / 1e3),
                }
            )
    return found


def _decode_step(model: Any, batch: int, setting: Setting) -> Callable[[], object]:
    cache = StaticCache(config=model.config, max_cache_len=256)
    ids = torch.randint(0, setting.size.vocab, (batch, 64), generator=torch.Generator().manual_seed(0))
    ids = ids.to(setting.device)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    position = torch.full((1, 1), 64, device=setting.device)
    forward = torch.compile(model, fullgraph=True) if setting.compiled else model

    def run() -> None:
        # The same position again and again: every round does the same work.
        with torch.no_grad():
            forward(input_ids=ids[:, :1], position_ids=position, past_key_values=cache, use_cache=True)

    return run


@case("start-up", "tests/cli/test_main.py")
def start_up(setting: Setting) -> list[Row]:
    """The command line, from nothing to its answer."""

    def run(*command: str) -> Callable[[], object]:
        line = [sys.executable, "-c", f"from rmoe.cli.main import main; main({list(command)!r})"]
        return lambda: subprocess.run(line, capture_output=True)

    timings = compare({"rmoe --help": run("--help"), "rmoe zoo": run("zoo")}, setting.rounds, setting.device)
    return [{"contestant": name, "wall_ms": timing.wall_ms} for name, timing in timings.items()]


if __name__ == "__main__":
    from benchmarks.sizes import ON_CPU, ON_GPU

    size_name, on, which = sys.argv[1:]
    print(peak_mib_of(which, (ON_CPU if on == "cpu" else ON_GPU)[size_name], on))
