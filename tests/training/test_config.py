"""Configurations: strict about names, types and values; presets are what the paper says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rmoe.cli.main import main
from rmoe.errors import RequestError
from rmoe.routing import ZOO
from rmoe.training.build import load_plugins, model_config, parameter_counts, router_spec
from rmoe.training.config import RunConfig
from rmoe.training.run import train
from tests.training import tiny


@pytest.mark.parametrize("name", RunConfig.preset_names())
def test_presets_load_and_round_trip(name):
    config = RunConfig.from_preset(name)
    assert config.preset == name
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model_config(config, vocab_size=256)


def count(preset: str, router: str, vocab_size: int = 256):
    from rmoe.model import RMoEForCausalLM

    config = model_config(replace(RunConfig.from_preset(preset), router=router), vocab_size)
    with torch.device("meta"):
        return parameter_counts(RMoEForCausalLM(config))


def test_medium_is_the_papers():
    """Table 1: 36.08M with 0.04M of router for SMoE, 36.51M with 0.47M for RMoE."""
    smoe, rmoe = count("medium", "smoe"), count("medium", "rmoe")
    assert smoe.router == 8 * 352 * 16 == 45_056
    assert rmoe.router == 475_904
    assert rmoe.total - smoe.total == 475_904 - 45_056
    assert smoe.non_embedding / 36.08e6 == pytest.approx(1, abs=0.012)

    config = RunConfig.from_preset("medium")
    training = config.training
    assert (training.batch_size, training.sequence_length, training.max_steps) == (48, 512, 80_000)
    assert (training.learning_rate, training.warmup_steps, config.model.hidden_dropout) == (7e-4, 4_000, 0.1)


def test_small_has_about_15_million():
    assert count("small", "smoe").non_embedding / 15.3e6 == pytest.approx(1, abs=0.015)


def test_pretrain_is_the_papers():
    sizes = count("pretrain-0.9b", "smoe", vocab_size=32_000)
    assert sizes.total == pytest.approx(0.91e9, rel=0.02)
    config = RunConfig.from_preset("pretrain-0.9b")
    training, model = config.training, config.model
    assert (model.num_hidden_layers, model.hidden_size, model.num_attention_heads) == (24, 1280, 20)
    assert (model.num_experts, model.moe_intermediate_size, model.num_experts_per_tok) == (16, 448, 4)
    assert training.batch_size * training.sequence_length * training.max_steps > 40e9
    assert (training.learning_rate, training.min_learning_rate, training.warmup_steps) == (
        4.2e-4,
        4.2e-5,
        2_000,
    )
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 0.1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"modle": {}}, "modle is {}; allowed: one of "),
        ({"model": {"hiden_size": 3}}, "model.hiden_size is 3; allowed: one of attention_dropout"),
        ({"model": 3}, "model is 3; allowed: a table"),
        ({"training": {"max_steps": "many"}}, "training.max_steps is 'many'; allowed: int"),
        ({"training": {"max_steps": 2.5}}, "training.max_steps is 2.5; allowed: int"),
        ({"training": {"max_steps": True}}, "training.max_steps is True; allowed: int"),
        ({"training": {"max_steps": 0}}, "training.max_steps is 0; allowed: 1 or more"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate is -1.0; allowed: above 0"),
        (
            {"training": {"schedule": "step"}},
            "training.schedule is 'step'; allowed: 'constant' or 'cosine' or 'linear'",
        ),
        (
            {"training": {"batch_size": 8, "micro_batch_size": 3}},
            "training.micro_batch_size is 3; allowed: a divisor",
        ),
        ({"training": {"seed": -1}}, "training.seed is -1"),
        ({"training": {"adam_epsilon": 0}}, "training.adam_epsilon is 0.0; allowed: above 0"),
        (
            {"training": {"weight_decay": float("inf")}},
            "training.weight_decay is inf; allowed: 0 or more, and finite",
        ),
        (
            {"training": {"min_learning_rate": 0.1}},
            "training.min_learning_rate is 0.1; allowed: at most learning_rate (0.001)",
        ),
        (
            {"training": {"schedule": "wsd", "min_learning_rate": 0.1}},
            "training.min_learning_rate is 0.1; allowed: at most learning_rate (0.001)",
        ),
        (
            {"training": {"schedule": "linear", "min_learning_rate": 0.001}},
            "training.min_learning_rate is 0.001; allowed: below learning_rate (0.001)",
        ),
        (
            {"training": {"schedule": "linear", "max_steps": 20, "warmup_steps": 20}},
            "training.warmup_steps is 20; allowed: below max_steps (20)",
        ),
        (
            {"training": {"schedule": "linear", "max_steps": 10, "warmup_steps": 20}},
            "training.warmup_steps is 20; allowed: below max_steps (10)",
        ),
        ({"data": {"split": "half"}}, "data.split is 'half'"),
        ({"checkpoints": {"keep": 1}}, "checkpoints.keep is 1; allowed: 2 or more"),
        ({"logging": {"every": 0}}, "logging.every is 0"),
        ({"plugin": "x"}, "plugin is 'x'; allowed: a list of str"),
        ([], "configuration is []; allowed: a table"),
    ],
)
def test_what_is_wrong_is_named(data, said):
    with pytest.raises(RequestError) as caught:
        RunConfig.from_dict(data)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[training\n", "TOML"),
        ("router = 'smoe'\nrouter = 'rmoe'\n", "TOML"),
        ("[training]\nlearning_rat = 1\n", "training.learning_rat is 1"),
        ("[modell]\n", "modell is {}"),
    ],
)
def test_a_bad_preset_file_is_named(tmp_path, toml, said):
    path = tmp_path / "mine.toml"
    path.write_text(toml)
    with pytest.raises(RequestError) as caught:
        RunConfig.from_preset(str(path))
    assert said in str(caught.value)


def test_a_preset_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("router = 'smoe'\n[training]\nlearning_rate = 1\n")
    config = RunConfig.from_preset(str(path))
    assert (config.router, config.training.learning_rate) == ("smoe", 1.0)


def test_unknown_presets_are_refused():
    for name in ("huge", "", "../pyproject", "nowhere.toml"):
        with pytest.raises(RequestError, match="--preset is"):
            RunConfig.from_preset(name)


def test_one_setting_by_name():
    config = RunConfig()
    assert config.with_setting("learning_rate", "3e-4").training.learning_rate == 3e-4
    assert config.with_setting("model.num_experts", 16).model.num_experts == 16
    assert config.with_setting("micro_batch_size", "None").training.micro_batch_size is None
    assert config.with_setting("mlp_gated", "false").model.mlp_gated is False
    assert config.with_setting("router", "smoe").router == "smoe"
    with pytest.raises(RequestError, match=r"logging\.every or checkpoints\.every"):
        config.with_setting("every", 3)
    with pytest.raises(RequestError, match="setting is 'learning_rat'"):
        config.with_setting("learning_rat", 3)
    with pytest.raises(RequestError, match=r"training\.learning_rate is 'fast'; allowed: float"):
        config.with_setting("learning_rate", "fast")


def test_checkpoints_at_least_ten():
    for steps, every, expected in (
        (200, None, 20),
        (200, 7, 7),
        (200, 1000, 20),
        (5, None, 1),
        (80_000, 1_000, 1_000),
    ):
        data = {"training": {"max_steps": steps}, "checkpoints": {"every": every}}
        assert RunConfig.from_dict(data).checkpoint_interval == expected


# --- routers -------------------------------------------------------------------------------------


def test_router_options_change_a_row():
    config = RunConfig(
        router="rmoe", router_option=("recurrence.width=64", "gate.renormalize=false", "scorer.init_std=0.02")
    )
    spec = router_spec(config)
    assert (spec.recurrence.width, spec.gate.renormalize, spec.scorer.init_std) == (64, False, 0.02)


@pytest.mark.parametrize(
    ("router", "option", "said"),
    [
        ("rmeo", (), "router is 'rmeo'; allowed: one of smoe"),
        ("rmoe", ("recurrence.width=0",), "recurrence.width is 0"),
        ("rmoe", ("recurrence.width=-3",), "recurrence.width is -3"),
        ("rmoe", ("recurrence.widht=3",), "--router-option is 'recurrence.widht=3'; allowed: NAME=VALUE"),
        ("rmoe", ("width",), "--router-option is 'width'"),
        ("rmoe", ("balance.losses=[]",), "--router-option is 'balance.losses=[]'"),
    ],
)
def test_wrong_routers_are_named(router, option, said):
    with pytest.raises(RequestError) as caught:
        router_spec(RunConfig(router=router, router_option=option))
    assert str(caught.value).startswith(said)


PLUGIN = """
from rmoe.routing.zoo import ZooRow, register, resolve
register("mine-{n}", ZooRow(resolve("smoe"), "me", "mine"))
"""


def test_plugins_register_routers(tmp_path, monkeypatch):
    (tmp_path / "by_file.py").write_text(PLUGIN.format(n="file"))
    (tmp_path / "by_module.py").write_text(PLUGIN.format(n="module"))
    monkeypatch.syspath_prepend(tmp_path)
    path = str(tmp_path / "by_file.py")
    first = load_plugins((path, "by_module"))
    assert first == load_plugins((path, "by_module"))  # a second time is harmless
    assert len(set(first.values())) == 2
    for name in ("mine-file", "mine-module"):
        assert router_spec(RunConfig(router=name)) == router_spec(RunConfig(router="smoe"))
        del ZOO[name]  # other tests list the zoo


@pytest.mark.parametrize("plugin", ["edited.py", "edited_package"])
def test_a_plugin_edited_after_its_import_is_refused(tmp_path, monkeypatch, plugin):
    """What runs is the code of the import, whatever the file says now; a package is all its files."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "edited_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    edited = package / "impl.py" if plugin == package.name else tmp_path / plugin
    edited.write_text("SIGN = 1\n")
    first = load_plugins((plugin,))
    edited.write_text("SIGN = -1\n")
    with pytest.raises(RequestError, match=r"--plugin is 'edited.* it has changed since: restart Python"):
        load_plugins((plugin,))
    for name in [name for name in sys.modules if name.startswith("rmoe_plugin_") or name == plugin]:
        monkeypatch.delitem(sys.modules, name)
    assert load_plugins((plugin,)) != first


