"""All measures of one or several models on one text: what `rmoe analyze` and `rmoe compare` write down."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from rmoe.analysis.balance import audit_balance
from rmoe.analysis.contribution import RouteContributions
from rmoe.analysis.gradients import find_shared, router_gradients
from rmoe.analysis.insight import Predictability, Saliency
from rmoe.analysis.measures import RoutingMeasures, Sizes
from rmoe.analysis.options import AnalysisOptions
from rmoe.analysis.regret import TOKENS, RouteRegret
from rmoe.analysis.saturation import Saturation
from rmoe.analysis.streaming.run import StreamedRouting
from rmoe.analysis.weights import LayerWeights, layer_weights, random_similarity
from rmoe.errors import RequestError, RunError
from rmoe.moe import check_reading
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
        step: optimizer steps it was trained for; shown where two checkpoints of one run are compared.
        streamed: its routing on the text, where the model is larger than memory; `model` then has no weights, and
            gradients are not measured.
        run: what tells that run from others.
    """

    name: str
    model: nn.Module
    step: int = 0
    streamed: StreamedRouting | None = None
    run: str = ""


def analyze_models(
    subjects: Sequence[Subject],
    blocks: np.ndarray,
    token_text: Callable[[int], str],
    options: AnalysisOptions | None = None,
    *,
    stability: bool = False,
    notes: list[str] | None = None,
) -> list[schema.ModelAnalysis]:
    """Measure the routing of models that read the same token ids.

    Args:
        subjects: all are in memory at once; call once per model where that is too much.
        blocks: [N, S] token ids, consecutive text; every token is measured.
        token_text: how an id is shown.
        options: sizes of the samples.
        stability: also how much of each token's choice the second subject shares with the first (saturation),
            recorded with the first.
        notes: gets a line for each measure that was asked for and cannot be taken.

    Returns:
        One entry per subject, in order.

    Raises:
        RequestError: no MoE layers, an id beyond a model's vocabulary, `stability` of models of different shape.
        RunError: a router's probabilities are not finite.
    """
    options = options or AnalysisOptions()
    token_counts = np.bincount(blocks.reshape(-1))
    passes = [_Pass(subject, token_counts, options) for subject in subjects]
    if stability:
        _require_alike(passes)
    saturation: Saturation | None = None
    with _evaluating([subject.model for subject in subjects]):
        if options.check:
            for one in passes:
                if one.streamed is None:  # which has no model to run a second time
                    one.require_read(blocks)
        for start in range(0, len(blocks), options.batch_size):
            input_ids = torch.from_numpy(blocks[start : start + options.batch_size].astype(np.int64))
            batches = [one.update(start // options.batch_size, input_ids) for one in passes]
            if stability and saturation is None:  # a looped model has more records than layers
                saturation = Saturation(len(batches[0].experts))
            if saturation is not None:
                saturation.update(batches[0].experts, batches[1].experts, batches[0].num_experts)
        analyses = [one.result(blocks, token_text) for one in passes]
    if notes is not None:
        notes += [note for one in passes for note in one.notes]
    if saturation is not None:
        first, second, n = subjects[0], subjects[1], saturation.n
        values, (changed, anywhere) = saturation.result().tolist(), saturation.flips()
        before, after = (second.step, first.step) if first.run == second.run else (0, 0)
        stable = schema.Saturation(from_step=[before], to_step=[after], values=[values], n=n)
        flipped = schema.Flips(other=second.name, values=changed.tolist(), any_layer=anywhere, n=n)
        analyses[0] = msgspec.structs.replace(analyses[0], saturation=stable, flips=flipped)
    return analyses


class _Pass:
    """One subject while the text goes through it."""

    def __init__(self, subject: Subject, token_counts: np.ndarray, options: AnalysisOptions) -> None:
        self.subject, self.token_counts, self.options = subject, token_counts, options
        self.notes: list[str] = []
        self.streamed = subject.streamed
        self.recorder = Recorder(subject.model) if self.streamed is None else self.streamed.recorder
        self.check: schema.ReadingCheck | None = None
        self.shared = find_shared(subject.model, self.recorder.layers)
        self.measures: RoutingMeasures | None = None
        layers, names = self.recorder.layers, options.measures if self.streamed is None else ()
        self.predictability = (
            Predictability(layers, self.shared, int(token_counts.sum()) // 2)
            if "predictability" in names and len(layers) > 1
            else None
        )
        self.saliency = Saliency(layers) if "saliency" in names else None
        self.contributions = (
            RouteContributions(subject.model, layers, self.shared) if "contributions" in names else None
        )
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
        self.check = check_reading(self.subject.model, ids)
        if not self.check.passed:
            allowed = f"a model whose routing can be read, or --no-check; the check {self.check.summary}"
            raise RequestError("MODEL", self.subject.name, allowed)

    def update(self, chunk: int, input_ids: Tensor) -> RoutingBatch:
        """Run the model on [B, S] ids, or take what was streamed, and measure its routing."""
        if self.streamed is None:
            with ExitStack() as listening:
                for measure in (self.predictability, self.saliency, self.contributions):
                    if measure is not None:
                        listening.enter_context(measure.listening())
                batch = self.recorder.batch(input_ids.to(self.device))
        else:
            batch = self.streamed.batch(chunk)
        finite = batch.probs.sum((1, 2)).isfinite()  # one number a layer tells
        if not finite.all():
            layer = self.recorder.called[int(finite.int().argmin())].name
            what = f"the router of {layer} in {self.subject.name} gives NaN or infinity"
            raise RunError(
                what, "nothing", "a model whose weights and activations are finite, or another --dtype"
            )
        if self.predictability is not None:
            self.predictability.update(batch)
        if self.contributions is not None:
            self.contributions.update()
        if self.measures is None:  # how many classes a router has shows in what it returns
            layers, _, classes = batch.probs.shape
            by_layer = batch.layer_experts, tuple(layer.top_k for layer in self.recorder.called)
            sizes = Sizes(layers, batch.num_experts, self.recorder.experts_per_token, classes, *by_layer)
            self.measures = RoutingMeasures(
                sizes, self.token_counts, self.options.explored_tokens, self.options.measures
            )
        self.measures.update(batch, input_ids.reshape(-1))
        return batch

    def result(self, blocks: np.ndarray, token_text: Callable[[int], str]) -> schema.ModelAnalysis:
        """Everything measured, and what the weights and gradients say besides."""
        assert self.measures is not None
        sizes, weights = self.measures.sizes, self._weights()
        return schema.ModelAnalysis(
            name=self.subject.name,
            summary=_summary(self.subject.model, sizes),
            layers=sizes.num_layers,
            experts=sizes.num_experts,
            experts_per_token=sizes.experts_per_token,
            layer_names=self.recorder.names,
            check=self.check,
            similarity=self._similarity(weights),
            router_weights=self._router_weights(weights),
            gradient_split=self._gradient_split(blocks),
            balance=self._balance(blocks),
            regret=self._regret(blocks),
            contributions=self._contributions(),
            contexts=self._contexts(blocks, token_text),
            predictability=self._predictability(),
            saliency=self._saliency(),
            **self.measures.fields(token_text),
        )

    def _contexts(self, blocks: np.ndarray, token_text: Callable[[int], str]) -> schema.Contexts | None:
        if self.measures is None or self.measures.contexts is None:
            return None
        positions, weights = self.measures.contexts.result()
        different, text = np.unique(blocks.reshape(-1), return_inverse=True)
        return schema.Contexts(
            vocabulary=[token_text(int(token_id)) for token_id in different],
            text=text.reshape(-1).tolist(),
            positions=positions.tolist(),
            weights=weights.tolist(),
        )

    def _predictability(self) -> schema.Predictability | None:
        found = self.predictability
        return found.result() if found is not None and found.n else None

    def _contributions(self) -> schema.Contributions | None:
        found = self.contributions
        return found.result() if found is not None and found.known else None

    def _saliency(self) -> list[list[float | None]] | None:
        if self.saliency is None:
            return None
        found = self.saliency.result().numpy()
        if np.isnan(found).all():
            self.notes.append(f"no saliency of {self.subject.name}: its experts are not told their choice")
        return _or_none(found)

    def _weights(self) -> list[LayerWeights]:
        if "weights" not in self.options.measures:
            return []
        if self.streamed is not None:
            return [self.streamed.weights[layer.name] for layer in self.recorder.called]
        return [layer_weights(layer, self.shared) for layer in self.recorder.called]

    def _similarity(self, weights: Sequence[LayerWeights]) -> schema.Similarity | None:
        values = [one.similarity for one in weights if one.similarity is not None]
        if not weights or len(values) < len(weights):
            return None
        width = self.subject.model.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
        widths = [width] * (weights[0].vector_width // width)
        reference = random_similarity(self.recorder.num_experts, widths, _RANDOM_SEED)
        return schema.Similarity(values=values, random_init=[reference] * len(values))

    def _router_weights(self, weights: Sequence[LayerWeights]) -> schema.RouterWeights | None:
        measured = [one.router for one in weights if one.router is not None]
        if not weights or len(measured) < len(weights):
            return None  # a router without a matrix: a hash
        return schema.RouterWeights(norm=[norm for norm, _ in measured], std=[std for _, std in measured])

    def _gradient_sample(self, measure: str, blocks: np.ndarray) -> list[Tensor]:
        """[B, S] ids each for a measure of gradients; empty where it is not asked for, or cannot be taken."""
        if self.streamed is not None or measure not in self.options.measures:
            return []  # gradients need all layers at once
        if len(self.recorder.called) > len(self.recorder.layers) or self.recorder.two_sided:
            return []  # passes of a loop share their parameters; an encoder-decoder's loss is of another text
        count = min(len(blocks), -(-self.options.gradient_tokens // blocks.shape[1]))
        # Batches of one size, so that each weighs the same in the mean, and of the same blocks whatever the size.
        size = max((n for n in range(1, self.options.batch_size + 1) if count % n == 0), default=1)
        return [
            torch.from_numpy(blocks[start : start + size].astype(np.int64)).to(self.device)
            for start in range(0, count, size)
        ]

    def _balance(self, blocks: np.ndarray) -> schema.BalanceAudit | None:
        sample = self._gradient_sample("balance", blocks)
        return audit_balance(self.subject.model, self.recorder.layers, sample)

    def _regret(self, blocks: np.ndarray) -> schema.Regret | None:
        if self.streamed is not None or "regret" not in self.options.measures or self.recorder.two_sided:
            return None
        ids = torch.from_numpy(blocks.astype(np.int64)).to(self.device)
        try:
            own, later = RouteRegret(self.subject.model, TOKENS, self.options.batch_size)(ids)
        except (RequestError, RunError) as why:  # routers whose choice cannot be forced
            self.notes.append(f"no regret of {self.subject.name}: {why}")
            return None
        exchanges = own.isfinite().sum(-1)
        variance = (own - own.nanmean(-1, keepdim=True)).square().nansum(-1) / (exchanges - 1)
        error = (variance / exchanges).sqrt()
        error[exchanges < 2] = math.nan
        better = ((own + later) < 0).sum(-1) / exchanges
        means = (own.nanmean(-1), error, later.nanmean(-1), better.double())
        rows = _or_none(torch.stack(means).numpy())
        return schema.Regret(
            own=rows[0], own_error=rows[1], later=rows[2], better=rows[3], exchanges=exchanges.tolist()
        )

    def _gradient_split(self, blocks: np.ndarray) -> schema.GradientSplit | None:
        sample = self._gradient_sample("gradients", blocks)
        return router_gradients(
            self.subject.model, self.recorder.layers, self.shared, sample, self.subject.step
        )


def _require_alike(passes: Sequence[_Pass]) -> None:
    shapes = [(len(one.recorder.layers), one.recorder.num_experts) for one in passes[:2]]
    if len(shapes) < 2 or shapes[0] != shapes[1]:
        raise RequestError(
            "--compare-with", f"(layers, experts) {shapes[-1]}", f"those of the first, {shapes[0]}"
        )


def _or_none(values: np.ndarray) -> list[list[float | None]]:
    """Rows of numbers; None for NaN, which JSON lacks."""
    return [[None if math.isnan(value) else value for value in row] for row in values.tolist()]


def _summary(model: nn.Module, sizes: Sizes) -> str:
    kind = model.config.model_type  # type: ignore[union-attr]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{kind}, {millions:.1f}M parameters, {sizes}"


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
