"""Ways to spread a model over devices: what each device then holds and sends."""

from __future__ import annotations

from dataclasses import dataclass

from rmoe.model import RMoEConfig
from rmoe.model.head import CHUNK_BYTES
from rmoe.parallel import ParallelConfig
from rmoe.parallel.fit import misfit, stage_layers
from rmoe.planning.hardware import Cluster
from rmoe.planning.trace import Needs, Parameters

FULL, HALF = 4, 2  # bytes of a float32 and of a bfloat16


def name_of(layout: ParallelConfig) -> str:
    """`DDP`, `FSDP2 8 + EP 4`, ..."""
    parts = [("FSDP2", layout.fsdp), ("TP", layout.tensor), ("EP", layout.expert), ("PP", layout.pipeline)]
    shown = [f"{kind} {size}" for kind, size in parts if size > 1]
    if layout.replicate > 1:
        copies = layout.replicate
        shown.insert(0, f"DDP {copies}" if layout.fsdp == 1 else f"HSDP {copies} x")
    return " + ".join(shown).replace(" x +", " x") or "one device"


def layouts_for(config: RMoEConfig, cluster: Cluster) -> list[ParallelConfig]:
    """The layouts this package runs that fit the cluster's shape and the model.

    TP and EP stay inside a node. What `DistributedConfig` cannot combine (FSDP2 with PP) is not offered.
    """
    devices, node = cluster.devices, cluster.node
    found = [ParallelConfig(replicate=devices), ParallelConfig(fsdp=devices)]
    if devices > node:
        found.append(ParallelConfig(replicate=devices // node, fsdp=node))
    inside = [size for size in (2, 4, 8) if size <= node and devices % size == 0]
    for size in inside:
        found.append(ParallelConfig(fsdp=devices, expert=size))
        found.append(ParallelConfig(fsdp=devices // size, tensor=size))
        found.append(ParallelConfig(replicate=devices // size, pipeline=size))
    return [each for each in dict.fromkeys(found) if misfit(config, each) is None]


# --- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device.

    Attributes:
        weights, gradients, optimizer: float32 master weights, their gradients, AdamW's two moments.
        standing: gradients' worth that is there before a backward pass: DDP's buckets, which stay from step to step
            (the gradients it has reduced lie in them), and the sum of the step's earlier forward passes.
        gathered: whole layers that FSDP has put together for computing, this one and the next, in float32.
        activations: what autograd keeps, autocast's copies of weights included: FSDP frees what it gathered, not these.
        loss: what is alive besides while the loss is taken and differentiated: a chunk's logits, or where they cannot
            be taken in chunks (TP, PP) float32 gradients of logits and of log-probabilities.
        layer: activations of the one layer that is being recomputed or differentiated, and gradients inside it:
            together 1.26 to 1.43 times the activations in real steps of three architectures. Under FSDP also that
            layer's whole gradients before they are cut up, and under autocast its copies and theirs. Before they are
            added to what stands, a layer's gradients are there by themselves.
    """

    weights: float
    gradients: float
    optimizer: float
    standing: float
    gathered: float
    activations: float
    loss: float
    layer: float

    @property
    def peak(self) -> float:
        """Of a step after the first: while the loss is differentiated, or with the lowest layer as the last.

        In between, activations go as gradients come, both in equal steps, so one of the two ends is the peak.
        """
        held = self.weights + self.optimizer + self.gathered
        before, after = self.standing, max(self.standing, self.gradients)
        return held + max(before + self.activations + self.loss, after + self.layer)


def parameters_per_device(own: Parameters, layout: ParallelConfig) -> float:
    """Parameters that one device owns; of pipeline stages the fullest."""
    ends = min(own.embedding + own.head, own.total - own.non_embedding)  # tied: counted once
    if layout.pipeline > 1:
        stages = stage_layers(len(own.layers), layout.pipeline)
        held = [sum(own.layers[index] for index in stage) for stage in stages]
        held[0] += own.embedding
        held[-1] += own.head + own.total - ends - own.shared_router - sum(own.layers)  # and the last norm
        return max(held) + own.shared_router
    split = own.experts + own.tensor_parallel + ends
    return (split / layout.tensor + own.total - split) / layout.fsdp


def longest_stage(layers: int, layout: ParallelConfig) -> int:
    """Layers of the stage of a pipeline that has most; of a model in one piece all."""
    return max(map(len, stage_layers(layers, layout.pipeline)))


def memory_of(
    needs: Needs,
    config: RMoEConfig,
    layout: ParallelConfig,
    batch: int,
    length: int,
    bf16: bool,
    checkpointing: bool,
    passes: int = 1,
) -> Memory:
    """Memory of a layout at `batch` sequences of `length` tokens per forward pass of a device, `passes` in a step.

    Activations between TP's splits are whole on every device of its group: the experts' and attention's insides
    are a share, the rest is not, and is counted in full here, so TP's figure is an upper bound. The first of `p`
    stages of a pipeline holds at most `p` micro-batches at once (1F1B).
    """
    own, kept = needs.parameters, needs.activations
    parameters = parameters_per_device(own, layout)
    layers = longest_stage(config.num_hidden_layers, layout)
    body = kept.layer
    if layout.tensor > 1:
        body = kept.boundary + (kept.layer - kept.boundary) * (0.5 + 0.5 / layout.tensor)
    held = batch * layout.pipeline
    activations = held * (layers * (kept.boundary if checkpointing else body) + kept.ends)
    fixed = kept.fixed * layers / config.num_hidden_layers / layout.tensor
    ddp = layout.replicate > 1 and not layout.shards and layout.pipeline == 1
    standing = FULL * parameters * (ddp + (passes > 1))
    gathered, reduced = 0.0, FULL * own.layer / layout.tensor if standing else 0.0
    if layout.fsdp > 1:
        elsewhere = 1 - 1 / layout.expert  # share of a layer's experts that other devices compute
        layer = own.layer - own.layer_experts * (1 - layout.tensor**-1) - own.layer_experts * elsewhere
        gathered = (2 * layer + own.embedding + own.head) * FULL
        reduced = layer * (FULL + (2 * HALF if bf16 else 0))
        # Copies are of gathered weights, which autocast does not remember: with checkpointing they go with their layer.
        if checkpointing:
            fixed = min(fixed, FULL * own.head / layout.tensor)
        elif bf16:
            fixed -= HALF * own.experts * elsewhere
    return Memory(
        weights=FULL * parameters,
        gradients=FULL * parameters,
        optimizer=2 * FULL * parameters,
        standing=standing,
        gathered=gathered,
        activations=activations + fixed,
        loss=_loss_bytes(config, layout, batch * length),
        layer=1.3 * batch * body + reduced,
    )


def _loss_bytes(config: RMoEConfig, layout: ParallelConfig, tokens: int) -> float:
    logits = FULL * tokens * config.vocab_size
    if layout.tensor * layout.pipeline > 1:
        return 2 * logits / layout.tensor
    # The chunk's logits and their log-probabilities; then the output matrix's gradient once more, scaled.
    return max(2 * min(CHUNK_BYTES, logits), FULL * config.vocab_size * config.hidden_size)


# --- traffic -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """What one device sends in one optimizer step.

    Attributes:
        collective: torch's name for it. purpose: what travels.
        bytes: sent by one device.
        group: neighbouring devices over which it reaches. hidden: it can run beside the computation.
        router_bytes: the part that is the router's: its parameters, its state between stages, its counts.
    """

    collective: str
    purpose: str
    bytes: float
    group: int
    hidden: bool
    router_bytes: float


def traffic_of(
    needs: Needs,
    config: RMoEConfig,
    layout: ParallelConfig,
    batch: int,
    length: int,
    passes: int,
    bf16: bool,
    checkpointing: bool,
) -> list[Traffic]:
    """Traffic of one optimizer step of `passes` forward passes of `batch` sequences per device.

    Ring collectives: an all-gather or reduce-scatter of `n` bytes over `g` devices sends `n (g - 1) / g` each, an
    all-reduce twice that.
    """
    own = needs.parameters
    width = HALF if bf16 else FULL
    tokens = batch * length
    router_share = own.router / own.total
    found: list[Traffic] = []

    def add(collective: str, purpose: str, size: float, group: int, hidden: bool, router: float) -> None:
        if group > 1 and size:
            found.append(Traffic(collective, purpose, size, group, hidden, router))

    if layout.fsdp > 1:
        g, local = layout.fsdp, own.total / layout.tensor / layout.pipeline
        experts = own.experts / layout.tensor / layout.pipeline
        dense = (local - experts) * (g - 1) / g
        copies = g // layout.expert  # devices that hold the same experts and cut them up between them
        routed = experts / layout.expert * (copies - 1) / copies
        each = dense + routed
        share = own.router / own.total * local * (g - 1) / g / max(each, 1.0)
        twice = 2 * passes * FULL * each  # autocast makes its copies of what has arrived
        reach = g * layout.tensor  # devices of a TP group are neighbours, those of an FSDP group so far apart
        add(
            "all_gather",
            "weights, before each layer's forward and backward",
            twice,
            reach,
            True,
            share * twice,
        )
        once = passes * FULL * each
        add("reduce_scatter", "gradients", once, reach, True, share * once)
    if layout.replicate > 1:
        held = FULL * parameters_per_device(own, layout)
        g = layout.replicate
        size = 2 * (g - 1) / g * held
        add("all_reduce", "gradients between replicas", size, layout.processes, True, router_share * size)
    if layout.expert > 1:
        g = layout.expert
        forward = tokens * config.num_experts_per_tok * config.hidden_size * width * (g - 1) / g
        runs = 3 if checkpointing else 2  # forward, backward, and forward again
        size = 2 * runs * passes * config.num_moe_layers * forward
        add("all_to_all", "tokens to experts and back", size, g, False, 0.0)
    if layout.tensor > 1:
        g = layout.tensor
        one = 2 * (g - 1) / g * tokens * config.hidden_size * width
        runs = 3 if checkpointing else 2
        size = runs * 2 * config.num_hidden_layers * passes * one
        add("all_reduce", "outputs of attention and experts", size, g, False, 0.0)
        logits = 2 * (g - 1) / g * tokens * config.vocab_size * width * passes
        add("all_gather", "logits", logits, g, False, 0.0)
    if layout.pipeline > 1:
        scale = passes * batch * 2  # forward and back, at each boundary
        size, state = scale * needs.activations.boundary, scale * needs.activations.state
        add("send", "hidden states and router state between stages", size, layout.pipeline, False, state)
        g = layout.pipeline
        shared = 2 * (g - 1) / g * FULL * own.shared_router
        add("all_reduce", "gradients of the cell all stages share", shared, g, False, shared)
    if layout.data > 1:
        counts = passes * (config.num_moe_layers * (config.num_experts * 8 + 12) + 8)
        add("all_reduce", "routing counts", 2.0 * counts, layout.data, False, 2.0 * counts)
    return found
