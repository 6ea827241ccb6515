"""What a forward gives: losses of one's own, and the options of every transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.seams.families import EXPERTS, LAYERS, VOCAB, Family, close, ids
from tests.seams.job import job

GROUP = "Forward and loss"


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@job(GROUP, "`aux_loss` without labels, asked for in the call")
def aux_loss_in_call(family: Family, tmp: Path) -> None:
    model = family.causal(router_aux_loss_coef=0.5).train()
    out = model(input_ids=ids(), output_router_logits=True)
    assert out.loss is None
    out.aux_loss.backward()
    gates = {n: p.grad for n, p in model.named_parameters() if ".gate." in n and p.grad is not None}
    assert gates
    assert any(grad.abs().max() > 0 for grad in gates.values())


@job(GROUP, "`aux_loss` without labels, asked for by the configuration")
def aux_loss_by_configuration(family: Family, tmp: Path) -> None:
    out = family.causal(output_router_logits=True)(input_ids=ids())
    assert torch.isfinite(out.aux_loss)
    assert len(out.router_logits) == LAYERS


@job(GROUP, "a loss of one's own: cross-entropy + `router_aux_loss_coef` * `aux_loss` is the model's own")
def own_loss(family: Family, tmp: Path) -> None:
    model = family.causal(output_router_logits=True, router_aux_loss_coef=0.5)
    own = model(input_ids=ids())
    loss = cross_entropy(own.logits, ids()) + model.config.router_aux_loss_coef * own.aux_loss
    close(loss, model(input_ids=ids(), labels=ids()).loss)


@job(GROUP, "`router_logits`: a tensor `[tokens, experts]` per routing layer")
def router_logits(family: Family, tmp: Path) -> None:
    out = family.causal()(input_ids=ids(), output_router_logits=True)
    assert [tuple(layer.shape) for layer in out.router_logits] == [(18, EXPERTS)] * LAYERS


@job(GROUP, "without `output_router_logits` there are none, and no `aux_loss` without labels")
def no_router_logits(family: Family, tmp: Path) -> None:
    out = family.causal()(input_ids=ids())
    assert out.get("router_logits") is None
    assert out.get("aux_loss") is None


@job(GROUP, "the loss: labels of -100, `shift_labels`, `num_items_in_batch`")
def loss_options(family: Family, tmp: Path) -> None:
    model = family.causal(router_aux_loss_coef=0.0)
    labels = ids().clone()
    labels[0, :5] = -100
    want = cross_entropy(model(input_ids=ids()).logits, labels)
    close(model(input_ids=ids(), labels=labels).loss, want)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    close(model(input_ids=ids(), labels=labels, shift_labels=shifted).loss, want)
    count = (labels[:, 1:] != -100).sum()
    scaled = model(input_ids=ids(), labels=labels, num_items_in_batch=2 * count).loss
    close(scaled, want / 2)


@job(GROUP, "`logits_to_keep`, a number and indices")
def logits_to_keep(family: Family, tmp: Path) -> None:
    model = family.causal()
    whole = model(input_ids=ids()).logits
    close(model(input_ids=ids(), logits_to_keep=2).logits, whole[:, -2:])
    close(model(input_ids=ids(), logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])


@job(GROUP, "`output_hidden_states`, in the call and by the configuration")
def hidden_states(family: Family, tmp: Path) -> None:
    model = family.causal()
    states = model(input_ids=ids(), output_hidden_states=True).hidden_states
    assert [tuple(h.shape) for h in states] == [(2, 9, 32)] * (LAYERS + 1)
    close(states[0], model.get_input_embeddings()(ids()))
    close(model.lm_head(states[-1]), model(input_ids=ids()).logits)
    model.config.output_hidden_states = True
    for got, want in zip(model(input_ids=ids()).hidden_states, states, strict=True):
        close(got, want)


@job(GROUP, "`output_attentions`, in the call and by the configuration")
def attentions(family: Family, tmp: Path) -> None:
    model = family.causal(attn_implementation="eager")
    weights = model(input_ids=ids(), output_attentions=True).attentions
    assert [tuple(a.shape) for a in weights] == [(2, 4, 9, 9)] * LAYERS
    close(weights[0].sum(-1), torch.ones(2, 4, 9))
    model.config.output_attentions = True
    assert len(model(input_ids=ids()).attentions) == LAYERS


@job(GROUP, "`return_dict=False` in the call")
def tuples(family: Family, tmp: Path) -> None:
    model = family.causal()
    want = model(input_ids=ids())
    found = model(input_ids=ids(), return_dict=False)
    assert type(found) is tuple
    close(found[0], want.logits)
    with_labels = model(input_ids=ids(), labels=ids(), return_dict=False)
    close(with_labels[0], model(input_ids=ids(), labels=ids()).loss)


@job(GROUP, "`return_dict=False` by the configuration")
def tuples_by_configuration(family: Family, tmp: Path) -> None:
    model = family.causal()
    model.config.return_dict = False
    assert type(model(input_ids=ids())) is tuple


@job(GROUP, "`use_cache`, in the call and by the configuration")
def use_cache(family: Family, tmp: Path) -> None:
    model = family.causal()
    assert model(input_ids=ids()).past_key_values is not None
    assert model(input_ids=ids(), use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(input_ids=ids()).past_key_values is None
    assert model(input_ids=ids(), use_cache=True).past_key_values is not None


@job(GROUP, "an unknown keyword is a `TypeError` that names it")
def unknown_keyword(family: Family, tmp: Path) -> None:
    for model in (family.causal(), family.classifier(num_labels=2), family.trunk()):
        with pytest.raises(TypeError, match="no_such_option"):
            model(input_ids=ids(), no_such_option=1)


@job(GROUP, "neither or both of `input_ids` and `inputs_embeds` is an error")
def inputs_needed(family: Family, tmp: Path) -> None:
    model = family.causal()
    for inputs in ({}, {"input_ids": ids(), "inputs_embeds": model.get_input_embeddings()(ids())}):
        with pytest.raises(ValueError, match="input_ids"):
            model(**inputs)


@job(GROUP, "attention: eager and sdpa agree, padded and not; changed by `set_attn_implementation`")
def attention_implementations(family: Family, tmp: Path) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    model = family.causal(attn_implementation="eager")
    want = [model(input_ids=ids(), attention_mask=m).logits for m in (None, mask)]
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    for m, logits in zip((None, mask), want, strict=True):
        close(model(input_ids=ids(), attention_mask=m).logits[mask.bool()], logits[mask.bool()], 1e-4)


@job(GROUP, "experts: eager, batched and grouped agree; changed by `set_experts_implementation`")
def experts_implementations(family: Family, tmp: Path) -> None:
    model = family.causal(experts_implementation="eager")
    want = model(input_ids=ids()).logits
    for implementation in ("batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        close(model(input_ids=ids()).logits, want, 1e-4)


@job(GROUP, "experts: an implementation of one's own, registered with transformers, is called")
def own_experts(family: Family, tmp: Path) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    calls = []

    def own(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(calls))
        return batched_mm_experts_forward(*args, **kwargs)

    ALL_EXPERTS_FUNCTIONS.register("seams_own", own)
    model = family.causal()
    want = model(input_ids=ids()).logits
    model.set_experts_implementation("seams_own")
    close(model(input_ids=ids()).logits, want, 1e-4)
    assert len(calls) == LAYERS


@job(GROUP, "odd sizes: one token, one row, 17 tokens")
def odd_sizes(family: Family, tmp: Path) -> None:
    model = family.causal()
    for shape in ((1, 1), (3, 1), (1, 17)):
        out = model(input_ids=torch.full(shape, 7), output_router_logits=True)
        assert out.logits.shape == (*shape, VOCAB)
        assert out.router_logits[0].shape == (shape[0] * shape[1], EXPERTS)


@job(GROUP, "a batch without rows")
def no_rows(family: Family, tmp: Path) -> None:
    assert family.causal()(input_ids=torch.full((0, 5), 7)).logits.shape == (0, 5, VOCAB)


@job(GROUP, "a batch of padding alone: finite numbers, a finite gradient")
def only_padding(family: Family, tmp: Path) -> None:
    model = family.causal(output_router_logits=True)
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[0] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@job(GROUP, "a mask of four dimensions, and positions given")
def given_mask(family: Family, tmp: Path) -> None:
    model = family.causal()
    mask = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 9, 9)
    positions = torch.arange(9)[None].expand(2, 9)
    close(
        model(input_ids=ids(), attention_mask=mask, position_ids=positions).logits,
        model(input_ids=ids()).logits,
        1e-4,
    )
