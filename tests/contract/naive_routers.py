"""Every router of the zoo written down plainly, token by token, from its definition; outside training.

Reads a router's spec and its tensors by name; shares no code with the package.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests import naive
from tests.contract import naive_cross_layer

Tensors = dict[str, Tensor]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-5) * weight


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum())


class NaiveLayer:
    """One layer's router. `own` are its tensors, `shared` the model's, both by dotted name."""

    def __init__(
        self, spec: dict, own: Tensors, shared: Tensors, layer: int, experts: int, top_k: int
    ) -> None:
        self.spec, self.own, self.shared = spec, own, shared
        self.layer, self.experts, self.top_k = layer, experts, top_k

    # ---- stage 1
    def features(
        self, x: Tensor, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        r = self.spec["recurrence"]
        if r["kind"] in ("none", "previous"):
            return x, None
        table, at = (self.shared, "") if r["projector"] == "shared" else (self.own, "")
        projected = table[at + "recurrence.projector.weight"] @ x
        if r["projector_bias"]:
            projected = projected + table[at + "recurrence.projector.bias"]
        cut = r["truncate_every"] and self.layer % r["truncate_every"] == 0
        if r["carry"] == "zero" or self.layer == 0:
            state = None
        elif state is not None and (r["carry"] == "detached" or cut):
            state = tuple(s.detach() for s in state)
        if r["cell"] == "identity":
            new: tuple[Tensor, ...] = (projected,)
        elif r["cell"] == "decay":
            new = (projected if state is None else projected + self.own["recurrence.cell.scale"] * state[0],)
        elif r["cell"] == "gated_decay":
            new = (projected if state is None else self._gated_decay(projected, state[0]),)
        else:
            cell = {
                n: self.shared[f"recurrence.cell.{n}"]
                for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            zero = torch.zeros_like(projected)
            start = (zero, zero) if r["cell"] == "lstm" else (zero,)
            new = naive.cell_step(r["cell"], cell, projected, start if state is None else state)
        out = rms(new[0], self.own["recurrence.norm.weight"]) if r["normalize"] else new[0]
        return torch.cat((x, out)) if r["concat_hidden"] else out, new

    def _gated_decay(self, x: Tensor, h: Tensor) -> Tensor:
        one = torch.ones_like(x)
        seen = torch.cat((rms(x, one), rms(h, one)))
        kept = []
        for row, bias, old in zip(
            self.own["recurrence.cell.weight"], self.own["recurrence.cell.bias"], h, strict=True
        ):
            kept.append(old / (1 + torch.exp(-(row @ seen + bias))))
        return x + torch.stack(kept)

    # ---- stage 2
    def score(self, f: Tensor) -> Tensor:
        s, own = self.spec["scorer"], self.own
        if s["kind"] == "linear":
            if s["shared_layers"] == 1:
                logits = own["scorer.linear.weight"] @ f
                return logits + own["scorer.linear.bias"] if s["bias"] else logits
            group = 0 if s["shared_layers"] == 0 else self.layer // s["shared_layers"]
            return self.shared[f"scorer.groups.{group}.weight"] @ f
        if s["kind"] == "mlp":
            return own["scorer.out.weight"] @ gelu(own["scorer.up.weight"] @ f + own["scorer.up.bias"])
        if s["kind"] == "cosine":
            if s["width"]:
                f = own["scorer.projection.weight"] @ f
                f = f + own["scorer.projection.bias"] if s["projection_bias"] else f
            f = unit(f) if s["normalize_tokens"] else f
            scale = torch.exp(own["scorer.log_inverse_temperature"][0].clamp(max=math.log(100)))
            return torch.stack([scale * (f @ unit(e)) for e in own["scorer.embeddings"]])
        if s["kind"] == "half_cosine":
            return torch.stack([f @ unit(c) for c in own["scorer.centroids"]])
        if s["kind"] == "hypernetwork":
            inner = torch.relu(own["scorer.up.weight"] @ own["scorer.embedding"][0] + own["scorer.up.bias"])
            rows = (own["scorer.out.weight"] @ inner + own["scorer.out.bias"]).view(self.experts, -1)
            return torch.stack([row[:-1] @ f + row[-1] for row in rows])
        if s["kind"] == "normed_linear":
            f = f / torch.sqrt((f * f).mean() + s["norm_eps"]) * own["scorer.scale"] / math.sqrt(len(f))
            return own["scorer.linear.weight"] @ f
        if s["kind"] == "product_keys":
            keys = own["scorer.keys.weight"]
            a = max(n for n in range(1, self.experts + 1) if n * n <= self.experts and self.experts % n == 0)
            b = self.experts // a
            return torch.stack([keys[n // b] @ f + keys[a + n % b] @ f for n in range(self.experts)])
        assert s["kind"] == "eda_head"
        f = rms(f, own["scorer.norm.weight"])
        f = gelu(own["scorer.fc1.weight"] @ f + own["scorer.fc1.bias"])
        f = gelu(own["scorer.fc2.weight"] @ f + own["scorer.fc2.bias"])
        return own["scorer.out.weight"] @ f

    # ---- stage 3: dense weights [E], probabilities, and the chosen experts
    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        gate = self.spec["gate"]
        bias = self.own.get("selection_bias.bias", torch.zeros(len(logits), dtype=logits.dtype))
        if gate["kind"] == "top_k":
            return self.top_k_gate(logits, bias, gate)
        if gate["kind"] == "sigmoid":
            return self._sigmoid(logits, bias, gate)
        if gate["kind"] == "relu":
            weights = torch.relu(logits)
            return (
                weights,
                weights / weights.sum().clamp(min=1e-300),
                [n for n in range(self.experts) if weights[n] > 0],
            )
        if gate["kind"] == "expert_threshold":
            scores = 1 / (1 + torch.exp(-logits))
            chosen = [n for n in range(self.experts) if logits[n] >= self.own["gate.threshold"][n]]
            return self._dense([(n, scores[n]) for n in chosen], logits), scores / scores.sum(), chosen
        if gate["kind"] == "top_any":
            return self._top_any(logits)
        if gate["kind"] == "normed_relu":
            active = torch.relu(logits)
            rms = torch.sqrt((active**2).sum() / self.experts + gate["eps"])
            chosen = [n for n in range(self.experts) if logits[n] > 0]
            probs = active / sum(active[n] for n in chosen) if chosen else active
            return active / rms * self.own["gate.norm.weight"], probs, chosen
        if gate["kind"] == "top_p":
            probs, chosen = naive.softmax(logits), []
            for n in sorted(range(self.experts), key=lambda n: -float(probs[n])):
                if sum(float(probs[m]) for m in chosen) < gate["threshold"]:
                    chosen.append(n)
            return self._dense([(n, probs[n]) for n in chosen], logits), probs, chosen
        if gate["kind"] == "sparsemixer":
            return self._sparsemixer(logits, gate["jitter"])
        probs = naive.softmax(logits)
        k = self.top_k if gate.get("start_k") is None else int(self.own["gate.current_k"])
        choice = logits if gate.get("choose_by") == "logits" else probs
        ranked = sorted(range(len(logits)), key=lambda n: -float(choice[n] + bias[n]))[:k]
        raw = naive.softmax(logits[ranked]) if gate.get("order") == "topk_softmax" else probs[ranked]
        kept = [(n, w) for n, w in zip(ranked, raw, strict=True) if n < self.experts]
        if gate.get("renormalize", True) and kept:
            total = sum(w for _, w in kept)
            kept = [(n, w / total) for n, w in kept]
        return self._dense(kept, logits), probs, [n for n, _ in kept]

    def top_k_gate(
        self, logits: Tensor, bias: Tensor, gate: dict, chosen: list[int] | None = None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Weights of all classes that the gate chooses from; those behind the experts compute nothing."""
        s = [gate["multiplier"] * x for x in logits]
        if gate["softcap"] is not None:
            s = [gate["softcap"] * torch.tanh(x / gate["softcap"]) for x in s]
        scores = {
            "softmax": lambda: list(naive.softmax(torch.stack(s))),
            "sigmoid": lambda: [1 / (1 + torch.exp(-x)) for x in s],
            "sqrt_softplus": lambda: [torch.sqrt(torch.log(1 + torch.exp(x))) for x in s],
        }[gate["scores"]]()
        if chosen is None:
            rank = [
                float(x.detach() + b)
                for x, b in zip(s if gate["choose_by"] == "logits" else scores, bias, strict=True)
            ]
            chosen = self._ranked(rank, gate)
        if gate["weights"] == "softmax_of_chosen":
            weights = list(naive.softmax(torch.stack([s[n] for n in chosen])))
        else:
            weights = [scores[n] for n in chosen]
        if gate["renormalize"]:
            total = sum(w ** gate["norm"] for w in weights) ** (1 / gate["norm"])
            total = total.clamp(min=gate["eps"]) if gate["eps_is_floor"] else total + gate["eps"]
            weights = [w / total for w in weights]
        scale = 1 / self.top_k if gate["scale"] == "inverse_k" else gate["scale"]
        own = self.own.get("gate.expert_scale", torch.ones(len(logits), dtype=logits.dtype))
        dense = [logits.new_zeros(())] * len(logits)
        for n, w in zip(chosen, weights, strict=True):
            dense[n] = w * scale * own[n]
        return torch.stack(dense), torch.stack(scores) / sum(scores), chosen

    def _ranked(self, rank: list[float], gate: dict) -> list[int]:
        k = gate["layer_k"][self.layer % len(gate["layer_k"])] if gate["layer_k"] else self.top_k
        size = len(rank) // gate["groups"]
        groups = [
            sorted(range(g * size, (g + 1) * size), key=lambda n: -rank[n]) for g in range(gate["groups"])
        ]
        if gate["group_quota"]:
            return [n for members in groups for n in members[: k // gate["groups"]]]
        if gate["groups"] > 1:
            best = 1 if gate["group_score"] == "max" else 2
            groups.sort(key=lambda members: -sum(rank[n] for n in members[:best]))
        within = {n for members in groups[: gate["top_groups"]] for n in members}
        if gate["outside"] == "zero":
            rank = [x if n in within else 0.0 for n, x in enumerate(rank)]
            within = set(range(len(rank)))
        return sorted(within, key=lambda n: -rank[n])[:k]

    # ---- experts that compute nothing, and shared ones: what the routing says besides the experts' weights
    def zero_experts(self, x: Tensor, weights: Tensor) -> list[Tensor]:
        r = self.spec["router"]
        identity, zero, constants = (
            r[name] for name in ("identity_experts", "zero_experts", "constant_experts")
        )
        behind = weights[self.experts :]
        passthrough = x.new_zeros(()) + sum(behind[:identity])
        added = torch.zeros_like(x)
        for n in range(constants):
            a = naive.softmax(self.own["zero_experts.mixes"][n] @ x)
            g = behind[identity + zero + n]
            passthrough = passthrough + g * a[0]
            added = added + g * a[1] * self.own["zero_experts.constant_values"][n]
        return [passthrough, *(added if constants else ())]

    def with_shared(self, routed: Tensor, shared: Tensor, chosen: list[int]) -> tuple[Tensor, list[Tensor]]:
        among = torch.cat((routed[chosen], shared))
        g = naive.softmax(torch.log(1 / (1 + torch.exp(-among)))) * self.spec["router"]["scale"]
        g = g * self.own["global_scale"]
        return self._dense(list(zip(chosen, g, strict=False)), routed), list(g[len(chosen) :])

    def _dense(self, kept: list[tuple[int, Any]], like: Tensor) -> Tensor:
        dense = [like.new_zeros(())] * self.experts
        for n, w in kept:
            dense[n] = dense[n] + w
        return torch.stack(dense)

    def _sigmoid(self, logits: Tensor, bias: Tensor, gate: dict) -> tuple[Tensor, Tensor, list[int]]:
        scores = 1 / (1 + torch.exp(-logits))
        choice = [float(s + b) for s, b in zip(scores, bias, strict=True)]
        size = self.experts // gate["groups"]
        groups = [list(range(g * size, (g + 1) * size)) for g in range(gate["groups"])]
        if gate["groups"] > 1:
            groups.sort(key=lambda members: -sum(sorted(choice[n] for n in members)[-2:]))
        allowed = [n for members in groups[: gate["top_groups"]] for n in members]
        chosen = sorted(allowed, key=lambda n: -choice[n])[: self.top_k]
        total = sum(scores[n] for n in chosen)
        kept = [(n, scores[n] / total * gate["scale"]) for n in chosen]
        return self._dense(kept, logits), scores / scores.sum(), chosen

    def _top_any(self, logits: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """The weight 1/k of a chosen expert has the gradient of `(sig(s) - sig(b)) / k`."""
        scores = 1 / (1 + torch.exp(-logits))
        margins = scores - 1 / (1 + torch.exp(-self.own["gate.threshold"]))
        chosen = [n for n in range(self.experts) if margins[n] > 0]
        k = len(chosen)
        kept = [(n, (1 + margins[n] - margins[n].detach()) / k) for n in chosen]
        if not chosen:
            chosen = [max(range(self.experts), key=lambda n: float(scores[n]))]
            kept = [(chosen[0], logits.new_ones(()))]
        return self._dense(kept, logits), scores / scores.sum(), chosen

    def _sparsemixer(self, logits: Tensor, jitter: float) -> tuple[Tensor, Tensor, list[int]]:
        kept, left = [], list(range(self.experts))
        for _ in range(2):
            best = max(left, key=lambda n: float(logits[n]))
            top = float(logits[best])
            near = [
                n for n in left if (top - float(logits[n])) / max(abs(float(logits[n])), top) <= 2 * jitter
            ]
            kept.append((best, naive.softmax(logits[near])[near.index(best)]))
            left.remove(best)
        return self._dense(kept, logits), naive.softmax(logits), [n for n, _ in kept]


def run(layers: list[NaiveLayer], inputs: list[Tensor], ids: list[int], batch: int) -> dict[str, Any]:
    """All layers for all tokens: per layer logits `[T, C]`, dense weights `[T, E]`, probs, chosen; and the loss."""
    spec = layers[0].spec
    result: dict[str, Any] = {"logits": [], "weights": [], "probs": [], "chosen": [], "besides": []}
    tokens = len(ids)
    states: list[Any] = [None] * tokens
    below: list[Any] = [None] * tokens
    memory: dict[str, Any] = {}
    loss = inputs[0].new_zeros(())
    for layer, hidden in zip(layers, inputs, strict=True):
        x = naive_cross_layer.read(layer, hidden, memory, batch)
        rows: dict[str, list] = {"logits": [], "weights": [], "probs": [], "chosen": [], "classes": []}
        besides: list[Tensor] = []
        for t in range(tokens):
            logits, weights, probs, chosen = _token(layer, x[t], ids[t], states, below, t, besides)
            for name, value in (
                ("logits", logits),
                ("weights", weights),
                ("probs", probs),
                ("chosen", [n for n in chosen if n < layer.experts]),
                ("classes", chosen),
            ):
                rows[name].append(value)
        memory["best"] = [int(probs[: layer.experts].argmax()) for probs in rows["probs"]]
        if spec["gate"] and spec["gate"]["kind"] == "expert_choice":
            _expert_choice(layer, rows, tokens)
        loss = loss + _losses(
            layer, rows, batch
        )  # the losses see what was chosen, before anything is dropped
        if spec["balance"]["capacity_factor"] is not None:
            _drop(layer, rows, spec["balance"]["capacity_factor"])
        for name in ("logits", "weights", "probs"):
            result[name].append(torch.stack(rows[name]))
        result["chosen"].append(rows["chosen"])
        result["besides"].append(torch.stack(besides) if besides else None)
    result["loss"] = loss / len(layers)
    return result


def _token(
    layer: NaiveLayer, x: Tensor, token: int, states: list, below: list, t: int, besides: list[Tensor]
) -> tuple:
    kind, own = layer.spec["router"]["kind"], layer.own
    if kind == "hash":
        chosen = [int(n) for n in own["table"][token]]
        logits = x.new_full((layer.experts,), -1e4)
        logits[chosen] = 0.0
        kept = [(n, x.new_tensor(1 / len(chosen))) for n in chosen]
        return logits, layer._dense(kept, x), naive.softmax(logits), chosen
    if kind in ("dense", "round_robin"):
        k, experts = layer.top_k, layer.experts
        start = t * k + layer.layer if kind == "round_robin" else 0
        chosen = [(start + j) % experts for j in range(k)]
        logits = x.new_tensor([0.0 if n in chosen else -1e4 for n in range(experts)])
        kept = [(n, x.new_tensor(1.0 if kind == "dense" else 1 / k)) for n in chosen]
        return logits, layer._dense(kept, x), naive.softmax(logits), chosen
    if kind == "stable":
        logits = own["centroids"] @ x
        best = int(logits.argmax())
        strength = 1 / (1 + torch.exp(-logits[best]))
        besides.append((1 - strength)[None])
        return logits, layer._dense([(best, strength)], x), naive.softmax(logits), [best]
    features, states[t] = layer.features(x, states[t])
    logits = layer.score(features)
    if kind == "residual_scores":
        raw = logits
        if below[t] is not None:
            previous = below[t].detach() if layer.spec["router"]["detach"] else below[t]
            logits = logits + layer.spec["router"]["scale"] * previous
        below[t] = raw
    if kind == "gating_residual":
        if below[t] is not None:
            logits = logits + own["residual.weight"] @ below[t]
        below[t] = logits
    temperature = (
        torch.exp(own["temperature.log_value"].to(x.dtype)) if "temperature.log_value" in own else 1.0
    )
    if layer.spec["gate"]["kind"] == "expert_choice":
        probs = naive.softmax(logits / temperature)
        return logits, probs, probs, []
    if kind == "table_top_k" and layer.layer < layer.spec["router"]["table_layers"]:
        given = [int(n) for n in own["table"][token]]
        return logits, *layer.top_k_gate(logits, torch.zeros_like(logits), layer.spec["gate"], given)
    if kind == "shared_in_softmax":
        logits, shared = logits[: layer.experts], logits[layer.experts :]
        _, probs, chosen = layer.choose(logits)
        weights, gammas = layer.with_shared(logits, shared, chosen)
        besides.append(torch.stack(gammas))
        return logits, weights, probs, chosen
    weights, probs, chosen = layer.choose(logits / temperature)
    if len(weights) > layer.experts:
        if kind != "null_experts":
            besides.append(torch.stack(layer.zero_experts(x, weights)))
        weights, real = weights[: layer.experts], [n for n in chosen if n < layer.experts]
        if kind == "null_experts" and real:
            weights = weights / sum(weights[n] for n in real)
    return logits, weights, probs, chosen


def _expert_choice(layer: NaiveLayer, rows: dict[str, list], tokens: int) -> None:
    capacity = math.ceil(tokens * layer.top_k / layer.experts)
    rows["chosen"] = [[] for _ in range(tokens)]
    keep = torch.zeros(tokens, layer.experts, dtype=rows["weights"][0].dtype)
    for n in range(layer.experts):
        for t in sorted(range(tokens), key=lambda t: -float(rows["probs"][t][n]))[:capacity]:
            rows["chosen"][t].append(n)
            keep[t, n] = 1
    rows["weights"] = [w * keep[t] for t, w in enumerate(rows["weights"])]


def _drop(layer: NaiveLayer, rows: dict[str, list], factor: float) -> None:
    capacity = math.ceil(factor * len(rows["chosen"]) * layer.top_k / layer.experts)
    taken = [0] * layer.experts
    for t, chosen in enumerate(rows["chosen"]):
        keep = torch.ones(layer.experts, dtype=rows["weights"][t].dtype)
        for n in chosen:
            keep[n] = 1.0 if taken[n] < capacity else 0.0
            taken[n] += 1
        rows["weights"][t] = rows["weights"][t] * keep


def _product(probs: list[Tensor], chosen: list[list[int]], experts: int) -> Tensor:
    total = max(sum(len(c) for c in chosen), 1)
    return sum(  # type: ignore[return-value]
        experts * sum(c.count(n) for c in chosen) / total * sum(p[n] for p in probs) / len(probs)
        for n in range(experts)
    )


def _losses(layer: NaiveLayer, rows: dict[str, list], batch: int) -> Any:
    loss: Any = 0.0
    tokens, experts = len(rows["logits"]), layer.experts
    for spec in layer.spec["balance"]["losses"]:
        weight = 0.01 if spec["weight"] is None else spec["weight"]
        kind = spec["kind"]
        if kind == "load_balance":
            value = _product(rows["probs"], rows["chosen"], experts)
        elif kind == "z":
            value = sum(torch.log(torch.exp(logits).sum()) ** 2 for logits in rows["logits"]) / tokens
        elif kind == "null_balance":
            classes, slots = len(rows["probs"][0]), tokens * layer.top_k
            shares = [sum(c.count(n) for c in rows["chosen"]) / slots for n in range(experts)]
            shares += [(1 - sum(shares)) / (classes - experts)] * (classes - experts)
            mean = sum(rows["probs"]) / tokens
            value = classes * sum(f * p for f, p in zip(shares, mean, strict=True))
        elif kind == "heterogeneous_balance":
            classes = len(rows["probs"][0])
            asked = [sum(c.count(n) for c in rows["classes"]) for n in range(classes)]
            eta = [1.0] * experts + [spec["tau"]] * (classes - experts)
            mean = sum(rows["probs"]) / tokens
            value = sum(classes * w * n / sum(asked) * p for w, n, p in zip(eta, asked, mean, strict=True))
        elif kind == "diverse_simple":
            units = [unit(e) for e in layer.own["scorer.embeddings"]]
            squares = [
                (units[a] @ units[b] - float(a == b)) ** 2 for a in range(experts) for b in range(experts)
            ]
            norms = [torch.sqrt((e * e).sum()) for e in layer.own["scorer.embeddings"]]
            value = torch.sqrt(sum(squares)) + sum(norms) / experts
        elif kind == "activation_locality":
            value = _locality(rows["logits"], spec["sharpness"], tokens // batch)
        elif kind == "chunk_sparsity":
            value = _chunk_sparsity(rows["probs"], spec["chunk"], tokens // batch)
        elif kind == "gate_entropy":
            value = sum(-(p * torch.log(p)).sum() for p in rows["probs"]) / tokens
        elif kind == "sequence_balance":
            length = tokens // batch
            parts = [slice(b * length, (b + 1) * length) for b in range(batch)]
            value = sum(_product(rows["probs"][s], rows["chosen"][s], experts) for s in parts) / batch
        elif kind == "mutual_information":
            mean = sum(rows["probs"]) / tokens
            conditional = sum(-(p * torch.log(p)).sum() for p in rows["probs"]) / tokens
            value = conditional + (mean * torch.log(mean)).sum()
        else:
            assert kind == "similarity_preserving"
            matrix = layer.own["scorer.linear.weight"]
            pairs = [(a, b) for a in range(experts) for b in range(experts)]
            value = sum((matrix[a] @ matrix[b] - float(a == b)).abs() for a, b in pairs) / experts**2
        loss = loss + weight * value
    return loss + _penalty(layer, rows)


def _locality(logits: list[Tensor], sharpness: float, length: int) -> Any:
    """Cross-entropy of a token's activity given the one before it, as probabilities."""
    values = []
    for t in range(1, len(logits)):
        if t % length == 0:  # the first of a sequence has no neighbour before it
            continue
        for before, after in zip(sharpness * logits[t - 1], sharpness * logits[t], strict=True):
            q, rest = torch.sigmoid(after), torch.log(1 + torch.exp(-before.abs()))
            if before > 0:  # -ln of sig(before) and of sig(-before), without exp of a large number
                active, idle = rest, before + rest
            else:
                active, idle = rest - before, rest
            values.append(q * active + (1 - q) * idle)
    return sum(values) / len(values)


def _chunk_sparsity(probs: list[Tensor], chunk: int, length: int) -> Any:
    idle = []
    for first in range(0, len(probs), length):
        for start in range(first, first + length, chunk):
            members = probs[start : min(start + chunk, first + length)]
            idle += [math.prod(1 - p[n] for p in members) for n in range(len(probs[0]))]
    return 1 - sum(idle) / len(idle)


def _penalty(layer: NaiveLayer, rows: dict[str, list]) -> Any:
    tokens, experts = len(rows["logits"]), layer.experts
    if layer.spec["gate"] and layer.spec["gate"]["kind"] == "relu":
        weight = layer.own["gate.l1_weight"].to(rows["logits"][0].dtype)
        total: Any = 0.0
        for n in range(experts):
            share = sum(n in c for c in rows["chosen"]) / tokens * experts / layer.top_k
            total = total + share * sum(w[n] for w in rows["weights"]) / tokens
        return weight * total
    if layer.spec["router"]["kind"] == "stable":
        return layer.penalty(rows)  # type: ignore[attr-defined]
    return 0.0
