"""The harness's figures for an RMoE model against an independent computation, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rmoe
from rmoe.cli.main import main
from rmoe.data.encode import byte_tokenizer
from rmoe.data.tasks import MultipleChoice, Passage, Question, read_tasks
from rmoe.errors import RequestError
from rmoe.evaluation import parse_benchmarks, run_benchmarks
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize

pytest.importorskip("lm_eval")

CONTEXT = 2048
ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RMoE model that prefers some bytes to others, so that answers differ."""
    path = tmp_path_factory.mktemp("model")
    config = RMoEConfig(
        vocab_size=320,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_experts=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        router="rmoe",
    )
    model = RMoEForCausalLM(config)
    initialize(model, 0)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def continuation(model: Any, context: str, text: str) -> tuple[float, bool]:
    """(log-probability of `text` after `context`, whether greedy decoding would say it), token by token."""
    tokenizer = byte_tokenizer()
    given, wanted = tokenizer(context)["input_ids"], tokenizer(text)["input_ids"]
    total, greedy = 0.0, True
    with torch.no_grad():
        logits = model(torch.tensor([given + wanted])).logits[0].double()
    for place, token in enumerate(wanted, start=len(given) - 1):
        scores = logits[place].log_softmax(-1)
        total += scores[token].item()
        greedy &= int(scores.argmax()) == token
    return total, greedy


def multiple_choice(model: Any, items: list[MultipleChoice]) -> dict[str, float]:
    right = normed = 0
    for item in items:
        scores = [
            continuation(model, f"Question: {item.question}\nAnswer:", f" {c}")[0] for c in item.choices
        ]
        by_length = [score / len(choice) for score, choice in zip(scores, item.choices, strict=True)]
        right += scores.index(max(scores)) == item.label
        normed += by_length.index(max(by_length)) == item.label
    return {"acc": right / len(items), "acc_norm": normed / len(items)}


def last_words(model: Any, items: list[Passage]) -> dict[str, float]:
    found = [continuation(model, i.text.rpartition(" ")[0], " " + i.text.rpartition(" ")[2]) for i in items]
    return {
        "acc": sum(greedy for _, greedy in found) / len(found),
        "perplexity": math.exp(-sum(score for score, _ in found) / len(found)),
    }


def problems(model: Any, items: list[Question]) -> tuple[dict[str, float], list[str]]:
    """Greedy answers cut at what the task stops at, one by one: no batch, no padding."""
    tokenizer, said, right = byte_tokenizer(), [], 0
    for item in items:
        prompt = tokenizer(f"Question: {item.question}\nAnswer:", return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=256, do_sample=False, pad_token_id=257)
        text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        for stop in ("Question:", "</s>", "<|im_end|>"):
            text = text.partition(stop)[0]
        said.append(text)
        match, wanted = ANSWER.search(text), ANSWER.search(item.answer)
        right += bool(match and wanted and match[1] == wanted[1])
    return {"exact_match": right / len(items)}, said


def harness(folder: Path, name: str, file: Path, limit: int) -> dict[str, Any]:
    return run_benchmarks(
        rmoe.load(folder),
        byte_tokenizer(),
        {name: file},
        limit=limit,
        num_fewshot=0,
        samples=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "kind", "own"),
    [
        ("arc_easy", "arc_easy_test", MultipleChoice, multiple_choice),
        ("piqa", "piqa_valid", MultipleChoice, multiple_choice),
        ("lambada_openai", "lambada_test", Passage, last_words),
    ],
)
def test_fifty_items_of_each_task(
    name: str, file: str, kind: type[Any], own: Any, folder: Path, shared_data: Path
) -> None:
    path = shared_data / "tasks" / f"{file}.jsonl.gz"
    found = harness(folder, name, path, 50)["results"][name]
    for metric, value in own(rmoe.load(folder), read_tasks(path, kind)[:50]).items():
        assert found[f"{metric},none"] == pytest.approx(value, rel=1e-4), metric


@pytest.mark.slow
def test_fifty_word_problems(folder: Path, shared_data: Path) -> None:
    path = shared_data / "tasks" / "gsm8k_test.jsonl.gz"
    result = harness(folder, "gsm8k", path, 50)
    expected, said = problems(rmoe.load(folder), read_tasks(path, Question)[:50])
    assert result["results"]["gsm8k"]["exact_match,strict-match"] == expected["exact_match"]
    samples = {s["doc_id"]: s["resps"][0][0] for s in result["samples"]["gsm8k"]}
    assert [samples[number] for number in range(50)] == said


@pytest.fixture
def small_tasks(tmp_path: Path) -> dict[str, Path]:
    rows = {
        "arc_easy": [
            {"question": f"What is {n} and {n}?", "choices": [str(n), str(2 * n), "none"], "label": n % 3}
            for n in range(6)
        ],
        "lambada_openai": [{"text": f"The number after {n} is {n + 1}"} for n in range(6)],
    }
    paths = {}
    for name, items in rows.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(item) + "\n" for item in items))
    return paths


def test_local_files_from_the_command_line(
    folder: Path, small_tasks: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ",".join(f"{name}={path}" for name, path in small_tasks.items())
    assert main(["eval", str(folder), "--tasks", tasks, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"results", "configs", "versions", "n-shot", "n-samples"} <= result.keys()
    model = rmoe.load(folder)
    choices = multiple_choice(model, read_tasks(small_tasks["arc_easy"], MultipleChoice))
    assert result["results"]["arc_easy"]["acc,none"] == pytest.approx(choices["acc"])
    words = last_words(model, read_tasks(small_tasks["lambada_openai"], Passage))
    assert result["results"]["lambada_openai"]["perplexity,none"] == pytest.approx(
        words["perplexity"], rel=1e-4
    )
    # The prompts are the harness's own.
    assert result["configs"]["arc_easy"]["doc_to_text"] == "Question: {{question}}\nAnswer:"


def test_a_task_that_does_not_exist(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(folder), "--tasks", "arc_easi"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "arc_easi" in line
    assert "arc_easy" in line


def test_a_file_for_a_task_that_has_no_local_form(folder: Path, small_tasks: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match="gsm8k"):
        run_benchmarks(rmoe.load(folder), byte_tokenizer(), {"hellaswag": small_tasks["arc_easy"]})


def test_a_bad_line_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"question": "Q", "choices": ["a", "b"], "label": 0}\n{"question": "Q", "choices": ["a", "b"]}\n'
    )
    assert main(["eval", str(folder), "--tasks", f"arc_easy={bad}"]) == 2
    assert "bad.jsonl line 2" in capsys.readouterr().err


def test_what_the_option_accepts() -> None:
    assert parse_benchmarks("a, b=x.jsonl") == {"a": None, "b": Path("x.jsonl")}
    for wrong in ("", ",", "a,a"):
        with pytest.raises(RequestError, match="--tasks"):
            parse_benchmarks(wrong)


def test_text_or_tasks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(folder)]) == 2
    assert "--tasks" in capsys.readouterr().err
