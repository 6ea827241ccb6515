"""How much one layer's routing says about another's: the paper's digitised measure, and the chosen experts'.

Both are plug-in estimates in nats. The digitised one is the paper's (Fig. 3, 6, 7): per token, over the E
positions of two probability vectors, averaged over tokens. With only E samples it is far from zero for
unrelated layers, so it comes with the level that chance alone gives. The mutual information of the chosen
experts is over tokens, and is corrected for its bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rmoe.analysis.histogram import add_counts

NUM_BINS = 100
MAX_TOKENS = 100_000
CHANCE_TOKENS = 10_000
_RELABELLING_SEED = 20_408
_CHUNK_BYTES = 1 << 18  # working set of one chunk: half of a usual second-level cache


def digitise(probs: np.ndarray, num_bins: int = NUM_BINS) -> np.ndarray:
    """Bin of each probability, as `numpy.digitize` places it among `num_bins` equal bins on [0, 1].

    Bin b is [b / num_bins, (b + 1) / num_bins), edges in float64; the last bin is closed, so 1.0 shares the
    bin of 0.995. (In a vector that sums to one at most one entry reaches the last bin, so a bin of its own
    for 1.0, as `numpy.digitize` gives with the outer edge listed, would put the same positions together.)

    Args:
        probs: any shape, values in [0, 1].
        num_bins: at most 256.

    Returns:
        uint8, the shape of `probs`.

    >>> digitise(np.array([0.0, 0.0099, 0.01, 0.29, 1.0]))
    array([ 0,  0,  1, 29, 99], dtype=uint8)
    """
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    values = np.asarray(probs, dtype=np.float64)
    # Multiplication rounds: 0.29 * 100 is just below 29. So guess the bin, then compare with its two edges.
    guess = np.clip((values * num_bins).astype(np.int16), 0, num_bins - 1)
    guess += values >= edges[1:].take(guess)
    guess -= values < edges[:-1].take(np.minimum(guess, num_bins - 1))
    return np.clip(guess, 0, num_bins - 1).astype(np.uint8)


def _same_bin_masks(bins: np.ndarray) -> list[np.ndarray]:
    """For each position, the set of positions in its bin, as bits.

    Args:
        bins: [L, C, T].

    Returns:
        ceil(C / 64) arrays [L, C, T] of the narrowest unsigned type that holds min(C, 64) bits: bit b of
        word w is set at [l, c, t] where position 64 w + b of token t and layer l has the bin of position c.
    """
    num_classes = bins.shape[1]
    dtype = next(
        t for t in (np.uint8, np.uint16, np.uint32, np.uint64) if np.iinfo(t).bits >= min(num_classes, 64)
    )
    words = []
    for start in range(0, num_classes, 64):
        mask = np.zeros(bins.shape, dtype)
        for bit, other in enumerate(range(start, min(start + 64, num_classes))):
            mask = mask | ((bins == bins[:, other : other + 1]).astype(dtype) << dtype(bit))
        words.append(mask)
    return words


def _mean_log_multiplicity(words: list[np.ndarray], log_table: np.ndarray) -> np.ndarray:
    """Mean over positions (axis -2) of ln of the number of set bits."""
    multiplicity = np.bitwise_count(words[0])
    if len(words) > 1:
        multiplicity = sum((np.bitwise_count(word) for word in words[1:]), start=multiplicity.astype(np.intp))
    return log_table.take(multiplicity).mean(axis=-2)


def digitised_mutual_information(probs: np.ndarray, num_bins: int = NUM_BINS) -> np.ndarray:
    """Mutual information of the binned probabilities of each pair of layers, for each token.

        I(X; Y) = H(X) + H(Y) - H(X, Y),   H(X) = ln C - 1/C sum_c ln m_c

    where m_c counts the positions that share position c's bin (in both layers, for the joint term). Counting
    needs no sort: the positions equal to c are a C-bit set, the joint set is an AND and its size a
    population count.

    Args:
        probs: [L, C, T]; probabilities of C classes in L layers for T tokens.
        num_bins: equal bins on [0, 1]; see `digitise`.

    Returns:
        [L, L, T] float64, nats, symmetric; the diagonal is the entropy H(X).

    Source: arXiv:2408.06793, Fig. 3; equal to `sklearn.metrics.mutual_info_score` of the two bin sequences.
    """
    num_layers, num_classes, num_tokens = probs.shape
    information = np.empty((num_layers, num_layers, num_tokens))
    log_table = np.log(np.maximum(np.arange(num_classes + 1), 1))
    chunk = max(1, _CHUNK_BYTES // (num_layers * num_classes * 8))
    for start in range(0, num_tokens, chunk):
        part = slice(start, min(start + chunk, num_tokens))
        words = _same_bin_masks(digitise(probs[..., part], num_bins))
        entropy = math.log(num_classes) - _mean_log_multiplicity(words, log_table)  # [L, t]
        for layer in range(num_layers):
            pairs = [word[layer] & word[layer:] for word in words]  # [L - layer, C, t]
            joint = math.log(num_classes) - _mean_log_multiplicity(pairs, log_table)
            row = np.maximum(entropy[layer] + entropy[layer:] - joint, 0.0)
            information[layer, layer:, part] = row
            information[layer:, layer, part] = row
    return information


def relabelled(probs: np.ndarray, first: int) -> np.ndarray:
    """The same probabilities with the classes of each token and layer in an order of their own.

    Args:
        probs: [L, C, T].
        first: which token of a text the first one is: token t's orders depend on t alone.
    """
    num_layers, num_classes, num_tokens = probs.shape
    stream = np.random.PCG64(_RELABELLING_SEED).advance(first * num_layers * num_classes)
    order = np.random.Generator(stream).random((num_tokens, num_layers, num_classes)).argsort(axis=-1)
    return np.take_along_axis(probs, order.transpose(1, 2, 0), axis=1)


class DigitisedMutualInformation:
    """Streams `digitised_mutual_information` over at most `max_tokens` evenly spaced tokens of a text.

    Of `total_tokens` the n = min(total, max) with index floor(i * total / n) are taken. Memory is O(L^2).

    With only C samples a token, layers that know nothing of each other show far more than zero. So there is a
    level to compare with, `chance`: the same measure with each layer's classes relabelled at random, which keeps
    every layer's distribution and destroys all agreement on which expert is which (the model of chance of the
    adjusted mutual information, Vinh et al., 2010). It is averaged over about `CHANCE_TOKENS` of the n tokens.

    Args:
        num_layers: L.
        total_tokens: tokens that `update` will see in all.
        max_tokens: most tokens to measure.
        layer_experts: E of each layer, where they differ: a pair is measured over the classes of its larger layer.
    """

    def __init__(
        self,
        num_layers: int,
        total_tokens: int,
        max_tokens: int = MAX_TOKENS,
        layer_experts: Sequence[int] = (),
    ) -> None:
        self.total_tokens = total_tokens
        self._experts = np.array(layer_experts or [0] * num_layers)
        self.sample_size = min(total_tokens, max_tokens)
        self.n = 0
        self._chance_every = max(1, self.sample_size // CHANCE_TOKENS)
        self._chance_n = 0
        self._seen = 0
        self._sum = np.zeros((num_layers, num_layers))
        self._chance_sum = np.zeros((num_layers, num_layers))

    def update(self, probs: Tensor) -> None:
        """Add the next tokens.

        Args:
            probs: [L, T, C].
        """
        first, last = self._seen, self._seen + probs.shape[1]
        self._seen = last
        # The i with first <= floor(i * total / n) < last; in integers, so that no token is taken twice or lost.
        start, stop = (
            min(-(-edge * self.sample_size // self.total_tokens), self.sample_size) for edge in (first, last)
        )
        if start >= stop:
            return
        take = np.arange(start, stop) * self.total_tokens // self.sample_size - first
        sampled = probs[:, torch.from_numpy(take).to(probs.device)].float().transpose(1, 2).cpu().numpy()
        self._sum += self._of_pairs(sampled, lambda part: part)
        self.n += len(take)
        skipped = -start % self._chance_every  # those with i a multiple of the spacing
        some = sampled[..., skipped :: self._chance_every]
        if some.shape[-1]:
            self._chance_sum += self._of_pairs(some, lambda part: relabelled(part, self._chance_n))
            self._chance_n += some.shape[-1]

    def _of_pairs(self, probs: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[L, L] sums over tokens of `probs` [L, C, T], changed before it is measured."""
        most, found = self._experts.max(), np.zeros_like(self._sum)
        for size in np.unique(self._experts):  # as a rule one
            layers = np.flatnonzero(self._experts <= size)
            pairs = np.ix_(layers, layers)
            part = np.delete(probs[layers], slice(size, most), axis=1)  # the null classes stand behind `most`
            values = digitised_mutual_information(change(part)).sum(axis=-1)
            largest = np.maximum.outer(self._experts[layers], self._experts[layers])
            found[pairs] = np.where(largest == size, values, found[pairs])
        return found

    def result(self) -> np.ndarray:
        """[L, L] float64, nats: the mean over the n tokens taken; the diagonal is the mean entropy H(X).

        Raises:
            ValueError: no token has been taken.
        """
        return _mean(self._sum, self.n)

    def chance(self) -> np.ndarray:
        """[L, L] float64, nats: the same for relabelled layers; the diagonal is the entropy still.

        Raises:
            ValueError: no token has been taken.
        """
        return _mean(self._chance_sum, self._chance_n)


