"""The chunked loss equals transformers', whatever the chunks, the labels that count and the precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import fixed_cross_entropy

from rmoe.model import head as module
from rmoe.model.head import LMHead, chunked_cross_entropy, count_next_tokens, next_token_loss, next_tokens
from tests.model.small import assert_same, loss_and_gradients, model, tokens
from tests.versions import since


def small_head(dtype: torch.dtype = torch.float64) -> tuple[LMHead, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, 2:4], labels[1, -1] = -100, -100
    return LMHead(5, 11).to(dtype), torch.randn(3, 7, 5, dtype=dtype, requires_grad=True), labels


def reference(head: LMHead, hidden: Tensor, shifted: Tensor, items: Tensor | int | None) -> Tensor:
    """transformers' `ForCausalLMLoss` without its conversion of logits to float32."""
    return fixed_cross_entropy(head(hidden).view(-1, 11), shifted.reshape(-1), items)


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("items", [None, 31, torch.tensor(17)])
@pytest.mark.parametrize("shifted_already", [False, True])
def test_equals_transformers(
    rows: int, items: Tensor | int | None, shifted_already: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * 11 * 4)
    head, hidden, labels = small_head()
    shifted = labels if shifted_already else torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    want = reference(head, hidden, shifted, items)
    got = head(hidden, labels if shifted_already else next_tokens(labels), items)
    assert abs(got.detach() - want.detach()) < 1e-14
    for factor in (1.0, 3.0):  # the gradient of the loss; twice, as with retain_graph
        gradients = (
            torch.autograd.grad(factor * loss, (hidden, head.weight), retain_graph=True)
            for loss in (got, want)
        )
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours - theirs).abs().max() < 1e-14


def test_loss_of_whole_logits() -> None:
    """Each pair of a position and the label after it, one by one."""
    head, hidden, labels = small_head()
    logits = head(hidden)
    want = torch.zeros(3, 6, dtype=torch.float64)
    for row in range(3):
        for position in range(6):
            if (target := int(labels[row, position + 1])) != -100:
                want[row, position] = -logits[row, position].log_softmax(-1)[target]
    counted = int(count_next_tokens(labels))
    assert counted == int((want != 0).sum()) == 15
    found = {name: next_token_loss(logits, labels, name) for name in ("none", "sum", "mean")}
    assert (found["none"] - want).abs().max() < 1e-6
    assert abs(found["sum"] - want.sum()) < 1e-5
    assert abs(found["mean"] - want.sum() / counted) < 1e-6
    assert (
        abs(found["mean"] - head(hidden, next_tokens(labels))) < 1e-6
    )  # the chunked loss, of the same targets


def test_no_token_or_no_label_counts() -> None:
    """Mean over nothing is NaN, as in transformers; a sum over items is 0, and so are its gradients."""
    head, hidden, labels = small_head()
    nothing = torch.full_like(labels, -100)
    assert head(hidden, nothing).isnan()
    for part in (hidden, hidden[:0]):
        loss = head(part, nothing[: len(part)], 5)
        assert float(loss.detach()) == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, (part, head.weight)))


def test_the_operator_keeps_torchs_rules() -> None:
    head, hidden, labels = small_head()
    arguments = (
        hidden.detach().view(-1, 5).requires_grad_(),
        head.weight,
        labels.view(-1),
        torch.tensor(0.3),
        torch.float64,
    )
    torch.library.opcheck(chunked_cross_entropy, (*arguments, True, True))
    torch.library.opcheck(chunked_cross_entropy, (*arguments, False, False))


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 11 * 4)
    head, hidden, labels = small_head(torch.float32)
    exact = torch.autograd.grad(head(hidden, next_tokens(labels)), (hidden, head.weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(hidden, next_tokens(labels))
    low = torch.autograd.grad(loss, (hidden, head.weight))
    assert loss.dtype == low[0].dtype == low[1].dtype == torch.float32
    for ours, want in zip(low, exact, strict=True):
        assert 0 < (ours - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("router", ["rmoe", "smoe"])
def test_model_with_and_without_logits(router: str, tied: bool) -> None:
    net, ids = model(router=router, tie_word_embeddings=tied), tokens()
    assert net(ids, labels=ids).logits.shape == (3, 13, 67)
    assert net(ids, output_logits=False).logits.shape == (3, 13, 67)  # no loss was asked for
    assert net(ids, labels=ids, output_logits=False).logits is None
    assert_same(loss_and_gradients(net, ids, output_logits=False), loss_and_gradients(net, ids))
    with torch.no_grad():
        assert abs(net(ids, labels=ids, output_logits=False).loss - net(ids, labels=ids).loss) < 1e-6


def test_frozen_head_and_frozen_trunk() -> None:
    net, ids = model(), tokens()
    net.lm_head.weight.requires_grad_(False)
    net(ids, labels=ids, output_logits=False).loss.backward()
    assert net.lm_head.weight.grad is None
    net = model().requires_grad_(False)
    net.lm_head.weight.requires_grad_(True)
    net(ids, labels=ids, output_logits=False).loss.backward()
    assert net.lm_head.weight.grad.abs().sum() > 0


def test_a_replaced_or_split_head_gives_logits() -> None:
    net, ids = model(), tokens()
    net.resize_token_embeddings(80)
    assert type(net.lm_head) is nn.Linear
    assert net(ids, labels=ids, output_logits=False).logits.shape[-1] == 80
    net = model()
    net.lm_head._is_hooked = True  # what transformers' tensor parallelism sets
    assert net(ids, labels=ids, output_logits=False).logits is not None


@since("transformers", "5.23", "its grouped product in Python cannot be traced")
def test_compiled() -> None:
    torch._dynamo.reset()
    net, ids = model(experts="grouped_mm", num_hidden_layers=2), tokens()
    want = loss_and_gradients(net, ids, output_logits=False)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(compiled, ids, output_logits=False), want)


def test_logits_never_set_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocations as torch's profiler counts them: with 500 x 2,000 logits, 4 MB a copy, in chunks of 20 rows."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 20 * 2000 * 4)
    net, ids = model(vocab_size=2000, num_hidden_layers=2), tokens(1, 500, vocab=2000)

    def peak(**options: bool) -> int:
        net.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            net(ids, labels=ids, **options).loss.backward()
        changes = (e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
        total = most = 0
        for change in changes:
            total += change
            most = max(most, total)
        return most

    logits = 500 * 2000 * 4
    assert peak() > 3 * logits  # the test sees them
    assert peak(output_logits=False) < 1.5 * logits


def test_float16_gradients_survive_a_division_by_many_tokens() -> None:
    """A loss scaler's factor comes after the operator: what it casts to float16 must not be divided before."""
    items, scale = torch.tensor(1_000_000), 65536.0
    head, hidden, labels = small_head(torch.float32)
    grads = []
    for autocast in (False, True):
        head.zero_grad(), setattr(hidden, "grad", None)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = head(hidden, next_tokens(labels), items)
        (loss * scale).backward()
        grads.append((hidden.grad / scale, head.weight.grad / scale))
    for want, got in zip(*grads, strict=True):
        assert (got - want).norm() < 2e-3 * want.norm()
