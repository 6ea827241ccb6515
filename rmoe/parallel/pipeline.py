"""Pipeline parallelism through `torch.distributed.pipelining`, with the router's state crossing stages.

A stage is a run of layers. What it hands to the next is `(hidden, *state, balance)`: hidden states, the router's state
as it is between two layers, and the balance losses of the layers so far, one number. Autograd sends the gradients of
all of it back the same way, so the last stage's loss is the model's loss, and its gradients are the model's.

What all routers share (the recurrent cell) is needed on every stage: each holds a copy, gradients are summed over the
stages before the optimizer steps, and equal copies that take equal steps stay equal.

Whole pipelines can be replicated: each sees its own sequences, and gradients are averaged over the copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from transformers.masking_utils import create_causal_mask

from rmoe.compat import CACHE
from rmoe.model import RMoEForCausalLM
from rmoe.model.head import count_next_tokens, next_token_loss
from rmoe.parallel.fit import pipeline_misfit, stage_layers
from rmoe.routing.balance import balance_loss
from rmoe.routing.contract import RouterContext, RouterStats, router_stats
from rmoe.routing.noise import Noise
from rmoe.validation import require


class PipelinePart(nn.Module):
    """One stage of a model; takes over the model's own modules, so the model is used up by it.

    Parameters and buffers have the names they have in the model.

    Args:
        model: whole, with the weights to start from; equal on all stages.
        index, count: which stage of how many.

    Raises:
        RequestError: more stages than layers, tied embeddings, or a router that needs what only one stage has.
    """

    def __init__(self, model: RMoEForCausalLM, index: int, count: int, bf16: bool = False) -> None:
        super().__init__()
        reason = pipeline_misfit(model.config, count)
        if reason is not None:
            raise reason
        whole, layers = model.model, model.config.num_hidden_layers
        self.config, self.index, self.count = model.config, index, count
        self.num_layers = model.config.num_moe_layers
        mine = stage_layers(layers, count)[index]
        trunk: Any = nn.Module()
        trunk.layers = nn.ModuleDict({str(i): whole.layers[i] for i in mine})
        trunk.router_shared = whole.router_shared
        trunk.rotary_emb, trunk.dropout = whole.rotary_emb, whole.dropout
        trunk.embed_tokens = whole.embed_tokens if index == 0 else None
        trunk.norm = whole.norm if index == count - 1 else None
        self.model = trunk
        self.lm_head = model.lm_head if index == count - 1 else None
        self.uses_noise, self.bf16 = whole.uses_noise, bf16
        self.routing_noise_key: Tensor
        self.register_buffer("routing_noise_key", whole.routing_noise_key, persistent=False)
        self.stats: RouterStats | None = None

    @property
    def trunk(self) -> Any:
        """This stage's part of the `RMoEModel`."""
        return self.model

    @property
    def routers(self) -> list[Any]:
        """The routers of this stage's layers, lowest first."""
        layers: list[Any] = list(self.model.layers.values())
        return [layer.mlp.gate for layer in layers if not layer.is_dense]

    @torch.no_grad()
    def update_routers(self, stats: RouterStats, step: int, total_steps: int) -> None:
        """As the model's, with the stats of all stages. A router reads its own layer's line of them."""
        for router in self.routers:
            router.update_all(stats, step, total_steps)

    def set_routing_noise(self, seed: int, step: int) -> None:
        """As the model's; `step` counts micro-batches."""
        self.routing_noise_key.fill_((seed << 32) + step)

    def forward(self, entering: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        """Run a micro-batch through this stage's layers.

        Args:
            entering: token ids `[B, S]` on the first stage, hidden states `[B, S, d]` on others.
            carried: the parts of the router's state, `[B * S, *]` each, and the balance losses so far, `[1]`.

        Returns:
            `(hidden, *state, balance)`, or on the last stage `(logits [B, S, V], balance)`.
        """
        with torch.autocast(entering.device.type, torch.bfloat16, enabled=self.bf16):
            return self._run(entering, *carried)

    def _run(self, entering: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        trunk = self.model
        if trunk.embed_tokens is not None:
            hidden = trunk.dropout(trunk.embed_tokens(entering))
            state: tuple[Tensor, ...] = ()
            balance = torch.zeros(1, device=hidden.device)
        else:
            hidden, (*parts, balance) = entering, carried
            state = tuple(parts)
        context = self._context(hidden)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            **{CACHE: None},
            position_ids=positions,
        )
        rotary = trunk.rotary_emb(hidden, positions)
        routings = []
        for layer in trunk.layers.values():
            hidden, state, routing, _ = layer(
                hidden,
                state,
                shared=trunk.router_shared,
                context=context,
                position_embeddings=rotary,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
            )
            if routing is not None:
                routings.append(routing)
        if routings:
            coefficient = self.config.router_aux_loss_coef
            own = balance_loss(self.routers, routings, context, coefficient)
            # Its mean is over this stage's layers.
            balance = balance + own * (len(routings) / self.num_layers)
            if self.training:
                stats = router_stats(tuple(routings), self.config.num_experts, None)
                self.stats = stats if self.stats is None else self.stats.add(stats)
        if trunk.norm is None or self.lm_head is None:
            return (hidden, *state, balance)
        return self.lm_head(trunk.norm(hidden)), balance

    def _context(self, hidden: Tensor) -> RouterContext:
        batch, length = hidden.shape[:2]
        noise = None
        if self.training and self.uses_noise:
            self.routing_noise_key += 1
            noise = Noise(self.routing_noise_key.clone())
        return RouterContext(batch, length, None, None, noise)


class StepLoss(NamedTuple):
    """The mean losses of a batch, nats per token; zero on every stage but the last."""

    lm: float
    balance: float


class Pipeline:
    """Trains a model whose layers are spread over processes, one stage each.

    Args:
        model: whole, equal on all processes.
        micro_batches: a step's batch is cut into so many, one for each stage or more; more of them leave less of the
            time idle. A stage holds the activations of as many as there are stages at most (1F1B).
        device: of this process.
        replicas: pipelines side by side; neighbouring processes are one pipeline.
        bf16: bfloat16 mixed precision.

    Raises:
        RequestError: fewer micro-batches than stages, or a model that cannot be cut.
    """

    def __init__(
        self,
        model: RMoEForCausalLM,
        micro_batches: int,
        device: torch.device | str = "cpu",
        replicas: int = 1,
        bf16: bool = False,
    ) -> None:
        self.device, self.micro_batches, self.replicas = torch.device(device), micro_batches, replicas
        self.rank, self.count = dist.get_rank(), dist.get_world_size() // replicas
        enough = micro_batches >= self.count
        require(enough, "micro_batches", micro_batches, f"{self.count} or more, one for each stage")
        mesh = init_device_mesh(self.device.type, (replicas, self.count), mesh_dim_names=("replica", "stage"))
        self.stages, self.copies = mesh["stage"].get_group(), mesh["replica"].get_group()
        self.index = self.rank % self.count
        self.part = PipelinePart(model, self.index, self.count, bf16).to(self.device).train()
        self.stats: RouterStats | None = None
        self._schedule: Schedule1F1B | None = None
        self._targets = 0.0
        self._losses = torch.zeros(2, dtype=torch.float64, device=self.device)

    @property
    def is_last(self) -> bool:
        """Whether this process has the model's end, and so the loss."""
        return self.index == self.count - 1

    def step(self, input_ids: Tensor, labels: Tensor) -> StepLoss:
        """Forward and backward of one batch; afterwards this stage's parameters have the model's gradients.

        `stats` then has the routing of this batch, all layers', on every stage.

        Args:
            input_ids, labels: `[B, S]` int64, the same on every stage, every batch of the same shape; labels are
                shifted here, -100 ignored.

        Raises:
            RequestError: a batch that does not divide into the micro-batches; nothing was sent.
        """
        sequences = len(input_ids)
        allowed = f"a multiple of micro_batches ({self.micro_batches}), in sequences"
        require(sequences % self.micro_batches == 0, "input_ids", sequences, allowed)
        if self._schedule is None:
            self._schedule = self._build(input_ids[: len(input_ids) // self.micro_batches])
        self.part.stats = None
        self._losses.zero_()
        self._targets = self._mean_over_copies(count_next_tokens(labels))
        inputs = (input_ids,) if self.index == 0 else ()
        if self.is_last:
            self._schedule.step(*inputs, target=labels, losses=[])
        else:
            self._schedule.step(*inputs)
        self._combine_gradients()
        self.stats = self._gathered_stats()
        return StepLoss(*self._losses.tolist())

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor | None:
        """Logits `[B, S, V]` of a batch, on the last stage; nothing is kept for a backward pass."""
        _, leaving = self._through(input_ids)
        return leaving[0] if self.is_last else None

    def _through(self, input_ids: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What enters this stage and what leaves it, which the next is sent."""
        entering = (input_ids,) if self.index == 0 else tuple(_receive(self.rank - 1, self.device))
        leaving = self.part(*entering)
        if not self.is_last:
            _send(leaving, self.rank + 1)
        return entering, leaving

    def _build(self, example: Tensor) -> Schedule1F1B:
        """The schedule, from the shapes that a micro-batch has between stages.

        torch would find them out by a training forward pass; this one is in eval mode, so that it draws no random
        number and counts nothing, and a resumed run takes the same steps as one that went on.
        """
        self.part.eval()
        with torch.no_grad():
            entering, leaving = self._through(example)
        self.part.train()
        stage = PipelineStage(
            self.part,
            self.index,
            self.count,
            self.device,
            input_args=tuple(_like(tensor) for tensor in entering),
            output_args=tuple(_like(tensor) for tensor in leaving),
            group=self.stages,
        )
        return Schedule1F1B(stage, self.micro_batches, loss_fn=self._loss, scale_grads=False)

    def _loss(self, output: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """The micro-batch's part of the batch's mean loss: parts add up."""
        logits, balance = output
        nats = next_token_loss(logits, labels) / self._targets
        parts = torch.stack([nats, balance.sum() / self.micro_batches])
        self._losses += parts.detach().double()
        return parts.sum()

    def _mean_over_copies(self, number: Tensor) -> float:
        total = number.to(self.device, torch.float64)
        dist.all_reduce(total, group=self.copies)
        return float(total) / self.replicas

    def _combine_gradients(self) -> None:
        """Sum over stages what all of them hold (one that did not use it adds zero); then average over copies."""
        for parameter in self._shared():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self.stages)
        if self.replicas > 1:
            for parameter in self.part.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self.copies)
                    parameter.grad /= self.replicas

    def _shared(self) -> list[nn.Parameter]:
        cell = self.part.trunk.router_shared
        return [] if cell is None else list(cell.parameters())

    def norm(self, parameters: Sequence[nn.Parameter]) -> float:
        """The 2-norm of the gradients of these parameters of all stages together, the same on every process."""
        shared = {id(p) for p in self._shared()}
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for p in parameters:
            if p.grad is not None and (id(p) not in shared or self.index == 0):
                square += p.grad.double().square().sum()
        dist.all_reduce(square, group=self.stages)
        return float(square.sqrt())

    def _gathered_stats(self) -> RouterStats | None:
        every: list[Any] = [None] * self.count
        own = self.part.stats
        # By the CPU: a pickled tensor comes back on the device it was on, another process's.
        dist.all_gather_object(every, own if own is None else own.map(Tensor.cpu), group=self.stages)
        present = [stats for stats in every if stats is not None]
        if not present:
            return None
        observed = [stats.observed for stats in present if stats.observed is not None]
        return RouterStats(
            counts=torch.cat([stats.counts for stats in present]),
            tokens=present[0].tokens,
            entropy=torch.cat([stats.entropy for stats in present]),
            dropped=torch.cat([stats.dropped for stats in present]),
            logit_variance=torch.cat([stats.logit_variance for stats in present]),
            observed=torch.cat(observed) if observed else None,
        ).map(lambda part: part.to(self.device))

    def state_dict(self) -> dict[str, Tensor] | None:
        """The whole model's, on the first process; the shared copies are equal and one is kept."""
        return self.collect(self.part.state_dict())

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Tensors of all stages of the first pipeline, by name, on the first process's CPU; None elsewhere.

        One stage after the other, so nobody but the first process holds more than its own. Collective.
        """
        if self.rank == 0:
            found = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
            for stage in range(1, self.count):
                names: list[Any] = [None]
                dist.recv_object_list(names, src=stage, device=self.device)
                received = (tensor.cpu() for tensor in _receive(stage, self.device))
                found |= dict(zip(names[0], received, strict=True))
            return found
        if self.rank < self.count:
            dist.send_object_list([list(tensors)], dst=0, device=self.device)
            _send(list(tensors.values()), 0)
        return None


def _send(tensors: Sequence[Tensor], to: int) -> None:
    device = tensors[0].device
    dist.send_object_list([[(t.shape, t.dtype) for t in tensors]], dst=to, device=device)
    for tensor in tensors:
        dist.send(tensor.detach().to(device).contiguous(), dst=to)


def _receive(source: int, device: torch.device) -> list[Tensor]:
    shapes: list[Any] = [None]
    dist.recv_object_list(shapes, src=source, device=device)
    tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes[0]]
    for tensor in tensors:
        dist.recv(tensor, src=source)
    return tensors


def _like(tensor: Tensor) -> Tensor:
    """Shape and dtype; with a gradient, if it can have one, for that is what crosses between stages."""
    return torch.empty_like(tensor).requires_grad_(tensor.is_floating_point())