def _mean(total: np.ndarray, n: int) -> np.ndarray:
    if n == 0:
        raise ValueError("no tokens to take a mean over")
    return total / n


def entropy_of_counts(counts: np.ndarray) -> np.ndarray:
    """Plug-in entropy in nats of counts over the last axis, 0 where there are none."""
    total = counts.sum(axis=-1)
    shares = counts / np.maximum(total, 1)[..., None]
    return -(shares * np.log(shares, where=shares > 0, out=np.zeros_like(shares))).sum(axis=-1)


def mutual_information_of_counts(joint: np.ndarray) -> np.ndarray:
    """Mutual information in nats of pair counts, with the Miller-Madow correction of each of its entropies.

        I = H(X) + H(Y) - H(X, Y),   H = H_plugin + (cells in use - 1) / 2n

    The correction removes the bias of order 1/n of independent tokens; the estimate is clipped at zero.

    Args:
        joint: [..., A, B] counts of n observations.

    Returns:
        [...] float64.

    Source: Miller, "Note on the bias of information estimates", 1955.

    >>> round(float(mutual_information_of_counts(np.diag([4000, 4000]))), 4)  # ln 2 = 0.6931
    0.6932
    """
    joint = np.asarray(joint, dtype=np.float64)
    flat = joint.reshape(*joint.shape[:-2], -1)
    n = np.maximum(flat.sum(axis=-1), 1)

    def corrected(counts: np.ndarray) -> np.ndarray:
        return entropy_of_counts(counts) + ((counts > 0).sum(axis=-1) - 1) / (2 * n)

    return np.maximum(corrected(joint.sum(axis=-1)) + corrected(joint.sum(axis=-2)) - corrected(flat), 0.0)


