"""Local task files before the harness sees them; it need not be installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmoe.cli.main import main
from rmoe.errors import RequestError
from rmoe.evaluation import local_tasks


@pytest.mark.parametrize(
    ("shipped", "asked", "lines", "taken"), [(5, None, 5, False), (5, None, 6, True), (5, 0, 1, True)]
)
def test_prompts_take_no_more_examples_than_the_file_has(
    shipped: int, asked: int | None, lines: int, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line more than the examples: the harness leaves out the item that is asked."""
    monkeypatch.setattr(local_tasks, "_shipped", lambda name: {"num_fewshot": shipped})
    file = tmp_path / "own.jsonl"
    file.write_text(lines * (json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n"))
    if taken:
        task = local_tasks.local_task("gsm8k", file, tmp_path, asked)
        assert task["fewshot_split"] == "test"
        return
    with pytest.raises(
        RequestError, match=r"with 5 examples'; allowed: a file of 6 lines or more, or --num-fewshot"
    ):
        local_tasks.local_task("gsm8k", file, tmp_path, asked)


def test_a_negative_number_of_examples_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["eval", "nowhere", "--tasks", "gsm8k=x.jsonl", "--num-fewshot", "-1"]) == 2
    assert "--num-fewshot is -1; allowed: 0 or more" in capsys.readouterr().err
