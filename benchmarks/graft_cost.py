"""Time, memory and disk that a graft adds at p = 128, beside what its FLOPs and bytes predict.

    python benchmarks/graft_cost.py [--out benchmarks/results] [--threads N] [--hidden-size D] [--layers L]

A random Qwen3-MoE of one size up to what memory allows; rounds alternate between the plain and the grafted model,
forward alone and forward with backward. Time is given on the wall and on the processor: on a shared machine the
former also says what else was running, and with several threads the latter counts those that wait. Memory is what
tensors take, counted by torch's own hooks on saved tensors, not the process's: on a CPU the allocator's figures say
more about what ran before. Disk is what the files of the base and of its adapter take, and the seconds to write the
adapter, to check the base and to load both; they are in a temporary folder, which needs room for the base.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from results import write_result
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import rmoe
from rmoe.graft import GraftSpec, graft, graft_folder
from rmoe.graft.folder import is_graft_tensor
from rmoe.model.weights import open_weights, sample_digest
from rmoe.routing.recurrence import Recurrence

BATCH, LENGTH, ROUNDS, WIDTH = 2, 512, 11, 128


def main() -> None:
    """Measure, print, and with --out keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for a dated result")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    d, layers = arguments.hidden_size, arguments.layers
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=d,
        intermediate_size=2 * d,
        moe_intermediate_size=d // 2,
        num_hidden_layers=layers,
        num_attention_heads=d // 64,
        num_key_value_heads=max(1, d // 256),
        head_dim=64,
        num_experts=arguments.experts,
        num_experts_per_tok=8,
    )
    torch.manual_seed(0)
    plain = Qwen3MoeForCausalLM(config)
    files = on_disk(plain)
    # The same weights in the same memory: where a copy comes to lie can cost more than a graft.
    same = {id(parameter): parameter for parameter in plain.parameters()}
    grafted = graft(copy.deepcopy(plain, same), GraftSpec(recurrence=Recurrence.Config(width=WIDTH)))
    models = {"plain": plain, "grafted": grafted}
    tokens = BATCH * LENGTH
    seconds: dict[str, list[float]] = {f"{m} {p}": [] for m in models for p in ("forward", "training")}
    wall: dict[str, list[float]] = {name: [] for name in seconds}
    generator = torch.Generator().manual_seed(0)
    for number in range(ROUNDS + 1):
        ids = torch.randint(0, 1024, (BATCH, LENGTH), generator=generator)
        for name, model in models.items() if number % 2 else reversed(models.items()):
            for part, run in (("forward", forward), ("training", training)):
                started, start = time.perf_counter(), time.process_time()
                run(model, ids)
                if number:  # the first round warms up
                    seconds[f"{name} {part}"].append(time.process_time() - start)
                    wall[f"{name} {part}"].append(time.perf_counter() - started)
    added = sum(p.numel() for n, p in grafted.named_parameters() if is_graft_tensor(n))
    ids = torch.randint(0, 1024, (BATCH, LENGTH), generator=generator)
    saved = {name: saved_bytes(model, ids) for name, model in models.items()}

    def share(part: str, measured: dict[str, list[float]]) -> float:
        pairs = zip(measured[f"grafted {part}"], measured[f"plain {part}"], strict=True)
        return median(after / before for after, before in pairs) - 1

    write_result(
        "graft_cost",
        {
            "family": "qwen3_moe",
            "hidden_size": d,
            "layers": layers,
            "experts": arguments.experts,
            "width": WIDTH,
            "threads": arguments.threads,
            "tokens_per_pass": tokens,
            "plain_parameters": sum(p.numel() for p in plain.parameters()),
            "added_parameters": added,
            "plain_forward_processor_ms": 1e3 * median(seconds["plain forward"]),
            "plain_training_processor_ms": 1e3 * median(seconds["plain training"]),
            "added_forward_processor_share": share("forward", seconds),
            "added_training_processor_share": share("training", seconds),
            "plain_forward_ms": 1e3 * median(wall["plain forward"]),
            "plain_training_ms": 1e3 * median(wall["plain training"]),
            "added_forward_share": share("forward", wall),
            "added_training_share": share("training", wall),
            "predicted_share_of_flops": graft_flops(d) * layers / model_flops(config),
            "added_saved_bytes_per_token_and_layer": (saved["grafted"] - saved["plain"]) / tokens / layers,
            "predicted_saved_bytes_per_token_and_layer": predicted_saved_bytes(d, layers),
            "rounds": ROUNDS,
            **files,
        },
        arguments.out,
        "cpu",
    )


def on_disk(plain: PreTrainedModel) -> dict[str, float]:
    """Bytes of a base and of its adapter, and seconds: to write the adapter, to check the base, to load both."""
    with TemporaryDirectory() as place:
        base, adapter = Path(place, "base"), Path(place, "adapter")
        plain.save_pretrained(base)
        started = time.perf_counter()
        graft_folder(base, adapter, GraftSpec(recurrence=Recurrence.Config(width=WIDTH)))
        written = time.perf_counter()
        sample_digest(open_weights(base))
        checked = time.perf_counter()
        rmoe.load(adapter)
        return {
            "base_bytes": sum(path.stat().st_size for path in base.iterdir()),
            "adapter_bytes": sum(path.stat().st_size for path in adapter.iterdir()),
            "write_adapter_s": written - started,
            "sample_digest_s": checked - written,
            "load_adapter_s": time.perf_counter() - checked,
        }


def forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """One pass without gradients."""
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def training(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """One forward and backward pass, into gradients that are there: new ones' pages would cost more than a graft."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=False)


def saved_bytes(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # or a freed storage's address would be counted for two

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(kept.values())


def graft_flops(d: int) -> int:
    """Of one token and layer: projector and `B`, `2 d p` each; a GRU's six `p x p` products."""
    return 2 * (2 * d * WIDTH) + 2 * 6 * WIDTH * WIDTH


def model_flops(config: Qwen3MoeConfig) -> int:
    """Of one token: two for each weight it meets, and attention over half the sequence on average."""
    d, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    attention = 2 * d * (2 * heads + 2 * kv) + 2 * LENGTH * heads  # LENGTH / 2 keys, scores and values
    experts = config.num_experts_per_tok * 3 * 2 * d * config.moe_intermediate_size
    router = 2 * d * config.num_experts
    return config.num_hidden_layers * (attention + experts + router) + 2 * d * config.vocab_size


def predicted_saved_bytes(d: int, layers: int) -> float:
    """Of one token and layer, float32: what the graft's backward pass has to read.

    `x + B h` for the gate (d); the projection and the new state (p each); the gates s and z and the candidate's
    hidden term (3 p, in one); the candidate n (p); and `h_0` once (p).
    """
    return 4 * (d + 2 * WIDTH + 3 * WIDTH + WIDTH + WIDTH / layers)


if __name__ == "__main__":
    main()
