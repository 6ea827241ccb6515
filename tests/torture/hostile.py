"""Malformed inputs by the thousand: valid ones with something broken, and the commands that read them.

`cases(random, folder)` writes one and says which command line to run on it. Everything is a function of the random
generator, so a failure's seed is all that is needed to see it again.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NASTY = [
    None, True, -1, 0, 10**12, 2**63, 10**400, -0.0, 1e308, "", " ", "../../etc/passwd", "/etc/passwd", "\x00",
    "\ud800", "\x1b[2J", "a" * 5000, "<script>alert(1)</script>", "{{ 7*7 }}", "%s%n", [], {}, [[]], {"": None},
    [None] * 50, {"__class__": "x"}, "nan", float("nan"), float("inf"),
]  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Valid inputs to break: a finished run and a text."""

    run: Path
    text: Path


@dataclass(frozen=True)
class Case:
    """What to run, in words and as a command line; nothing outside `folder` may change."""

    kind: str
    arguments: list[str]


def break_json(chance: random.Random, value: object) -> object:
    """The value with one place in it replaced, removed, added to or wrapped."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        roll = chance.random()
        if roll < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if roll < 0.2:
            return {**value, chance.choice(["x", "", "\x1b[1m", "__init__"]): chance.choice(NASTY)}
        return {**value, key: break_json(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], break_json(chance, value[place]), *value[place + 1 :]]
    return chance.choice(NASTY)


def break_bytes(chance: random.Random, data: bytes) -> bytes:
    """The bytes cut, with some changed, with rubbish before or after them, or rubbish altogether."""
    roll = chance.random()
    if roll < 0.25:
        return data[: chance.randrange(len(data) + 1)]
    if roll < 0.6:
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 6)):
            changed[chance.randrange(min(len(changed), 400))] = chance.randrange(256)
        return bytes(changed)
    rubbish = chance.randbytes(chance.randrange(200))
    return chance.choice(
        [rubbish, rubbish + data, data + rubbish, b"[" * 5000, b'{"a":' * 5000, b"\xef\xbb\xbf" + data]
    )


def break_file(chance: random.Random, path: Path) -> None:
    """Break a file, as JSON where it is JSON or else as bytes."""
    data = path.read_bytes()
    if chance.random() < 0.6:
        try:
            broken = break_json(chance, json.loads(data))
            path.write_text(json.dumps(broken), encoding="utf-8", errors="surrogatepass")
            return
        except (ValueError, UnicodeError):
            pass
    path.write_bytes(break_bytes(chance, data))


def model_config(chance: random.Random, inputs: Inputs, folder: Path) -> Case:
    model = Path(shutil.copytree(inputs.run / "model", folder / "model"))
    break_file(chance, model / "config.json")
    return Case("model config", ["generate", str(model), "--prompt", "x", "--max-new-tokens", "1"])


def weights(chance: random.Random, inputs: Inputs, folder: Path) -> Case:
    model = Path(shutil.copytree(inputs.run / "model", folder / "model"))
    path = model / "model.safetensors"
    path.write_bytes(break_bytes(chance, path.read_bytes()))
    return Case("weights", ["generate", str(model), "--prompt", "x", "--max-new-tokens", "1"])


def weight_index(chance: random.Random, inputs: Inputs, folder: Path) -> Case:
    """An index that names files elsewhere, pickles, nothing."""
    model = Path(shutil.copytree(inputs.run / "model", folder / "model"))
    (model / "model.safetensors").rename(folder / "outside.safetensors")
    target = chance.choice(
        [
            "../outside.safetensors",
            str(folder / "outside.safetensors"),
            "a/../../outside.safetensors",
            "x.bin",
            "",
            7,
            None,
            "\x00",
        ]
    )
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": target}}
    index = break_json(chance, index) if chance.random() < 0.3 else index  # type: ignore[assignment]
    (model / "model.safetensors.index.json").write_text(json.dumps(index), errors="surrogatepass")
    return Case("weight index", ["generate", str(model), "--prompt", "x", "--max-new-tokens", "1"])


def tokenizer(chance: random.Random, inputs: Inputs, folder: Path) -> Case:
    model = Path(shutil.copytree(inputs.run / "model", folder / "model"))
    break_file(chance, model / chance.choice(["tokenizer.json", "tokenizer_config.json"]))
    return Case("tokenizer", ["generate", str(model), "--prompt", "x", "--max-new-tokens", "1"])


def preset(chance: random.Random, inputs: Inputs, folder: Path) -> Case:
    """A TOML with a wrong name, type or value, or no TOML at all."""
    from rmoe.training.config import PRESETS

    lines = (PRESETS / "quick.toml").read_text().splitlines()
    place = chance.randrange(len(lines))
    lines[place] = chance.choice(
        ["[model", "x = ", "[model]\n[model]", "hidden_size = 'a'", "seed = -1", "router = 5", "a" * 3000, "= 1",
         "[training]\nmax_steps = 1e400", "num_experts = 0", "[data]\npath = '../../../x'",
         "hidden_size = 99999999999999"]
    )  # fmt: skip
    path = folder / "preset.toml"
    path.write_bytes(
        "\n".join(lines).encode() if chance.random() < 0.7 else break_bytes(chance, "\n".join(lines).encode())
    )
    out = ["--out", str(folder / "out"), "--training.max-steps", "0"]  # never trains, whatever the file says
    return Case("preset", ["train", "--preset", str(path), *out])


def run_config(chance: random.Random, inputs: Inputs, folder: Path) -> Case:
    run = _run(inputs, folder)
    break_file(chance, run / "config.json")
    return Case("config of a run", ["train", "--out", str(run), "--resume"])


def result(chance: random.Random, inputs: Inputs, folder: Path) -> Case:
    run = _run(inputs, folder)
    break_file(chance, run / "result.json")
    return Case("result of a run", ["train", "--out", str(run), "--resume", "--data", str(inputs.text)])


def metrics(chance: random.Random, inputs: Inputs, folder: Path) -> Case:
    run = _run(inputs, folder)
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    place = chance.randrange(len(lines))
    broken = json.dumps(break_json(chance, json.loads(lines[place])))
    lines[place] = chance.choice([broken.encode("utf-8", "surrogatepass"), break_bytes(chance, lines[place])])
    path.write_bytes(b"\n".join(lines))
    return Case("metrics", ["runs", str(folder)])


def manifest(chance: random.Random, inputs: Inputs, folder: Path) -> Case:
    """A checkpoint's manifest or one of its JSON files; the run is finished, so nothing trains."""
    run = _run(inputs, folder)
    checkpoint = chance.choice(sorted((run / "checkpoints").iterdir()))
    break_file(chance, checkpoint / chance.choice(["manifest.json", "training_state.json", "config.json"]))
    return Case("checkpoint", ["_checkpoints", str(run)])


