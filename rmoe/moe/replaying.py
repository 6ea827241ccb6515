"""Record a model's routing while it works, and have it route the same way again.

    with rmoe.moe.record(model) as recording:
        model.generate(prompts, ...)
    with rmoe.moe.replay(model, recording):
        model(sequences, labels=...).loss.backward()

Expert ids are forced; weights come from the live scores of those experts, with their gradient, by the family's own
code (`rmoe.moe.forcing`); a recurrent router's state advances as always. The contract is AReno's issue 522.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rmoe.errors import RequestError, RunError
from rmoe.moe.forcing import Forcing
from rmoe.moe.layers import RoutedLayer, layer_of_call, names_of_calls, require_layers, routed_stacks
from rmoe.moe.reading import DenseReader, ExpertsReader, RoutingReader
from rmoe.moe.recorder import listen
from rmoe.moe.recording import UNKNOWN, RecordedSequence, Recording
from rmoe.moe.records import RoutingRecord
from rmoe.moe.tokens import Tokens, cache_of, first_tensor, tokens_of
from rmoe.results.trace import Trace
from rmoe.routing.spec import RouterSpec


@dataclass(eq=False)
class Pass:
    """One forward pass of the model.

    Attributes:
        tokens: what it was called with.
        ids: [T, L, K] int64 on the CPU, what to force; None while recording.
        called, experts, num_experts: what was heard, in the order of the calls: layer, [T, k] choice, E.
        times: how often each element of the stack was called.
    """

    tokens: Tokens
    ids: Tensor | None = None
    called: list[str] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    num_experts: list[int] = field(default_factory=list)
    times: Counter[Any] = field(default_factory=Counter)


@contextmanager
def passes(
    model: nn.Module, begin: Callable[[Tokens], Pass], end: Callable[[Pass, Any], None]
) -> Iterator[Callable[[], Pass | None]]:
    """Within, each forward pass of the model is one `Pass`; yields what gives the one in progress, None outside any.

    Args:
        begin: makes it.
        end: is told that it is over, and its cache: the one given or returned, None without any.
    """
    current: dict[int, Pass] = {}  # one a thread

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        current[get_ident()] = begin(tokens_of(module, args, kwargs))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        done = current.pop(get_ident(), None)
        if done is not None and output is not None:
            end(done, cache_of(module, args, kwargs, output))

    with (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True, always_call=True),
    ):
        yield lambda: current.get(get_ident())


def _one_text(model: nn.Module) -> list[RoutedLayer]:
    """The routed layers of a model that reads one text.

    Raises:
        RequestError: an encoder-decoder, whose stacks route different tokens; experts that compete choose themselves.
    """
    rate = getattr(getattr(model, "config", None), "competition_rate", 0)
    if rate and model.training:
        raise RequestError("competition_rate", rate, "0, or a model in evaluation mode")
    layers = require_layers(model)
    if len(routed_stacks(layers)) > 1:
        allowed = f"a model with one stack of routed layers, not {sorted(routed_stacks(layers))}"
        raise RequestError("model", type(model).__name__, allowed)
    return layers


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Within, the routing of every forward pass of `model` goes into the recording that this yields.

    A pass without a cache, or with an empty one, begins a sequence for each row of its batch, and for each sequence
    packed into a row (told by `position_ids` that begin anew, without a mask). A decode step continues the sequences of
    its cache, so caches may take turns; candidates that assisted generation takes out of a cache again are forgotten,
    but for the last pass's. Padding is left out, also what `generate` writes behind a row that has ended (by the
    model's `generation_config`; on leaving the context). A pass of fewer layers, a draft of `assistant_early_exit`, is
    not recorded, nor is what activation checkpointing runs again.

    Args:
        model: RMoE, a graft, or any MoE with one stack that can be read; beam search reorders rows and is not followed.

    Raises:
        RequestError: it cannot be read; it adds tokens of its own (PEFT's prompt tuning: record `get_base_model()`); a
            cache that was filled before.
    """
    layers = _one_text(model)
    recording = Recording()
    of_cache: WeakKeyDictionary[Any, list[RecordedSequence]] = WeakKeyDictionary()
    begun: list[tuple[RecordedSequence, int]] = []  # each sequence, and the tokens of its first pass
    depth = _depth(model)

    def end(done: Pass, cache: Any) -> None:
        if _depth(model) != depth:
            return
        if not recording.layers:
            recording.layers = tuple(names_of_calls(done.called))
            recording.num_experts = tuple(done.num_experts)
            recording.top_k = tuple(one.shape[1] for one in done.experts)
        ids = _ids(done)
        if len(ids) != done.tokens.total:
            allowed = f"a model that routes the tokens it is given, not {len(ids)} for {done.tokens.total}"
            raise RequestError("model", type(model).__name__, allowed)
        if done.tokens.continues:
            sequences = of_cache.get(cache, [])
        else:
            sequences = [
                RecordedSequence(torch.empty(0, dtype=torch.int64), ids[:0]) for _ in done.tokens.rows
            ]
            recording.sequences.extend(sequences)
            begun.extend(zip(sequences, map(len, done.tokens.rows), strict=True))
        if len(sequences) != len(done.tokens.rows):
            found = f"{len(sequences)} of {len(done.tokens.rows)} sequences recorded"
            raise RequestError("cache", f"one with {found}", "the cache of passes that were recorded")
        if cache is not None:
            of_cache[cache] = sequences
        for sequence, rows, past in zip(sequences, done.tokens.rows, done.tokens.past, strict=True):
            if past is not None:
                sequence.cut(past)
            sequence.extend(done.tokens.ids[rows], ids[rows])

    with ExitStack() as stack:
        current = stack.enter_context(passes(model, Pass, end))

        def receive(layer: RoutedLayer, found: RoutingRecord) -> None:
            now = current()
            if now is not None:  # else it is run again, by a backward pass
                now.called.append(layer.name)
                now.experts.append(found.experts)
                now.num_experts.append(found.num_experts)

        stack.enter_context(listen(layers, receive))
        try:
            yield recording
        finally:
            for sequence, prompt in begun:
                _cut_padding(sequence, prompt, getattr(model, "generation_config", None))


