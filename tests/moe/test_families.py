"""Every family that takes a graft can be read too: silencing an expert changes exactly the tokens said to use it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rmoe.errors import RequestError
from rmoe.moe import Recorder, scorer_matrix
from rmoe.moe.reading import ExpertsReader
from rmoe.moe.scores import SCORES
from tests.graft.tiny_families import PROMISED, tiny_model

IDS = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))


def outputs(model: nn.Module, block: str) -> Tensor:
    """The block's output for `IDS`, [T, d]."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        first = output[0] if isinstance(output, tuple) else output
        found.append(first.detach().reshape(-1, first.shape[-1]))

    handle = model.get_submodule(block).register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("family", PROMISED)
def test_silencing_an_expert_changes_its_tokens_alone(family: str) -> None:
    recorder = Recorder(tiny_model(family).eval())
    layer = recorder.layers[0]
    record = recorder(IDS)[0]
    assert record.experts.shape == (32, recorder.experts_per_token)
    torch.testing.assert_close(record.probs.sum(-1), torch.ones(32))
    assert scorer_matrix(layer, None).shape == (recorder.num_experts, 32)
    whole = outputs(recorder.model, layer.name)
    down = layer.experts.down_proj
    for expert in range(recorder.num_experts):
        saved = [
            (p, p[expert].clone()) for n, p in layer.experts.named_parameters() if n.startswith("down_proj")
        ]
        with torch.no_grad():
            for parameter, _ in saved:
                parameter[expert] = 0
        changed = (outputs(recorder.model, layer.name) != whole).any(-1)
        with torch.no_grad():
            for parameter, values in saved:
                parameter[expert] = values
        assert torch.equal(changed, ((record.experts == expert) & (record.weights > 0)).any(-1))
    assert down.abs().sum() > 0


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_score_is_found_from_the_weights(name: str, top_k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 8, generator=generator)
    given = logits.softmax(-1) if name == "probabilities" else logits
    scores = SCORES[name](given)
    chosen = scores.topk(top_k, -1)
    weights = chosen.values if top_k == 1 else 2.5 * chosen.values / chosen.values.sum(-1, keepdim=True)
    hidden = torch.zeros(40, 2)
    reader = ExpertsReader("mlp", 8, top_k)
    record = reader.read(given, (hidden, chosen.indices, weights.to(dtype)), {})
    assert reader.scoring == name
    torch.testing.assert_close(record.probs, scores / scores.sum(-1, keepdim=True))
    arbitrary = torch.rand(40, top_k, generator=generator)
    with pytest.raises(RequestError, match="MODEL is 'mlp'; allowed: a router whose weights follow"):
        ExpertsReader("mlp", 8, top_k).read(given, (hidden, chosen.indices, arbitrary), {})
