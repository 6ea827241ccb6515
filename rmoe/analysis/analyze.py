"""All measures of one or several models on one text: what `rmoe analyze` and `rmoe compare` write down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from rmoe.analysis.gradients import find_shared, router_gradients
from rmoe.analysis.measures import RoutingMeasures, Sizes
from rmoe.analysis.saturation import Saturation
from rmoe.analysis.weights import mean_pairwise_cosine, norm_and_std, random_similarity
from rmoe.errors import RequestError
from rmoe.moe import check_reading, expert_vectors, scorer_matrix
from rmoe.moe.recorder import Recorder
from rmoe.moe.records import RoutingBatch
from rmoe.results import analysis as schema

_RANDOM_SEED = 0

CHECKED_TOKENS = 128


@dataclass(frozen=True)
class Subject:
    """A model to analyse.

    Attributes:
        name: unique in the file: a router's, or a folder's.
        model: an RMoE model or a transformers MoE, on its device.
        step: optimizer steps it was trained for; shown where two checkpoints are compared.
    """

    name: str
    model: nn.Module
    step: int = 0


@dataclass(frozen=True)
class AnalysisOptions:
    """How much is looked at.

    Attributes:
        batch_size: blocks per forward pass. No figure depends on it, beyond rounding.
        gradient_tokens: about so many tokens, in whole blocks, for the gradient split; 0 leaves it out.
        explored_tokens: so many tokens are kept for the token explorer.
        check: silence some experts first, and refuse a model that is read wrongly (`rmoe.moe.check_reading`).
    """

    batch_size: int = 8
    gradient_tokens: int = 4096
    explored_tokens: int = 256
    check: bool = True

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("gradient_tokens", 0), ("explored_tokens", 0)):
            value = getattr(self, name)
            if value < least:
                raise RequestError(name, value, f"at least {least}")


def analyze_models(
    subjects: Sequence[Subject],
    blocks: np.ndarray,
    token_text: Callable[[int], str],
    options: AnalysisOptions | None = None,
    *,
    stability: bool = False,
) -> list[schema.ModelAnalysis]:
    """Measure the routing of models that read the same token ids.

    Args:
        subjects: all are in memory at once; call once per model where that is too much.
        blocks: [N, S] token ids, consecutive text; every token is measured.
        token_text: how an id is shown.
        options: sizes of the samples.
        stability: also how much of each token's choice the second subject shares with the first (saturation),
            recorded with the first.

    Returns:
        One entry per subject, in order.

    Raises:
        RequestError: no MoE layers, an id beyond a model's vocabulary, `stability` of models of different shape.
    """
    options = options or AnalysisOptions()
    token_counts = np.bincount(blocks.reshape(-1))
    passes = [_Pass(subject, token_counts, options) for subject in subjects]
    saturation = _saturation(passes) if stability else None
    with _evaluating([subject.model for subject in subjects]):
        if options.check:
            for one in passes:
                one.require_read(blocks)
        for start in range(0, len(blocks), options.batch_size):
            input_ids = torch.from_numpy(blocks[start : start + options.batch_size].astype(np.int64))
            batches = [one.update(input_ids) for one in passes]
            if saturation is not None:
                saturation.update(batches[0].experts, batches[1].experts, batches[0].num_experts)
        analyses = [one.result(blocks, token_text) for one in passes]
    if saturation is not None:
        steps = [subject.step for subject in subjects]
        values = [saturation.result().tolist()]
        stable = schema.Saturation(from_step=steps[1:2], to_step=steps[:1], values=values, n=saturation.n)
        analyses[0] = msgspec.structs.replace(analyses[0], saturation=stable)
    return analyses


class _Pass:
    """One subject while the text goes through it."""

    def __init__(self, subject: Subject, token_counts: np.ndarray, options: AnalysisOptions) -> None:
        self.subject, self.token_counts, self.options = subject, token_counts, options
        self.recorder = Recorder(subject.model)
        self.check: schema.ReadingCheck | None = None
        self.shared = find_shared(subject.model, self.recorder.layers)
        self.measures: RoutingMeasures | None = None
        embedding = subject.model.get_input_embeddings()  # type: ignore[operator]
        if len(token_counts) > len(embedding.weight):
            allowed = f"ids below {subject.name}'s vocabulary size ({len(embedding.weight)})"
            raise RequestError("tokenizer", f"one that gives id {len(token_counts) - 1}", allowed)
        self.device = embedding.weight.device

    def require_read(self, blocks: np.ndarray) -> None:
        """Check that the model is read correctly, on the start of the text.

        Raises:
            RequestError: silencing an expert changed other tokens than those said to use it.
        """
        ids = torch.from_numpy(blocks[:1, :CHECKED_TOKENS].astype(np.int64)).to(self.device)
        found = check_reading(self.subject.model, ids)
        self.check = schema.ReadingCheck(
            passed=found.passed,
            summary=found.summary(),
            tokens=found.tokens,
            experts=[schema.ExpertCheck(**asdict(one)) for one in found.experts],
        )
        if not found.passed:
            allowed = f"a model whose routing can be read, or --no-check; the check {found.summary()}"
            raise RequestError("MODEL", self.subject.name, allowed)

    def update(self, input_ids: Tensor) -> RoutingBatch:
        """Run the model on [B, S] ids and measure its routing."""
        batch = self.recorder.batch(input_ids.to(self.device))
        if self.measures is None:  # how many classes a router has shows in what it returns
            layers, _, classes = batch.probs.shape
            by_layer = batch.layer_experts, tuple(layer.top_k for layer in self.recorder.called)
            sizes = Sizes(layers, batch.num_experts, self.recorder.experts_per_token, classes, *by_layer)
            self.measures = RoutingMeasures(sizes, self.token_counts, self.options.explored_tokens)
        self.measures.update(batch, input_ids.reshape(-1))
        return batch

    def result(self, blocks: np.ndarray, token_text: Callable[[int], str]) -> schema.ModelAnalysis:
        """Everything measured, and what the weights and gradients say besides."""
        assert self.measures is not None
        sizes = self.measures.sizes
        return schema.ModelAnalysis(
            name=self.subject.name,
            summary=_summary(self.subject.model, sizes),
            layers=sizes.num_layers,
            experts=sizes.num_experts,
            experts_per_token=sizes.experts_per_token,
            layer_names=self.recorder.names,
            check=self.check,
            similarity=self._similarity(),
            router_weights=self._router_weights(),
            gradient_split=self._gradient_split(blocks),
            **self.measures.fields(token_text),
        )

    def _similarity(self) -> schema.Similarity | None:
        vectors = [expert_vectors(layer) for layer in self.recorder.called]
        if any(v is None for v in vectors):
            return None
        found = [v for v in vectors if v is not None]
        width = self.subject.model.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
        reference = random_similarity(
            self.recorder.num_experts, [width] * (found[0].shape[1] // width), _RANDOM_SEED
        )
        return schema.Similarity(
            values=[mean_pairwise_cosine(v) for v in found], random_init=[reference] * len(found)
        )

    def _router_weights(self) -> schema.RouterWeights | None:
        matrices = [scorer_matrix(layer, self.shared) for layer in self.recorder.called]
        measured = [norm_and_std(matrix) for matrix in matrices if matrix is not None]
        if len(measured) < len(matrices):
            return None  # a router without a matrix: a hash
        return schema.RouterWeights(norm=[norm for norm, _ in measured], std=[std for _, std in measured])

    def _gradient_split(self, blocks: np.ndarray) -> schema.GradientSplit | None:
        if len(self.recorder.called) > len(self.recorder.layers) or self.recorder.two_sided:
            return (
                None  # passes of a loop share their parameters; an encoder-decoder's loss is of another text
            )
        count = min(len(blocks), -(-self.options.gradient_tokens // blocks.shape[1]))
        # Batches of one size, so that each weighs the same in the mean.
        size = min(self.options.batch_size, max(count, 1))
        sample = [
            torch.from_numpy(blocks[start : start + size].astype(np.int64)).to(self.device)
            for start in range(0, count - size + 1, size)
        ]
        gradients = router_gradients(self.subject.model, self.recorder.layers, self.shared, sample)
        if gradients is None:
            return None
        return schema.GradientSplit(
            step=[self.subject.step],
            language_model=[gradients.language_model],
            balance=_one(gradients.balance),
            language_model_cut=_one(gradients.cut),
            recurrent=_one(gradients.recurrent),
            shared=_one(gradients.shared),
            tokens=gradients.tokens,
        )


def _one(value: Any) -> list[Any] | None:
    return None if value is None else [value]


def _saturation(passes: Sequence[_Pass]) -> Saturation:
    shapes = [(len(one.recorder.layers), one.recorder.num_experts) for one in passes[:2]]
    if len(shapes) < 2 or shapes[0] != shapes[1]:
        raise RequestError(
            "--compare-with", f"(layers, experts) {shapes[-1]}", f"those of the first, {shapes[0]}"
        )
    return Saturation(shapes[0][0])


def _summary(model: nn.Module, sizes: Sizes) -> str:
    kind = model.config.model_type  # type: ignore[union-attr]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{kind}, {millions:.1f}M parameters, {sizes.num_layers} MoE layers, "
        f"{sizes.num_experts} experts, {sizes.experts_per_token} per token"
    )


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Dropout and routing noise off meanwhile."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)