def json_lines(chance: random.Random, inputs: Inputs, folder: Path) -> Case:
    good = [json.dumps({"text": f"line {number} of a text"}) for number in range(40)]
    place = chance.randrange(len(good))
    good[place] = json.dumps(break_json(chance, {"text": "x"}))
    data = "\n".join(good).encode("utf-8", "surrogatepass")
    path = folder / "data.jsonl"
    path.write_bytes(data if chance.random() < 0.6 else break_bytes(chance, data))
    model = str(inputs.run / "model")
    return Case("jsonl", ["eval", model, "--data", str(path), "--json"])


def text_file(chance: random.Random, inputs: Inputs, folder: Path) -> Case:
    name = chance.choice(["data.txt", "data.gz", "data.zip", "enwik8.zip", "wikitext-103-v1.zip"])
    path = folder / name
    path.write_bytes(break_bytes(chance, inputs.text.read_bytes()[:300]))
    return Case("text", ["eval", str(inputs.run / "model"), "--data", str(path), "--json"])


def _run(inputs: Inputs, folder: Path) -> Path:
    return Path(shutil.copytree(inputs.run, folder / "run"))


KINDS: list[Callable[[random.Random, Inputs, Path], Case]] = [
    model_config, weights, weight_index, tokenizer, preset, run_config, result, metrics, manifest, json_lines,
    text_file,
]  # fmt: skip
