"""A model streamed layer by layer gives the record of the model in memory, bit for bit; and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import rmoe
from rmoe.analysis.analyze import Subject, analyze_models
from rmoe.analysis.command import Streaming
from rmoe.analysis.options import AnalysisOptions
from rmoe.analysis.streaming import memory
from rmoe.analysis.streaming.run import Progress, StreamedRouting, stream_routing
from rmoe.analysis.streaming.store import CannotResume, form_of, made_again, require_space
from rmoe.analysis.streaming.weights import StreamedModel, loaded_bytes
from rmoe.cli.main import main
from rmoe.errors import RequestError
from rmoe.graft import graft
from rmoe.results.analysis import ModelAnalysis, read_analysis
from rmoe.routing.contract import Routing
from tests.analysis.quantised import fp8_checkpoint, mxfp4_checkpoint
from tests.analysis.tiny_rmoe import tiny_rmoe
from tests.graft.tiny_families import tiny_model

CPU = torch.device("cpu")
BLOCKS = np.random.default_rng(0).integers(3, 60, (7, 16))
FAMILIES = (
    "rmoe",
    "graft",
    "olmoe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "qwen3_next",
    "jamba",
)


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = (
        tiny_rmoe(vocab_size=320)
        if family == "rmoe"
        else tiny_model("olmoe" if family == "graft" else family)
    )
    if family == "graft":
        graft(model, "rmoe", width=8)
        for name, parameter in model.named_parameters():
            if "router_offset" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    model.to(dtype).save_pretrained(folder)
    return folder


def plain(folder: Path) -> ModelAnalysis:
    options = AnalysisOptions(batch_size=3, gradient_tokens=0, check=False)
    (found,) = analyze_models([Subject("m", rmoe.load(folder))], BLOCKS, str, options)
    return msgspec.structs.replace(found, gradient_split=None)


def streamed(routing: StreamedRouting) -> ModelAnalysis:
    options = AnalysisOptions(batch_size=3, gradient_tokens=0, check=False)
    (found,) = analyze_models([Subject("m", routing.model, 0, routing)], BLOCKS, str, options)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_record_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if dtype != torch.bfloat16 and family not in ("rmoe", "olmoe", "deepseek_v3"):
        pytest.skip("one dtype is enough of this family")
    folder = saved(family, tmp_path / "m", dtype)
    expected = plain(folder)
    for hidden in ("memory", "disk"):
        routing = stream_routing(StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / hidden, hidden)
        assert streamed(routing) == expected
        assert all(p.is_meta for p in routing.model.model.layers.parameters())
        routing.close()
        assert not (tmp_path / hidden).exists()


@pytest.mark.parametrize("format", ["fp8-deepseek_v3", "fp8-qwen3_moe", "mxfp4-gpt_oss"])
def test_quantised_checkpoints_are_dequantised_layer_by_layer(format: str, tmp_path: Path) -> None:
    kind, _, family = format.partition("-")
    folder = fp8_checkpoint(tmp_path / "m", family) if kind == "fp8" else mxfp4_checkpoint(tmp_path / "m")
    expected = plain(folder)
    routing = stream_routing(StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "s")
    assert streamed(routing) == expected
    assert all(p.is_meta for p in routing.model.model.layers.parameters())


class Killed(Exception):
    pass


def _stop_after(layers: int) -> Iterator[None]:
    yield from [None] * (layers - 1)
    raise Killed


@pytest.mark.parametrize("family", ["rmoe", "graft", "deepseek_v3", "llama4_text"])
@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_a_killed_run_is_resumed_at_the_layer_it_was_in(family: str, hidden: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "m", torch.bfloat16)
    expected = plain(folder)
    kill = _stop_after(2)
    with pytest.raises(Killed):
        stream_routing(
            StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "s", hidden, lambda progress: next(kill)
        )
    seen: list[Progress] = []
    routing = stream_routing(StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "s", hidden, seen.append)
    assert routing.resumed == 2
    assert [p.layer.rpartition(".")[2] for p in seen] == ["2", "3"]
    assert seen[-1].read == seen[-1].total
    assert streamed(routing) == expected


def test_what_does_not_belong_to_a_run_is_not_resumed(tmp_path: Path) -> None:
    folder = saved("olmoe", tmp_path / "m")
    kill = _stop_after(2)
    with pytest.raises(Killed):
        stream_routing(
            StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "s", "auto", lambda progress: next(kill)
        )
    other = stream_routing(StreamedModel(folder, CPU), BLOCKS[::-1].copy(), 3, tmp_path / "s")
    assert other.resumed == 0
    kill = _stop_after(2)
    with pytest.raises(Killed):
        stream_routing(
            StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "t", "auto", lambda progress: next(kill)
        )
    (tmp_path / "t" / "outputs-1" / "1.safetensors").write_bytes(b"cut")
    again = stream_routing(StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "t")
    assert again.resumed is None
    assert streamed(again) == plain(folder)
    kill = _stop_after(2)
    with pytest.raises(Killed):
        stream_routing(
            StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "u", "auto", lambda progress: next(kill)
        )
    (tmp_path / "u" / "probs-0").unlink()
    without = stream_routing(StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "u")
    assert without.resumed is None
    assert streamed(without) == plain(folder)


def test_what_a_run_has_written_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "probs-0").write_bytes(bytes(500))
    require_space(tmp_path / "s", 1500)
    with pytest.raises(RequestError):
        require_space(tmp_path / "s", 1501)


def test_routing_has_its_place_on_the_disk_before_it_is_written(tmp_path: Path) -> None:
    """A memory map of a file with holes ends the process where the disk fills up."""
    folder = saved("olmoe", tmp_path / "m")
    kill = _stop_after(1)
    with pytest.raises(Killed):
        stream_routing(
            StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "s", "auto", lambda progress: next(kill)
        )
    for file in (tmp_path / "s").glob("probs-*"):
        assert file.stat().st_blocks * 512 >= file.stat().st_size


def test_checksums_tell_that_a_resumed_pass_is_another(tmp_path: Path) -> None:
    folder = saved("olmoe", tmp_path / "m")
    kill = _stop_after(2)
    with pytest.raises(Killed):
        stream_routing(
            StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "s", "auto", lambda progress: next(kill)
        )
    state = json.loads((tmp_path / "s" / "state.json").read_text())
    state["arrived"][1] += 1
    (tmp_path / "s" / "state.json").write_text(json.dumps(state))
    again = stream_routing(StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "s")
    assert again.resumed is None
    assert streamed(again) == plain(folder)


def test_one_layer_at_a_time_and_each_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("deepseek_v3", tmp_path / "m")
    loads: list[str] = []
    real = StreamedModel.load

    def load(self: StreamedModel, part: str) -> None:
        loads.append(part)
        real(self, part)
        loaded = [u for u, unit in self.units.items() if not any(p.is_meta for p in unit.parameters())]
        assert loaded == ([part] if part in self.units else [])

    monkeypatch.setattr(StreamedModel, "load", load)
    stream_routing(StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "s")
    assert loads == ["rest", "model.embed_tokens", *(f"model.layers.{i}" for i in range(4))]


def test_form_there_and_back() -> None:
    a, b = torch.randn(2, 3), torch.arange(4)
    routing = Routing(a, a, b, b)
    value = (a, [None, 3, "x"], routing, (b,))
    tensors: list[torch.Tensor] = []
    form = json.loads(json.dumps(form_of(value, tensors)))
    again = made_again(form, tensors, CPU)
    assert type(again[2]) is Routing
    assert again[1] == [None, 3, "x"]
    assert again[0] is a
    assert again[3][0] is b
    zeros = made_again(form, None, CPU)
    assert zeros[0].shape == a.shape
    assert zeros[3][0].dtype == b.dtype
    assert not zeros[0].any()
    with pytest.raises(CannotResume):
        made_again(form_of((object(),), []), None, CPU)


def _analyze(folder: Path, out: Path, *options: str) -> int:
    tokens = ["--tokens", "200", "--sequence-length", "16", "--batch-size", "3", "--gradient-tokens", "0"]
    return main(["analyze", str(folder), "--out", str(out), *tokens, *options])


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("rmoe", tmp_path / "m")
    assert _analyze(folder, tmp_path / "plain") == 0
    assert "layer by layer" not in capsys.readouterr().out
    assert _analyze(folder, tmp_path / "asked", "--stream") == 0
    said = capsys.readouterr()
    assert "model.layers.3:" in said.err
    assert "MB/s, 0:00 left" in said.err
    assert (
        "m was read layer by layer: gradients, the check of the reading skipped, which need all layers at once"
        in said.out
    )
    monkeypatch.setattr("rmoe.analysis.command.free_memory", lambda device: 1000)
    assert _analyze(folder, tmp_path / "too-large") == 0
    assert "layer by layer" in capsys.readouterr().out
    (model,) = read_analysis(tmp_path / "plain" / "analysis.json").models
    expected = [msgspec.structs.replace(model, check=None)]
    for name in ("asked", "too-large"):
        assert read_analysis(tmp_path / name / "analysis.json").models == expected
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["analysis.json", "report"]


def _shards(folder: Path) -> Path:
    tiny_model("olmoe").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def _missing(folder: Path) -> str:
    sorted(folder.glob("*.safetensors"))[1].unlink()
    return "a file in the folder of the model.safetensors.index.json that names it"


def _cut(folder: Path) -> str:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    return "safetensors"


def _outside(folder: Path) -> str:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../other.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "a file in the folder of the model.safetensors.index.json"


def _other_method(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return "quantization_config.quant_method is 'gptq'; allowed: none, or fp8 or mxfp4"


def _unknown_method(folder: Path) -> str:
    """transformers itself would take the weights for plain ones, with a warning."""
    _other_method(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("gptq", "nonesuch"))
    return "quantization_config.quant_method is 'nonesuch'; allowed: "


@pytest.mark.parametrize(
    ("damage", "options"),
    [
        (damage, options)
        for damage in (_missing, _cut, _outside, _other_method, _unknown_method)
        for options in ([], ["--stream"])
        if options or damage is not _other_method  # what gptq lacks here is for transformers to say
    ],
)
def test_damaged_checkpoints(
    damage: object, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _shards(tmp_path / "m")
    expected = damage(folder)  # type: ignore[operator]
    capsys.readouterr()
    assert _analyze(folder, tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("olmoe", tmp_path / "m")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(RequestError, match=r"a disk with 0\.0 GB for hidden states and routing"):
        stream_routing(StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "new" / "s")
    assert not (tmp_path / "new").exists()
    require_space(tmp_path, 999)


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_obeys_a_container(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's own limit, its owner's, and none at all; page cache is not in the way."""
    root = tmp_path / "memory" if version == 1 else tmp_path
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if version == 1
        else ("memory.max", "memory.current")
    )
    job = root / "slurm" / "job"
    job.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("9:name=systemd:/x\n" + ("4:memory:/slurm/job\n" if version == 1 else "0::/slurm/job\n"))
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", own)

    def limited(folder: Path, limit: str, used: int) -> int:
        for name, value in zip(names, (limit, str(used)), strict=True):
            (folder / name).write_text(f"{value}\n")
        cached = "total_inactive_file" if version == 1 else "inactive_file"
        (folder / "memory.stat").write_text(f"anon 5\n{cached} 1000\n")
        return memory.free_memory(CPU)

    assert limited(job, "max", 0) > 1 << 20
    assert limited(job, "9000", 4000) == 6000
    assert limited(job.parent, "9000", 5000) == 5000


