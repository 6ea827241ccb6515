"""Pipeline parallelism through `torch.distributed.pipelining`, with the router's state crossing stages.

A stage is a run of layers. What it hands to the next is `(hidden, *state, balance)`: hidden states, the router's state
as it is between two layers, and the balance losses of the layers so far, one number. Autograd sends the gradients of
all of it back the same way, so the last stage's loss is the model's loss, and its gradients are the model's.

What all routers share (the recurrent cell) is needed on every stage: each holds a copy, gradients are summed over the
stages before the optimizer steps, and equal copies that take equal steps stay equal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from transformers.masking_utils import create_causal_mask

from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM
from rmoe.routing.balance import balance_loss
from rmoe.routing.contract import RouterContext, RouterStats, router_stats
from rmoe.routing.noise import CounterNoise


class PipelinePart(nn.Module):
    """One stage of a model; takes over the model's own modules, so the model is used up by it.

    Args:
        model: whole, with the weights to start from; equal on all stages.
        index, count: which stage of how many.

    Raises:
        RequestError: more stages than layers, tied embeddings, or a router that needs what only one stage has.
    """

    def __init__(self, model: RMoEForCausalLM, index: int, count: int) -> None:
        super().__init__()
        _check(model, count)
        trunk, layers = model.model, model.config.num_hidden_layers
        self.config, self.index, self.count = model.config, index, count
        self.num_layers = model.config.num_moe_layers
        mine = range(index * layers // count, (index + 1) * layers // count)
        self.layers = nn.ModuleDict({str(i): trunk.layers[i] for i in mine})
        self.router_shared = trunk.router_shared
        self.rotary_emb, self.dropout = trunk.rotary_emb, trunk.dropout
        self.embed_tokens = trunk.embed_tokens if index == 0 else None
        self.norm = trunk.norm if index == count - 1 else None
        self.lm_head = model.lm_head if index == count - 1 else None
        self.uses_noise = trunk.uses_noise
        self.routing_noise_key: Tensor
        self.register_buffer("routing_noise_key", trunk.routing_noise_key, persistent=False)
        self.stats: RouterStats | None = None

    @property
    def routers(self) -> list[Any]:
        """The routers of this stage's layers, lowest first."""
        layers: list[Any] = list(self.layers.values())
        return [layer.mlp.gate for layer in layers if not layer.is_dense]

    def forward(self, entering: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        """Run a micro-batch through this stage's layers.

        Args:
            entering: token ids `[B, S]` on the first stage, hidden states `[B, S, d]` on others.
            carried: the parts of the router's state, `[B * S, *]` each, and the balance losses so far, `[1]`.

        Returns:
            `(hidden, *state, balance)`, or on the last stage `(logits [B, S, V], balance)`.
        """
        if self.embed_tokens is not None:
            hidden = self.dropout(self.embed_tokens(entering))
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
            past_key_values=None,
            position_ids=positions,
        )
        rotary = self.rotary_emb(hidden, positions)
        routings = []
        for layer in self.layers.values():
            hidden, state, routing, _ = layer(
                hidden,
                state,
                shared=self.router_shared,
                context=context,
                position_embeddings=rotary,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
            )
            if routing is not None:
                routings.append(routing)
        if routings:
            own = balance_loss(
                self.routers, routings, self.router_shared, context, self.config.router_aux_loss_coef
            )
            balance = balance + own * (
                len(routings) / self.num_layers
            )  # its mean is over this stage's layers
            self._count(router_stats(tuple(routings), self.config.num_experts, None))
        if self.norm is None or self.lm_head is None:
            return (hidden, *state, balance)
        return self.lm_head(self.norm(hidden)), balance

    def _context(self, hidden: Tensor) -> RouterContext:
        batch, length = hidden.shape[:2]
        noise = None
        if self.training and self.uses_noise:
            self.routing_noise_key += 1
            noise = CounterNoise(self.routing_noise_key.clone())
        return RouterContext(batch, length, None, None, noise)

    def _count(self, stats: RouterStats) -> None:
        self.stats = stats if self.stats is None else self.stats.add(stats)

    def named_tensors(self) -> dict[str, Tensor]:
        """This stage's part of the model's state dict, under the model's names."""
        tensors = self.state_dict()
        return {name if name.startswith("lm_head.") else f"model.{name}": t for name, t in tensors.items()}