@pytest.mark.parametrize(
    "source", ["raise RuntimeError('no\\nway')", "def", "import nothing_like_it", "exit(0)"]
)
def test_a_plugin_that_fails_is_the_requests_fault(tmp_path, source):
    path: Path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(RequestError, match="--plugin is") as caught:
        load_plugins((str(path),))
    assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="--plugin is"):
        load_plugins((str(tmp_path / "absent.py"),))
    with pytest.raises(RequestError, match="--plugin is"):
        load_plugins(("no_such_module",))


def test_a_runs_folder_decides_neither_code_nor_places(tmp_path, capsys):
    plugin, folder = tmp_path / "nothing_new.py", tmp_path / "run"
    plugin.write_text("")
    config = replace(tiny.config(tiny.text(tmp_path), max_steps=1, warmup_steps=0), plugin=(str(plugin),))
    train(config.with_setting("data.cache_dir", str(tmp_path / "cache")), folder, progress=False)
    again = RunConfig.from_run(folder)
    assert again is not None
    assert again == replace(config, plugin=())
    command = ["train", "--out", str(folder), "--resume"]
    assert main(command) == 2
    assert "error: plugin is []; allowed: [" in capsys.readouterr().err
    assert main([*command, "--plugin", str(plugin)]) == 0
    assert "finished already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parallel", "training", "said"),
    [
        ({"pipeline": 2}, {"batch_size": 8, "micro_batch_size": 8}, "training.micro_batch_size is 8; allowed: at most"),
        ({"pipeline": 2, "replicate": 2}, {"batch_size": 8, "micro_batch_size": 4}, "training.micro_batch_size is 4"),
        ({"pipeline": 4}, {"batch_size": 2}, "training.batch_size is 2; allowed: 4 or more"),
        ({"pipeline": 4, "replicate": 2}, {"batch_size": 6}, "training.batch_size is 6; allowed: 8 or more"),
        ({"pipeline": 2}, {"compile": True}, "training.compile is True; allowed: False with parallel.pipeline"),
    ],
)  # fmt: skip
def test_what_a_pipeline_cannot_train_is_refused_with_the_configuration(parallel, training, said):
    with pytest.raises(RequestError) as error:
        RunConfig.from_dict({"parallel": parallel, "training": training})
    assert str(error.value).startswith(said)
    RunConfig.from_dict({"parallel": {"pipeline": 2}, "training": {"batch_size": 8, "micro_batch_size": 4}})