def test_two_models_share_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("rmoe", tmp_path / "m")
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr("rmoe.analysis.command.free_memory", lambda device: int(1.6 * size))
    auto, wide = (folder, "auto"), (folder, "float64")
    assert Streaming(tmp_path).applies([auto], CPU) == [False]
    assert Streaming(tmp_path).applies([auto, auto], CPU) == [False, True]
    assert Streaming(tmp_path).applies([wide], CPU) == [True]
    assert Streaming(tmp_path, asked=True).applies([auto, auto], CPU) == [True, True]


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("format", ["fp8", "mxfp4", "none"])
def test_memory_is_counted_as_the_model_is_loaded(format: str, dtype: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    if format == "none":
        saved("rmoe", folder)
    else:
        fp8_checkpoint(folder) if format == "fp8" else mxfp4_checkpoint(folder)
    files = (folder / "model.safetensors").stat().st_size
    model = rmoe.load(folder, dtype=dtype)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert loaded_bytes(folder, dtype, files) == held
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")  # of another program
    assert loaded_bytes(folder, dtype, files) == held
    assert (held > 1.2 * files) == (format != "none")
    assert loaded_bytes(folder, dtype, files - 1) == files
    assert files < held <= 8 * files or format == "none"


def test_free_memory_obeys_the_process_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.free_memory(CPU)
    assert 0 < whole < 1 << 50
    used = memory._field("/proc/self/status", "VmData", 0)
    limits = {
        memory.resource.RLIMIT_DATA: used + (64 << 20),
        memory.resource.RLIMIT_AS: memory.resource.RLIM_INFINITY,
    }
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    assert memory.free_memory(CPU) <= 64 << 20


_MEMORY = """
import resource
import torch
from rmoe.analysis.streaming.memory import weights_apart

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) >> 10

def faults(times=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.zeros(4 << 20)  # 16 MiB: 4,096 pages
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times

torch.ones(1 << 10)
with weights_apart():
    weights = [torch.ones(1 << 20) for _ in range(50)]  # 4 MiB each
    last = torch.ones(100)  # what is allocated after them keeps a heap from shrinking
held = resident()
del weights
freed = held - resident()
faults(2)
print(freed, faults())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux")
def test_freed_weights_return_to_the_system_and_activations_are_not_mapped_anew() -> None:
    said = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True).stdout
    freed, faults = map(float, said.split())
    assert freed > 190  # of 200 MiB
    assert faults < 1_500  # 4,096 if each tensor were mapped anew


def test_a_second_precision_is_streamed_as_it_is_loaded(tmp_path: Path) -> None:
    """Two of one model, the second in bfloat16: some choices flip, the same ones either way."""
    folder = saved("rmoe", tmp_path / "m")
    options = ["--compare-with", str(folder), "--dtype", "bf16", "--measures", "load"]
    flips = []
    for name, more in (("plain", []), ("streamed", ["--stream"])):
        assert _analyze(folder, tmp_path / name, *options, *more) == 0
        first, second = read_analysis(tmp_path / name / "analysis.json").models
        assert first.flips is not None
        flips.append((first.flips.values, second.frequency))
    assert flips[0] == flips[1]
    assert sum(flips[0][0]) > 0


def test_a_run_of_another_plugin_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kill = saved("olmoe", tmp_path / "m"), _stop_after(2)
    with pytest.raises(Killed):
        stream_routing(
            StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "s", "auto", lambda progress: next(kill)
        )
    plugin = ModuleType("a_plugin")
    plugin.__rmoe_sha256__ = "a" * 64
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    assert stream_routing(StreamedModel(folder, CPU), BLOCKS, 3, tmp_path / "s").resumed == 0
