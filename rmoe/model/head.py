"""The output layer, which can give the cross-entropy instead of logits and then never holds all of them.

Of `[T, V]` logits, their log-probabilities and their gradient, a large vocabulary makes the largest tensors of a
training step. Here a chunk of tokens is taken at a time, and the chunk's gradients while its logits are there, so
nothing is computed twice: 2 * T * V * d FLOPs forward and 4 * T * V * d for the gradients, as without chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rmoe.compat import is_split_by_plan

IGNORED = -100
"""transformers' `ignore_index`."""

CHUNK_BYTES = 2**25
"""One chunk's logits in float32: 32 MiB, 262 tokens at a vocabulary of 32,000."""


@torch.library.custom_op("rmoe::chunked_cross_entropy", mutates_args=())
def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    items: Tensor,
    dtype: torch.dtype,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`-sum_t ln softmax(W h_t)[target_t] / items` and its gradients.

    Args:
        hidden: `[T, d]`. weight: `[V, d]`. targets: `[T]` int64, -100 does not count. items: scalar.
        dtype: of the matrix products; softmax and sums are in at least float32.
        for_hidden, for_weight: which gradients are wanted; the other is empty.

    Returns:
        The loss; its gradient by `hidden`, in the dtype of `hidden`; by `weight`, in at least float32.
    """
    total, grad_hidden, grad_weight = _outputs(hidden, weight, dtype, for_hidden, for_weight)
    wide = total.dtype
    if not hidden.shape[0]:
        grad_weight.zero_()  # otherwise the first chunk writes it
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    low = weight.to(dtype)
    items = items.to(wide)
    # float16 has no numbers as small as a gradient over many tokens: there the division comes last, in `wide`.
    late = items if dtype == torch.float16 else torch.ones_like(items)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        h, target = hidden[part].to(dtype), targets[part]
        log_probs = F.log_softmax((h @ low.t()).to(wide), -1)
        total += F.nll_loss(log_probs, target, ignore_index=IGNORED, reduction="sum")
        if not (for_hidden or for_weight):
            continue
        counts = (target != IGNORED).to(wide)[:, None]
        grad = log_probs.exp_().scatter_add_(1, target.clamp(min=0)[:, None], -counts)
        grad = grad.mul_(counts * (late / items)).to(dtype)
        if for_hidden:
            grad_hidden[part] = (grad @ low).to(wide).div_(late)
        if for_weight and start == 0:
            grad_weight = _product(grad.t(), h, grad_weight)
        elif for_weight and dtype == wide:
            grad_weight.addmm_(grad.t(), h)
        elif for_weight:
            grad_weight += grad.t() @ h
    return total / items, grad_hidden, grad_weight.div_(late)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(a @ b)


def _outputs(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator gives, not filled but for the sum, which begins at zero."""
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_zeros((), dtype=wide),
        torch.empty_like(hidden) if for_hidden else hidden.new_empty(0),
        torch.empty_like(weight, dtype=wide) if for_weight else weight.new_empty(0, dtype=wide),
    )


chunked_cross_entropy.register_fake(
    lambda hidden, weight, targets, items, *rest: _outputs(hidden, weight, *rest)
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.weight_dtype, (ctx.for_hidden, ctx.for_weight) = inputs[1].dtype, inputs[5:]


@once_differentiable
def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    hidden, weight = ctx.saved_tensors
    # On the CPU a look at the number is free, and the gradient by the weight may be the largest tensor there is.
    # (A tracer's tensor is of a type of its own, and has no number.)
    as_it_is = type(grad) is Tensor and grad.device.type == "cpu" and grad.item() == 1
    if not as_it_is:
        hidden, weight = hidden * grad.to(hidden.dtype), weight * grad
    grad_hidden = hidden if ctx.for_hidden else None
    grad_weight = weight.to(ctx.weight_dtype) if ctx.for_weight else None
    return grad_hidden, grad_weight, None, None, None, None, None


chunked_cross_entropy.register_autograd(_backward, setup_context=_keep)


class LMHead(nn.Linear):
    """`W h` `[*, d] -> [*, V]`; with targets their cross-entropy.

    The loss is taken inside the module's own `forward`, where FSDP2 has gathered the weight.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    @property
    def gives_loss(self) -> bool:
        """Not under tensor parallelism: each process has a part of the vocabulary, and the plan's output is logits."""
        return not is_split_by_plan(self)

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, items: Tensor | int | None = None
    ) -> Tensor:
        """Logits; or a scalar in nats, at least float32.

        Args:
            hidden: `[*, d]`.
            targets: `[*]` int64, -100 does not count.
            items: what the sum is divided by; None is the number of targets that count.
        """
        if targets is None:
            return super().forward(hidden)
        targets = targets.reshape(-1).to(hidden.device)
        count = (targets != IGNORED).sum() if items is None else torch.as_tensor(items, device=hidden.device)
        kind, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        wanted = torch.is_grad_enabled()
        with torch.autocast(kind, enabled=False):
            loss: Tensor = chunked_cross_entropy(
                hidden.reshape(-1, hidden.shape[-1]),
                self.weight,
                targets,
                count,
                dtype,
                wanted and hidden.requires_grad,
                wanted and self.weight.requires_grad,
            )[0]
        return loss


def next_tokens(labels: Tensor) -> Tensor:
    """What each position predicts, `[B, S]` -> `[B, S]`: the label after it; nothing (-100) at the end."""
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    """Cross-entropy of the next token in nats, float32, from whole logits.

    Args:
        logits: `[B, S, V]`. labels: `[B, S]` int64, not shifted; -100 does not count.
        reduction: `sum`, `mean` over the labels that count, or `none`: `[B, S - 1]`, 0 where none counts.
    """
    targets = labels[:, 1:]
    flat = logits[:, :-1].float().flatten(0, 1)
    loss = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction=reduction)
    return loss.view_as(targets) if reduction == "none" else loss


def count_next_tokens(labels: Tensor) -> Tensor:
    """How many labels `next_token_loss` sums over, int64 scalar."""
    return (labels[:, 1:] != IGNORED).sum()