def _depth(model: nn.Module) -> int | None:
    """How many layers run; `assistant_early_exit` lowers it for its drafts."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "num_hidden_layers", None)


def _cut_padding(sequence: RecordedSequence, prompt: int, config: Any) -> None:
    """Forget what follows an end token behind the prompt if it is padding: `generate` reads it with the other rows."""
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return
    ends = ends if isinstance(ends, list) else [ends]
    pad = ends[0] if config.pad_token_id is None else config.pad_token_id
    tokens = sequence.tokens.tolist()
    length = len(tokens)
    while length > prompt and tokens[length - 1] == pad:
        length -= 1
    # An end token may be the padding's: the first one was generated.
    if length < len(tokens) and length >= prompt and pad in ends:
        length += 1
    if length > prompt and tokens[length - 1] in ends:
        sequence.cut(length)


def _ids(done: Pass) -> Tensor:
    """[T, L, K] int16 of a pass."""
    width = max(one.shape[1] for one in done.experts)
    padded = [nn.functional.pad(one, (0, width - one.shape[1]), value=UNKNOWN).cpu() for one in done.experts]
    return torch.stack(padded, dim=1).to(torch.int16)


@contextmanager
def replay(model: nn.Module, recording: Recording | Trace) -> Iterator[None]:
    """Within, each token of `model`'s forward passes goes to the experts that the recording has for it.

    The sequences of a pass are looked up by their token ids, in the recording's order first: batches may be padded on
    either side, packed, micro-batched or generated anew. A sequence may be shorter than recorded. Tokens beyond its
    end (a generation's last token was never read) and slots that it calls `UNKNOWN` are routed live.

    Safe under non-reentrant activation checkpointing: a layer that a backward pass runs again is given the ids of its
    own forward pass, known by the layer's saved input. Not for compiled models, whose code is fixed.

    Args:
        model: of the layers that the recording has.
        recording: from `record`, or a trace from a file. Weights are not in it: they come from the live scores.

    Raises:
        RequestError: layers, E or k differ; a sequence that the recording has not.
        RunError: a layer chose otherwise all the same; nothing was replayed correctly.
    """
    layers = _one_text(model)
    if isinstance(recording, Trace):
        recording = Recording.of(recording)
    _require_fit(layers, recording)
    follower = _Follower(recording)
    with ExitStack() as stack:
        current = stack.enter_context(passes(model, follower.begin, lambda done, cache: None))
        where = _Where(current)
        elements = {
            (layer.stack, layer.index): model.get_submodule(f"{layer.stack}.{layer.index}")
            for layer in layers
            if layer.stack
        }
        for key, element in elements.items():
            hook = partial(where.enter, key)
            stack.enter_context(element.register_forward_pre_hook(hook, with_kwargs=True))
            # From transformers 5.24 on checkpoints lie within an element's call.
            for part in element.children():
                hook = partial(where.enter_part, key)
                stack.enter_context(part.register_forward_pre_hook(hook, with_kwargs=True))
        for layer in layers:
            columns = [i for i, name in enumerate(recording.layers) if layer_of_call(name) == layer.name]
            stack.enter_context(_forced(model, layer, columns, where))
        yield


def _require_fit(layers: list[RoutedLayer], recording: Recording) -> None:
    for layer in layers:
        spec = getattr(layer.gate, "spec", None)
        if isinstance(spec, RouterSpec) and spec.balance.capacity_factor is not None:
            given = f"{layer.gate_name}, where the tokens of a call compete for an expert's capacity"
            raise RequestError(
                "model", given, "a router without a capacity limit: what it drops depends on the batch"
            )
    by_name = {layer.name: layer for layer in layers}
    names = [*map(layer_of_call, recording.layers)]
    if set(names) != set(by_name):
        allowed = f"one of the layers {sorted(by_name)}"
        raise RequestError("recording", sorted(set(names)), allowed)
    for name, *sizes in zip(names, recording.num_experts, recording.top_k, strict=True):
        own = [by_name[name].num_experts, by_name[name].slots]
        if sizes != own:
            found, allowed = (f"{experts} experts, top-{k}" for experts, k in (sizes, own))
            raise RequestError("recording", found, f"{allowed} in {name}")


class _Follower:
    """Finds the sequences of each pass in the recording."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.next, self._looking = 0, Lock()
        self._open: dict[int, list[tuple[RecordedSequence, int]]] = {}  # of each thread

    def begin(self, tokens: Tokens) -> Pass:
        """The pass that these tokens begin, with what to force."""
        width = max(self.recording.top_k, default=0)
        ids = torch.full((tokens.total, len(self.recording.layers), width), UNKNOWN)
        if not tokens.continues:
            with self._looking:
                self._open[get_ident()] = [(self._find(tokens.ids[rows]), 0) for rows in tokens.rows]
        opened = self._open.get(get_ident(), [])
        if len(opened) != len(tokens.rows):
            raise RequestError("batch", len(tokens.rows), f"the {len(opened)} sequences being continued")
        for at, rows in enumerate(tokens.rows):
            sequence, start = opened[at]
            known = sequence.ids[start : start + len(rows)]
            if not _agree(sequence.tokens[start : start + len(rows)], tokens.ids[rows][: len(known)]):
                raise RequestError(
                    "tokens", tokens.ids[rows].tolist()[:8], "those that the recording goes on with"
                )
            ids[rows[: len(known)]] = known.long()
            opened[at] = (sequence, start + len(rows))
        return Pass(tokens, ids)

    def _find(self, tokens: Tensor) -> RecordedSequence:
        """Of those that agree as far as both go the one that goes furthest, from the last one found on, and around.

        A shorter one may have been recorded too: the start of this one, or another sequence that began alike.
        """
        count, best, longest = len(self.recording.sequences), 0, -1
        for step in range(count):
            at = (self.next + step) % count
            sequence = self.recording.sequences[at]
            both = min(len(sequence), len(tokens))
            if both > longest and _agree(sequence.tokens[:both], tokens[:both]):
                best, longest = at, both
                if both == len(tokens):
                    break
        if longest >= 0:
            self.next = best + 1
            return self.recording.sequences[best]
        shown = ", ".join(map(str, tokens.tolist()[:8]))
        raise RequestError(
            "tokens", f"[{shown}{', ...' if len(tokens) > 8 else ''}]", "a sequence of the recording"
        )


def _agree(recorded: Tensor, given: Tensor) -> bool:
    return bool(((recorded == given) | (recorded == UNKNOWN) | (given == UNKNOWN)).all())


class _Where:
    """Which pass a layer is running for, and for which time in it: also when a backward pass runs it again.

    A checkpoint saves a layer's input and gives it again to what the layer calls first: the memory it lies in tells
    the passes apart, since inputs that are still to be run again are alive.
    """

    def __init__(self, current: Callable[[], Pass | None]) -> None:
        self.current = current
        self._inputs: dict[tuple[Any, int, tuple[int, ...]], tuple[Pass, int]] = {}
        self._of: dict[Any, tuple[Pass, int]] = {}
        self._again: dict[Any, tuple[nn.Module, tuple[Pass, int]]] = {}

    def enter(self, key: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
        """An element of the stack is called."""
        now = self.current()
        hidden = first_tensor(args, kwargs)
        if now is None or hidden is None:
            return self.enter_part(key, module, args, kwargs)
        self._of[get_ident(), key] = self._inputs[key, hidden.data_ptr(), tuple(hidden.shape)] = (
            now,
            now.times[key],
        )
        now.times[key] += 1

    def enter_part(self, key: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A part of an element is called: outside a pass, perhaps on the element's saved input."""
        if self.current() is not None or (hidden := first_tensor(args, kwargs)) is None:
            return
        found = self._inputs.get((key, hidden.data_ptr(), tuple(hidden.shape)))
        if found is not None and (key not in self._again or self._again[key][0] is module):
            self._again[key] = (module, found)

    def of(self, layer: RoutedLayer) -> tuple[Pass, int]:
        """The pass and time that a layer runs for."""
        key = (layer.stack, layer.index)
        if self.current() is not None and (get_ident(), key) in self._of:
            return self._of[get_ident(), key]
        if key not in self._again:
            what = f"{layer.name} runs outside a forward pass of the model, on an input that it had in none"
            raise RunError(what, "nothing", "call the model that is replayed; do not offload activations")
        return self._again.pop(key)[1]


@contextmanager
def _forced(model: nn.Module, layer: RoutedLayer, columns: list[int], where: _Where) -> Iterator[None]:
    """Within, the router of one layer chooses what is replayed, and it is checked that the experts are given that."""
    own = isinstance(layer.reader, RoutingReader)
    # Where the block is the element that is checkpointed, its call lies outside the checkpoint.
    in_gate = own or layer.name == f"{layer.stack}.{layer.index}"
    inside = layer.gate if in_gate else model.get_submodule(layer.name)
    forward, own_forward = inside.forward, inside.__dict__.get("forward")
    forcing: dict[int, Forcing] = {}  # one a thread, and what it has forced is still to be verified
    expected: dict[int, Tensor] = {}

    def forced(*args: Any, **kwargs: Any) -> Any:
        now, time = where.of(layer)
        assert now.ids is not None
        ids = now.ids[:, columns[time], : layer.slots]
        if (hidden := first_tensor(args, kwargs)) is not None:
            ids = ids.to(hidden.device)
        expected[get_ident()] = ids
        with Forcing(ids, layer.num_experts) as one:
            forcing[get_ident()] = one
            return forward(*args, **kwargs)

    def verify_experts(module: nn.Module, args: Any, kwargs: Any) -> None:
        one, ids = forcing.get(get_ident()), expected.get(get_ident())
        if one is not None:
            one.active = False
        if ids is not None and isinstance(layer.reader, ExpertsReader):
            del expected[get_ident()]
            _require_taken(layer, ids, layer.reader.choice(args, kwargs)[0])

    def verify_gate(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(layer.reader, DenseReader):
            scores = layer.reader.scores_and_logits(output)[0]
            ids = expected.pop(get_ident())
            taken = torch.where(scores.gather(1, ids.clamp(min=0)) != 0, ids, UNKNOWN)
            _require_taken(layer, ids, taken)
        elif own:
            _require_taken(layer, expected.pop(get_ident()), output[0].experts)

    inside.forward = forced
    try:
        with (
            layer.experts.register_forward_pre_hook(verify_experts, prepend=True, with_kwargs=True),
            layer.gate.register_forward_hook(verify_gate),
        ):
            yield
    finally:
        if own_forward is None:
            del inside.forward  # the class's own is there again
        else:
            inside.forward = own_forward  # accelerate's hooks, or an outer replay


def _require_taken(layer: RoutedLayer, ids: Tensor, taken: Tensor) -> None:
    """Raise unless the experts got what was to be replayed; an empty slot may hold anything of weight 0."""
    taken = taken.view(len(ids), -1)[:, : ids.shape[1]]
    given = (ids >= 0) & (ids < layer.num_experts)
    if taken.shape != ids.shape or not bool(((taken == ids) | ~given).all()):
        what = f"{layer.name} did not take the choice that was to be replayed"
        raise RunError(what, "nothing", "report the model type; its routing can be recorded, not replayed")