class ChosenMutualInformation:
    """Mutual information, over all tokens, of the first-choice experts of each pair of layers.

    A token that skips the experts (a skip class, or no expert at all) counts as a class of its own. Memory is
    O(L^2 C^2), whatever the length of the text.

    Args:
        num_layers: L.
        num_classes: experts, plus one for "none".
    """

    def __init__(self, num_layers: int, num_classes: int) -> None:
        self.num_layers, self.num_classes = num_layers, num_classes
        self.n = 0
        self._rows, self._columns = torch.triu_indices(num_layers, num_layers)
        self._counts = torch.zeros(len(self._rows) * num_classes**2, dtype=torch.int64)

    def update(self, first_choice: Tensor) -> None:
        """Add tokens.

        Args:
            first_choice: [L, T] int64 in [0, num_classes).
        """
        pair = torch.arange(len(self._rows))[:, None] * self.num_classes
        index = (pair + first_choice[self._rows]) * self.num_classes + first_choice[
            self._columns
        ]  # [pairs, T]
        add_counts(self._counts, index)
        self.n += first_choice.shape[1]

    def result(self) -> np.ndarray:
        """[L, L] float64, nats, symmetric; the diagonal is the entropy of the choice."""
        counts = self._counts.view(-1, self.num_classes, self.num_classes).numpy()
        values = np.array([mutual_information_of_counts(table) for table in counts])
        matrix = np.zeros((self.num_layers, self.num_layers))
        rows, columns = (
            self._rows.numpy(),
            self._columns.numpy(),
        )  # a tensor of one element is taken for a number
        matrix[rows, columns] = values
        matrix[columns, rows] = values
        return matrix