def _check(model: RMoEForCausalLM, count: int) -> None:
    config, spec = model.config, model.config.router_spec
    if not 1 <= count <= config.num_hidden_layers:
        raise RequestError("pipeline", count, f"1 to num_hidden_layers ({config.num_hidden_layers})")
    if config.tie_word_embeddings:
        raise RequestError("tie_word_embeddings", True, "False: the two ends are on different stages")
    if spec.router.needs_token_ids:
        raise RequestError("router.kind", spec.router.kind, "a router that needs no token ids")
    if spec.balance.scope != "micro_batch":
        raise RequestError("balance.scope", spec.balance.scope, "micro_batch, in a pipeline")


class Pipeline:
    """Trains a model whose layers are spread over the processes of the default group, one stage each.

    Args:
        model: whole, equal on all processes.
        micro_batches: a step's batch is cut into so many; more of them leave less of the time idle.
        device: of this process.
    """

    def __init__(
        self, model: RMoEForCausalLM, micro_batches: int, device: torch.device | str = "cpu"
    ) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.part = PipelinePart(model, self.rank, self.count).to(device).train()
        self.micro_batches = micro_batches
        self._targets = 0
        stage = PipelineStage(self.part, self.rank, self.count, torch.device(device))
        self.schedule = ScheduleGPipe(stage, micro_batches, loss_fn=self._loss, scale_grads=False)

    def step(self, input_ids: Tensor, labels: Tensor) -> float | None:
        """Forward and backward of one batch; afterwards this stage's parameters have the model's gradients.

        Args:
            input_ids, labels: `[B, S]` int64, the same on every process; labels are shifted here, -100 ignored.

        Returns:
            The loss, on the last stage.
        """
        self.part.stats = None
        self._targets = int((labels[:, 1:] != -100).sum())
        losses: list[Tensor] = []
        inputs = (input_ids,) if self.rank == 0 else ()
        if self.rank == self.count - 1:
            self.schedule.step(*inputs, target=labels, losses=losses)
        else:
            self.schedule.step(*inputs)
        self._sum_shared()
        return torch.stack(losses).sum().item() if losses else None

    def _loss(self, output: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """The micro-batch's part of the batch's mean loss: parts add up."""
        logits, balance = output
        nats = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        return nats / self._targets + balance.sum() / self.micro_batches

    def _sum_shared(self) -> None:
        """Add the stages' gradients of what they all hold; a stage that did not use it adds zero."""
        for parameter in self._shared():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def _shared(self) -> list[nn.Parameter]:
        return [] if self.part.router_shared is None else list(self.part.router_shared.parameters())

    def clip(self, max_norm: float) -> float:
        """Scale the whole model's gradients to a norm of at most `max_norm`; returns the norm before."""
        shared = {id(p) for p in self._shared()}
        counted = [
            p.grad
            for p in self.part.parameters()
            if p.grad is not None and (id(p) not in shared or self.rank == 0)
        ]
        square = torch.stack([gradient.double().square().sum() for gradient in counted]).sum()
        dist.all_reduce(square)
        norm = float(square.sqrt())
        if norm > max_norm:
            for parameter in self.part.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(max_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def update_routers(self, step: int, total_steps: int) -> None:
        """As the model's: once after each optimizer step. A router reads its own layer's line of the stats."""
        stats = self._gathered_stats()
        for router in self.part.routers:
            router.update_all(stats, step, total_steps)

    def _gathered_stats(self) -> RouterStats:
        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, self.part.stats)
        present = [stats for stats in every if stats is not None]
        return RouterStats(
            counts=torch.cat([stats.counts for stats in present]),
            tokens=present[0].tokens,
            entropy=torch.cat([stats.entropy for stats in present]),
            dropped=torch.cat([stats.dropped for stats in present]),
        )

    def state_dict(self) -> dict[str, Tensor] | None:
        """The whole model's, on the first process; the shared copies are equal and one is kept."""
        every: list[Any] = [None] * self.count
        mine = {name: tensor.cpu() for name, tensor in self.part.named_tensors().items()}
        dist.gather_object(mine, every if self.rank == 0 else None)
        if self.rank != 0:
            return None
        return {name: tensor for part in every for name, tensor in part.items()}
