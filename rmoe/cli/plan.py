"""`rmoe plan`: what a run costs on a cluster, on paper."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rmoe.cli.arguments import GIVEN, names, require_unset
from rmoe.compare.engines.config import EngineConfig
from rmoe.errors import RequestError
from rmoe.planning.hardware import ACCELERATORS, AcceleratorName, Cluster
from rmoe.training.config import RunConfig
from rmoe.validation import require

if TYPE_CHECKING:
    from rmoe.planning.plan import ClusterPlan

ASSUMED_VOCABULARY = 32_000
START_SECONDS = 6.0  # until a process trains; assumed, `python -m benchmarks.engines` measures it


def run(
    *,
    config: Annotated[RunConfig, tyro.conf.arg(name="")],
    devices: int = 8,
    devices_per_node: int = 8,
    accelerator: AcceleratorName = "h100",
    efficiency: float = 0.4,
    vocab_size: int | None = None,
    as_set: bool = False,
    grid: bool = False,
    routers: str = "smoe,rmoe",
    seeds: int = 3,
    pilot: Path | None = None,
    jobs: int | None = None,
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
    json: bool = False,
) -> None:
    """Parameters, FLOPs, memory, traffic and step time of a run on a cluster, and its layouts, best first.

    Nothing is allocated and no data is read: the model is built without weights and traced. With --grid: hours,
    device-hours and disk of a comparison, from the measured rate of one pilot run.

    Args:
        config: see the tables below. The layout is chosen: --parallel options are of --grid alone. Micro-batch size and
            gradient checkpointing are chosen for each layout, unless they are given: values of the preset's own bind
            only with --as-set.
        devices: accelerators in all.
        devices_per_node: of which so many are joined by the fast link.
        accelerator: the kind of each.
        efficiency: share of the peak FLOP/s that is reached. An assumption: 0.4 is a well-tuned run; the paper's
            0.91B run on 8 A100s reached 0.14.
        vocab_size: rows of the embedding; 320 for --data.tokenizer bytes (256 and two special tokens, up to a multiple
            of 64), else, and for the pretrain presets, which leave the tokenizer open, 32,000 is assumed.
        as_set: keep the preset's micro-batch size and gradient checkpointing.
        grid: plan a comparison.
        routers: of the grid.
        seeds: of the grid, per router.
        pilot: of the grid: a finished run, or a comparison with one; every router's own is taken where there is one.
        jobs: of the grid: runs at once; default as `rmoe compare` has it.
        engine: of the grid: `--engine slurm`.
        json: one JSON object on stdout instead of a table.
    """
    of_grid = ("routers", "seeds", "pilot", "jobs")
    of_layouts = ("devices", "devices_per_node", "accelerator", "efficiency", "vocab_size", "as_set")
    unread, where = (of_layouts, "with --grid") if grid else (of_grid, "without --grid")
    require_unset(run, locals(), unread, where)
    if not grid:
        if any(option.startswith("--engine") for option in GIVEN.get()):
            raise RequestError("--engine", engine.kind, "unset without --grid")
        for name, size in asdict(config.parallel).items():
            given = f"--parallel.{name}" in GIVEN.get()
            require(not given, f"--parallel.{name}", size, "unset: the plan chooses the layout")

    import sys

    from rmoe.planning.plan import plan_of
    from rmoe.records import indented
    from rmoe.training.build import load_plugins, model_config

    load_plugins(config.plugin)
    if grid:
        _print_grid(config, routers, seeds, pilot, jobs, engine, json)
        return
    micro, checkpointing = _told(config, as_set)
    cluster = Cluster(devices, devices_per_node, ACCELERATORS[accelerator], efficiency)
    if vocab_size is not None and vocab_size < 1:
        raise RequestError("--vocab-size", vocab_size, "1 or more")
    rows, origin = _vocabulary(config, vocab_size)
    plan = plan_of(
        model_config(config, rows),
        cluster,
        sequence_length=config.training.sequence_length,
        batch_size=config.training.batch_size,
        micro_batch_size=micro,
        gradient_checkpointing=checkpointing,
        bf16=config.training.precision != "fp32",
        router=config.router,
        run=config,
        assumptions={
            "vocab_size": rows,
            "vocab_size_from": origin,
            "accelerator": accelerator,
            "devices": devices,
        },
    )
    if json:
        sys.stdout.buffer.write(indented(plan))
    else:
        print(_table(plan))


def _told(config: RunConfig, as_set: bool) -> tuple[int | None, bool | None]:
    """Micro-batch size and gradient checkpointing that somebody asked for; None chooses."""
    training, given = config.training, GIVEN.get()
    micro = as_set or "--training.micro-batch-size" in given
    checkpointing = {"--training.gradient-checkpointing", "--training.no-gradient-checkpointing"} & given
    return (
        training.micro_batch_size if micro else None,
        training.gradient_checkpointing if as_set or checkpointing else None,
    )


def _print_grid(
    config: RunConfig,
    routers: str,
    seeds: int,
    pilot: Path | None,
    jobs: int | None,
    engine: EngineConfig,
    json: bool,
) -> None:
    import sys

    import torch

    from rmoe.compare.engines.devices import slots_of
    from rmoe.compare.sharing import place
    from rmoe.planning.grid import pilots_in, plan_grid
    from rmoe.records import indented
    from rmoe.routing.zoo import select

    if pilot is None:
        raise RequestError("--pilot", None, "the folder of a finished run, with --grid")
    require(seeds >= 1, "--seeds", seeds, "1 or more")
    engine.require_jobs(jobs)
    chosen = select(names(routers))
    wants, sharing = place(
        config, engine, jobs, torch.cuda.is_available() and config.training.device != "cpu"
    )
    at_once = engine.at_once or len(chosen) * seeds
    if engine.kind == "local":
        slots = slots_of(jobs, wants.gpus, engine.runs_per_gpu) if wants.gpus else []
        at_once = len(slots) or sharing.jobs or 1
    plan = plan_grid(
        config,
        chosen,
        seeds,
        pilots_in(pilot),
        at_once,
        wants.processes,
        START_SECONDS,
        starts_once=engine.kind == "local",
    )
    if json:
        sys.stdout.buffer.write(indented(plan))
        return
    print(f"{plan.runs} runs, {plan.at_once} at once on {engine.kind}")
    for name, seconds in plan.run_seconds.items():
        print(f"  {name:<20} {seconds:>10,.1f} s a run")
    print(f"hours {plan.hours:,.3f}  device-hours {plan.device_hours:,.3f}  disk {plan.disk_gib:,.3f} GiB")
    print("on " + ", ".join(f"{n} device(s): {hours:,.3f} h" for n, hours in plan.hours_on.items()))
    for line in plan.assumptions:
        print(f"assumed: {line}")


def _vocabulary(config: RunConfig, asked: int | None) -> tuple[int, str]:
    """(rows, where the number is from). Data is not read, so a tokenizer that is not built in is unknown here."""
    from rmoe.data.encode import byte_tokenizer, padded, vocabulary_size

    if asked is not None:
        return asked, "--vocab-size"
    if config.data.tokenizer == "bytes" and not config.preset.startswith("pretrain"):
        return padded(vocabulary_size(byte_tokenizer())), "the byte tokenizer"
    if config.data.max_vocab is not None:
        return padded(config.data.max_vocab), "data.max_vocab"
    return ASSUMED_VOCABULARY, "assumed: give --vocab-size"


def _table(plan: ClusterPlan) -> str:
    p, f, share, a = plan.parameters, plan.flops_per_token, plan.router_share, plan.assumptions
    lines = [
        f"router {plan.router}; {a['devices']} x {a['accelerator']}; vocabulary {a['vocab_size']:,} "
        f"({a['vocab_size_from']})",
        f"parameters  total {p['total']:,}  active {p['active']:,}  router {p['router']:,} "
        f"({share['parameters']:.2%})",
        f"FLOPs per token  forward {f['forward']:.3e}  training {f['training']:.3e}  router {f['router']:.3e} "
        f"({share['flops']:.2%} of forward)",
        f"assumed: {a['compute_efficiency']:.0%} of peak FLOP/s, {a['network_efficiency']:.0%} of link bandwidth, "
        f"{a['usable_memory']:.0%} of memory usable; {a['precision']}"
        + (f"; slots of a token: {a['slots']}" if "slots" in a else ""),
        "",
        f"{'layout':<20} {'micro':>5} {'ckpt':>4} {'weights':>8} {'grads':>6} {'optim':>6} {'activ.':>7} "
        f"{'peak GiB':>8} {'sent GB':>8} {'router':>7} {'step s':>8} {'tokens/s':>10}  bound",
    ]
    for item in plan.layouts:
        m = item.memory_gib
        sent = sum(t["bytes"] for t in item.traffic)
        router = sum(t["router_bytes"] for t in item.traffic) / sent if sent else 0.0
        end = item.bound if item.fits else "does not fit"
        lines.append(
            f"{item.layout:<20} {item.micro_batch_size:>5} {'yes' if item.gradient_checkpointing else 'no':>4} "
            f"{m['weights']:>8.2f} {m['gradients']:>6.2f} {m['optimizer']:>6.2f} {m['activations']:>7.2f} "
            f"{m['peak']:>8.2f} {sent / 1e9:>8.2f} {router:>7.2%} {item.step_seconds:>8.2f} "
            f"{item.tokens_per_second:>10,.0f}  {end}"
        )
    best = plan.layouts[0]
    lines += ["", f"traffic of {best.layout}, per device and step:"]
    for t in best.traffic:
        lines.append(
            f"  {t['collective']:<15} {t['bytes'] / 1e9:>9.3f} GB over {t['group']:>4}  {t['purpose']}"
        )
    lines += ["", f"rmoe train {best.options}"]
    return "\n".join(lines)
