"""`--profile`: the page's figures are those of the model, and the run learns the same as without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from rmoe.cli import main as cli
from rmoe.errors import RequestError
from rmoe.training.profile import STAGES, by_stage, mark_stages
from rmoe.training.run import train
from tests.model.small import model, tokens
from tests.training import tiny
from tests.versions import older


def test_flops_of_each_stage_are_counted_where_they_belong() -> None:
    """3 layers, the first dense: exact for head and experts, forward and twice that backward."""
    net, ids = model(experts="auto").train(), tokens()
    handles = list(mark_stages(net))
    with profile(record_shapes=True) as recorded:
        net(ids, labels=ids, output_logits=False).loss.backward()
    spent = by_stage(recorded.events(), "cpu")
    count, d, width = ids.numel(), 36, 20
    mlps = 2 * (2 + 1) + 2  # two layers of two experts and a shared one, and the dense MLP as wide as two
    assert spent["experts"].flops == 3 * 2 * count * 3 * d * width * mlps
    assert spent["head"].flops == 3 * 2 * count * d * 67
    attention = 2 * count * (d * d * 2 + 2 * d * 18)
    assert spent["attention"].flops > 3 * 3 * attention
    assert spent["router"].flops > 0
    assert spent["optimizer"].flops == spent["dispatch"].flops == 0
    # below transformers 5.23 the rotary angles are a matrix product
    assert spent["other"].flops == (
        net.config.head_dim * ids.shape[1] if older("transformers", "5.23") else 0
    )
    assert all(spent[stage].seconds > 0 for stage in STAGES if stage != "optimizer")
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_with_it(checkpointing: bool, text: Path, tmp_path: Path) -> None:
    config = tiny.config(text, max_steps=6, gradient_checkpointing=checkpointing)
    train(config, tmp_path / "with", progress=False, profile=True)
    trace = json.loads((tmp_path / "with" / "profile" / "trace.json").read_text())
    assert {"stage: router", "stage: experts"} <= {event.get("name") for event in trace["traceEvents"]}
    page = (tmp_path / "with" / "profile" / "summary.md").read_text()
    assert page.startswith("# Where the time of a training step goes\n\n3 steps of 128 tokens on cpu")
    for stage in STAGES:
        row = next(line for line in page.splitlines() if line.startswith(f"| {stage} |"))
        assert float(row.split("|")[2]) > 0, stage
    assert len(page.splitlines()) < 40
    train(config, tmp_path / "without", progress=False)
    assert tiny.weights(tmp_path / "with") == tiny.weights(tmp_path / "without")


def test_what_it_cannot_do(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match=r"training\.compile"):
        train(tiny.config(text, compile=True), tmp_path / "run", profile=True)
    assert (
        cli.main(
            ["train", "--out", str(tmp_path / "run"), "--profile", "--data", str(text), "--training.compile"]
        )
        == 2
    )
    assert "profile is True" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_step_left_says_so(
    text: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    train(tiny.config(text), out, progress=False, resume=True, profile=True)
    assert "no step is left to profile" in capsys.readouterr().err
    assert not (out / "profile").exists()


def test_the_optimizer_is_fused_and_equal(text: Path) -> None:
    """Fused AdamW differs from the plain one by rounding only."""
    torch.manual_seed(0)
    start, gradients = torch.randn(7, 5), torch.randn(4, 7, 5)
    ends = []
    for fused in (True, False):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1, fused=fused)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)
