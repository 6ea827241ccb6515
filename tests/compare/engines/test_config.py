"""`[engine]`: from a preset's table and from options; what is wrong is one line."""

from __future__ import annotations

import re

import pytest

from rmoe.cli.arguments import parse
from rmoe.cli.compare import run
from rmoe.compare.engines import EngineConfig, Wants, engine_of
from rmoe.compare.sharing import place
from rmoe.errors import RequestError
from rmoe.training.config import RunConfig

ASKED = ["--routers", "smoe", "--out", "out"]


def parsed(*arguments: str) -> EngineConfig:
    return parse(run, [*ASKED, *arguments], "rmoe compare").keywords["engine"]


def test_a_presets_table_is_the_default_and_options_override_it(tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text('[engine]\nkind = "slurm"\npartition = "gpu"\nsetup = ["module load cuda"]\n')
    table = EngineConfig(kind="slurm", partition="gpu", setup=("module load cuda",))
    assert parsed("--preset", str(preset)) == table
    assert parsed("--preset", str(preset), "--engine", "ray", "--engine.partition", "None").kind == "ray"
    assert parsed() == EngineConfig()
    assert parsed("--engine=local", "--runs-per-gpu", "3") == EngineConfig(runs_per_gpu=3)
    assert (
        RunConfig.from_preset(str(preset)).model == RunConfig().model
    )  # the run's own settings know nothing of it


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("kind = 'pbs'", "engine.kind is 'pbs'; allowed: 'local' or 'ray' or 'slurm'"),
        ("partitoin = 'x'", "engine.partitoin is 'x'; allowed: one of address, at_once, cpus"),
        ("retries = -1", "engine.retries is -1; allowed: 0 or more"),
        ("hours = 0.0", "engine.hours is 0.0; allowed: 1/60, which is a minute, or more"),
        ("hours = 0.016", "engine.hours is 0.016; allowed: 1/60"),
        ("hours = inf", "engine.hours is inf; allowed: 1/60"),
        ("hours = nan", "engine.hours is nan; allowed: 1/60"),
        ("memory_gib = 0.0", "engine.memory_gib is 0.0; allowed: above 0"),
        ("memory_gib = nan", "engine.memory_gib is nan; allowed: above 0, and finite"),
    ],
)
def test_a_wrong_table_is_one_line(table, said, tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text(f"[engine]\n{table}\n")
    with pytest.raises(RequestError, match=re.escape(said)):
        EngineConfig.from_preset(str(preset))
    with pytest.raises(RequestError, match="--preset"):
        EngineConfig.from_preset(str(tmp_path / "none.toml"))


def test_an_hour_is_whole_minutes_of_which_one_is_the_least():
    assert int(EngineConfig(hours=1 / 60).hours * 60) == 1


def test_a_preset_that_an_editor_wrote_a_byte_order_mark_to(tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text('router = "smoe"\n[engine]\nkind = "slurm"\n', encoding="utf-8-sig")
    assert EngineConfig.from_preset(str(preset)).kind == "slurm"
    assert RunConfig.from_preset(str(preset)).router == "smoe"


@pytest.mark.parametrize(
    ("engine", "parallel", "gpus", "processes"),
    [
        (EngineConfig(), 1, 0, 1),
        (EngineConfig(), 4, 0, 4),
        (EngineConfig(gpus=4), 1, 4, 4),
        (EngineConfig(gpus=4), 4, 4, 4),
        (EngineConfig(gpus=0), 2, 0, 2),
        (EngineConfig(kind="slurm", gpus=1, cpus=8), 1, 1, 1),
    ],
)
def test_what_a_run_gets(engine, parallel, gpus, processes):
    config = RunConfig.from_preset("quick").with_setting("parallel.fsdp", parallel)
    wants, _ = place(config, engine, None, on_gpu=False)
    assert (wants.gpus, wants.processes) == (gpus, processes)
    assert wants.cpus == (engine.cpus or processes)


def test_a_layout_for_other_gpus_is_refused():
    config = RunConfig.from_preset("quick").with_setting("parallel.fsdp", 2)
    with pytest.raises(RequestError, match="the number of processes \\(4\\)"):
        place(config, EngineConfig(gpus=4), None, on_gpu=False)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (EngineConfig(cpus=10_000), "engine.cpus is 10000; allowed: at most"),
        (EngineConfig(memory_gib=1e6), "engine.memory_gib is 1000000.0; allowed: at most"),
        (
            EngineConfig(kind="slurm", submitit="local", cpus=10_000),
            "engine.cpus is 10000; allowed: at most",
        ),
        (EngineConfig(node="elsewhere"), "engine.node is 'elsewhere'; allowed: "),
        (EngineConfig(fetch="model"), "engine.fetch is 'model'; allowed: no, but with --engine ray"),
        (
            EngineConfig(kind="ray", fetch="model", shared="/"),
            "engine.fetch is 'model'; allowed: no, but with",
        ),
    ],
)
def test_what_this_machine_has_not_is_one_line(engine, said, tmp_path):
    with pytest.raises(RequestError, match=re.escape(said)):
        engine_of(engine, tmp_path / "out", Wants(), 1, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine.address", "head:6379"], "engine.address is 'head:6379'; allowed: unset with --engine local"),
        (["--engine.partition=gpu"], "engine.partition is 'gpu'; allowed: unset with --engine local"),
        (["--engine", "slurm", "--engine.runs-per-gpu", "2"], "runs_per_gpu is 2; allowed: unset with --engine slurm"),
        (["--engine", "ray", "--engine.hours", "2"], "engine.hours is 2.0; allowed: unset with --engine ray"),
    ],
)  # fmt: skip
def test_an_option_that_the_engine_does_not_read_is_refused(options, said):
    with pytest.raises(RequestError, match=re.escape(said)):
        parsed(*options)


def test_a_presets_table_may_be_of_another_engine(tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text("[engine]\nkind = 'slurm'\npartition = 'gpu'\nfetch = 'model'\n")
    assert parsed("--preset", str(preset), "--engine", "local").partition == "gpu"
