"""Task files: what is read, and that each mistake names its line and key."""

import gzip
import json
from pathlib import Path

import pytest

from rmoe.data.tasks import (
    Instruction,
    Labelled,
    MultipleChoice,
    Passage,
    Question,
    Task,
    read_tasks,
)
from rmoe.errors import RequestError

GOOD = {
    MultipleChoice: {"question": "Which?", "choices": ["this", "that"], "label": 1},
    Labelled: {"text": "fine", "label": "positive"},
    Instruction: {"instruction": "Add.", "input": "", "output": "3"},
    Question: {"question": "How many?", "answer": "3"},
    Passage: {"text": "the last word"},
}


def write(folder: Path, *lines: object, name: str = "tasks.jsonl") -> Path:
    path = folder / name
    data = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.jsonl.gz"])
def test_items_are_read(tmp_path: Path, kind: type[Task], name: str) -> None:
    path = write(tmp_path, GOOD[kind], "", GOOD[kind] | {"id": 7}, name=name)
    assert read_tasks(path, kind) == [kind(**GOOD[kind])] * 2


def test_input_of_an_instruction_may_be_missing(tmp_path: Path) -> None:
    path = write(tmp_path, {"instruction": "Add.", "output": "3"})
    assert read_tasks(path, Instruction) == [Instruction(instruction="Add.", input="", output="3")]


@pytest.mark.parametrize(
    ("kind", "bad", "problem"),
    [
        (MultipleChoice, {"question": "Which?", "label": 0}, "missing required field `choices`"),
        (
            MultipleChoice,
            GOOD[MultipleChoice] | {"label": "1"},
            r"Expected `int`, got `str` - at `\$\.label`",
        ),
        (MultipleChoice, GOOD[MultipleChoice] | {"label": 2}, "`label` is 2, not an index of 2 choices"),
        (MultipleChoice, GOOD[MultipleChoice] | {"label": -1}, "`label` is -1"),
        (MultipleChoice, GOOD[MultipleChoice] | {"choices": ["this", " "]}, "`choices` has an empty answer"),
        (MultipleChoice, GOOD[MultipleChoice] | {"choices": ["this"], "label": 0}, "`choices` has 1 entries"),
        (MultipleChoice, GOOD[MultipleChoice] | {"question": ""}, "`question` is empty"),
        (Labelled, {"text": "fine"}, "missing required field `label`"),
        (Labelled, {"text": "fine", "label": None}, r"at `\$\.label`"),
        (Labelled, {"text": "", "label": 1}, "`text` is empty"),
        (
            Labelled,
            {"text": "fine", "label": "neutral"},
            "`label` is 'neutral', which the training set does not have",
        ),
        (Instruction, {"instruction": "Add.", "input": "1 2"}, "missing required field `output`"),
        (Instruction, GOOD[Instruction] | {"output": " \n"}, "`output` is empty"),
        (Instruction, GOOD[Instruction] | {"instruction": ""}, "`instruction` is empty"),
        (Question, GOOD[Question] | {"answer": ""}, "`answer` is empty"),
        (Passage, {"text": 5}, r"at `\$\.text`"),
        (Passage, '{"text": "cut', "truncated"),
        (Passage, '["text"]', "Expected `object`, got `array`"),
    ],
)
def test_mistakes_name_line_and_key(tmp_path: Path, kind: type[Task], bad: object, problem: str) -> None:
    path = write(tmp_path, GOOD[kind], "", bad, GOOD[kind])
    with pytest.raises(RequestError, match=problem) as caught:
        read_tasks(path, kind, labels={"positive", "negative"} if kind is Labelled else None)
    assert caught.value.field == "tasks.jsonl line 3"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_empty_file(tmp_path: Path, lines: list[str]) -> None:
    path = write(tmp_path, *lines)
    with pytest.raises(RequestError, match="is 'empty'"):
        read_tasks(path, Passage)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="a readable file"):
        read_tasks(tmp_path / "nothing.jsonl", Passage)


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("arc_easy_test", MultipleChoice, 2376),
        ("piqa_valid", MultipleChoice, 1838),
        ("lambada_test", Passage, 5153),
        ("gsm8k_test", Question, 1319),
        ("sst2_train", Labelled, 6920),
        ("banking77_test", Labelled, 3080),
        ("rasbt_instruction_1100", Instruction, 1100),
    ],
)
def test_published_files(shared_data: Path, name: str, kind: type[Task], count: int) -> None:
    path = shared_data / "tasks" / f"{name}.jsonl.gz"
    assert len(read_tasks(path, kind)) == count


def test_alpaca_has_an_empty_answer_and_the_line_is_named(shared_data: Path) -> None:
    with pytest.raises(RequestError, match=r"alpaca_5000\.jsonl\.gz line 2336 is '`output` is empty'"):
        read_tasks(shared_data / "tasks" / "alpaca_5000.jsonl.gz", Instruction)


def test_cells_of_a_csv_may_be_padded(tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text, label\n good , 1\nbad, -1\nodd, a name \n")
    items = read_tasks(file, Labelled)
    assert [item.label for item in items] == [1, -1, "a name"]
    assert items[0].text == " good "
