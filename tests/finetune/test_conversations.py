"""Conversations as text: the tokenizer's template, or headings; answers alone are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rmoe.cli.main import main
from rmoe.data.blocks import IGNORED
from rmoe.data.encode import build_vocabulary, byte_tokenizer, word_tokenizer
from rmoe.data.tasks import Conversation, Instruction, Message
from rmoe.errors import RequestError
from rmoe.finetune.config import FinetuneConfig
from rmoe.finetune.conversations import segments_of
from rmoe.finetune.instructions import PackedExamples, drafts
from rmoe.finetune.run import finetune
from tests.finetune.conftest import encode

# ChatML, which most chat models of today use.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: thoughts of earlier answers are left out.
FORGETS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] if loop.last else m['content'].split('END')[-1] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As DeepSeek-R1's: the prompt opens a thought that a given answer does not have.
THINKS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
# As Llama 2's and Mixtral's: nothing stands between a prompt and an answer but a space.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
REFUSES = "{{ raise_exception('Conversation roles must alternate') }}"
TALK = Conversation(
    instruction="One?",
    output="2",
    messages=(
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "hm END 1"),
        Message("user", "Two?"),
        Message("assistant", "2"),
    ),
)


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def like_llama(legacy: bool) -> Any:
    """A BPE that writes a space as `\u2581` and puts one before a text: `legacy` as Llama 2, else as Mistral v0.3."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    space = "\u2581"
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
        inner.pre_tokenizer = pre_tokenizers.Split(space, "merged_with_next")
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(space, prepend_scheme="first")
    inner.decoder = decoders.Replace(space, " ")
    special = ["<unk>", "<s>", "</s>"]
    text = "[INST] One? Two? [/INST] hm END 1 2 yes </s> Below is an instruction ### Response:\n yes no\n"
    inner.train_from_iterator([text] * 50, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def learned(tokenizer: Any, item: Instruction) -> tuple[str, list[str]]:
    """The text of the one example of an item, and the spans of it that are labelled."""
    (example,) = encode([item], tokenizer, 4096)
    row = PackedExamples([[example]], 4096, 257)[0]
    ids, labels = row["input_ids"].tolist()[: len(example.ids)], row["labels"].tolist()[: len(example.ids)]
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
    spans, before = [], IGNORED
    for label in labels:
        if label != IGNORED:
            spans = [*spans, [label]] if before == IGNORED else [*spans[:-1], [*spans[-1], label]]
        before = label
    return tokenizer.decode(ids), [tokenizer.decode(span) for span in spans]


def test_by_the_tokenizers_template() -> None:
    tokenizer = tokenizer_with(CHATML)
    text, spans = learned(tokenizer, TALK)
    turns = [{"role": m.role, "content": m.content} for m in TALK.messages]
    assert text == tokenizer.apply_chat_template(turns, tokenize=False) + "<|endoftext|>"
    assert spans == ["hm END 1<|im_end|>\n", "2<|im_end|>\n<|endoftext|>"]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_text_is_tokenized_whole(legacy: bool) -> None:
    tokenizer = like_llama(legacy)
    (example,) = encode([Instruction("One?", "yes")], tokenizer, 512)
    text = "".join(segment.text for segment in drafts([Instruction("One?", "yes")], tokenizer)[0])
    assert example.ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert learned(tokenizer, Instruction("One?", "yes"))[1] == ["yes</s>"]

    tokenizer.chat_template = INST
    turns = [{"role": m.role, "content": m.content} for m in TALK.messages[1:]]
    talk = Conversation.from_turns("messages", turns)
    (example,) = encode([talk], tokenizer, 512)
    assert example.ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert learned(tokenizer, talk)[1] == [" hm END 1</s>", " 2</s>"]


def test_bytes_words_and_tokenizers_without_offsets_are_as_piece_by_piece() -> None:
    item = Instruction("S\u00e9 it\n", "yes \U0001f642 \n no")
    words = word_tokenizer(build_vocabulary(["Be brief. ### Response:\n yes no 2"], None, 1))
    for tokenizer in (byte_tokenizer(), words, tokenizer_with(CHATML), ByT5Tokenizer()):
        for draft, example in zip(
            drafts([item, TALK], tokenizer), encode([item, TALK], tokenizer, 4096), strict=True
        ):
            ids, labels = [], []
            for segment in draft:
                piece = tokenizer(segment.text, add_special_tokens=segment.begins)["input_ids"]
                ended = segment.ends and piece[-1] != tokenizer.eos_token_id
                piece += [tokenizer.eos_token_id] if ended else []
                ids += piece
                labels += piece if segment.learned else [IGNORED] * len(piece)
            assert example.ids == ids
            assert example.labels == labels


def test_an_answer_of_weight_zero_is_read_and_not_learned() -> None:
    messages = (*TALK.messages[:2], Message("assistant", "wrong", learned=False), *TALK.messages[3:])
    item = Conversation(instruction="", output="", messages=messages)
    for template, end in ((CHATML, "<|im_end|>\n<|endoftext|>"), (None, "<|endoftext|>")):
        text, spans = learned(tokenizer_with(template), item)
        assert spans == ["2" + end]
        assert "wrong" in text


def test_a_template_that_forgets_gives_an_example_for_each_answer() -> None:
    tokenizer = tokenizer_with(FORGETS)
    assert [[segment.text for segment in draft] for draft in segments_of(TALK, tokenizer, 1)] == [
        ["<system>Be brief.\n<user>One?\n<assistant>", "hm END 1\n"],
        ["<system>Be brief.\n<user>One?\n<assistant> 1\n<user>Two?\n<assistant>", "2\n"],
    ]
    assert len(encode([TALK, TALK], tokenizer, 4096)) == 4


def test_a_prompt_that_opens_a_thought() -> None:
    assert learned(tokenizer_with(THINKS), TALK)[1] == [
        "<assistant>hm END 1\n",
        "<assistant>2\n<|endoftext|>",
    ]


def test_a_template_that_ends_the_text_and_the_line() -> None:
    """As Qwen's, whose end-of-text token is `<|im_end|>`: there is no second one after the line end."""
    tokenizer = like_llama(legacy=False)
    tokenizer.chat_template = INST.replace("{{ eos_token }}", "{{ eos_token }}\n")
    (example,) = encode(
        [Conversation.from_turns("messages", [{"role": "assistant", "content": "yes"}])], tokenizer, 99
    )
    assert example.ids.count(tokenizer.eos_token_id) == 1
    assert example.ids[-1] != tokenizer.eos_token_id


def test_a_conversation_reads_as_it_will_be_asked() -> None:
    limits = pytest.importorskip(
        "rmoe.serving.limits", reason="needs the extra `serve`", exc_type=ImportError
    )
    parts = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be right."}]
    asked = [{"role": "developer", "content": parts}, {"role": "user", "content": "One?"}]
    served = limits.parse(json.dumps({"messages": asked}).encode(), "chat", "m", 320)["messages"]
    answer = {"role": "assistant", "content": "1"}
    learnt = Conversation.from_turns("messages", [*asked, answer]).messages
    assert [{"role": m.role, "content": m.content} for m in learnt] == [*served, answer]


def test_the_first_token_of_an_answer_that_begins_is_not_predicted() -> None:
    """Packed, it would be from the last token of the example before it."""
    item = Conversation.from_turns("messages", [{"role": "assistant", "content": "Hello"}])
    (example,) = encode([item], tokenizer_with(THINKS), 512)
    row = PackedExamples([[example, example]], 512, 257)[0]
    size = len(example.ids)
    assert not any(s.text for s in drafts([item], tokenizer_with(THINKS))[0] if not s.learned)
    assert row["labels"][[0, size]].tolist() == [IGNORED, IGNORED]
    assert row["labels"][1:size].tolist() == row["labels"][size + 1 : 2 * size].tolist() == example.ids[1:]


def test_a_template_that_refuses_is_one_line() -> None:
    with pytest.raises(RequestError, match=r"conversation 2.*Conversation roles must alternate"):
        encode([Instruction(instruction="a", output="b"), TALK], tokenizer_with(REFUSES), 4096)


def test_headings_where_there_is_no_template() -> None:
    text, spans = learned(tokenizer_with(None), TALK)
    assert text == (
        "Be brief.\n\n### Instruction:\nOne?\n\n### Response:\nhm END 1<|endoftext|>"
        "\n\n### Instruction:\nTwo?\n\n### Response:\n2<|endoftext|>"
    )
    assert spans == ["hm END 1<|endoftext|>", "2<|endoftext|>"]


def test_one_question_is_the_same_example_in_either_form() -> None:
    tokenizer = tokenizer_with(None)
    turns = [{"from": "human", "value": "Say it"}, {"from": "gpt", "value": "yes"}]
    conversation = Conversation.from_turns("conversations", turns)
    assert encode([conversation], tokenizer, 512) == encode([Instruction("Say it", "yes")], tokenizer, 512)


def test_a_conversation_that_is_too_long_is_cut() -> None:
    tokenizer = tokenizer_with(CHATML)
    (whole,) = encode([TALK], tokenizer, 4096)
    answer = next(place for place, label in enumerate(whole.labels) if label != IGNORED)
    (cut,) = encode([TALK], tokenizer, answer + 3)
    assert cut.labels[answer:] == whole.ids[answer : answer + 3]
    assert len(cut.labels) == len(cut.ids)


def test_a_run_on_conversations_and_from_another_folder(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{"role": m.role, "content": m.content} for m in TALK.messages]}] * 6
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("talk.json", "valid.json"):
        (tmp_path / "one" / name).write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path / "one")
    options: dict[str, Any] = {
        "epochs": 2.0,
        "batch_size": 1,
        "sequence_length": 512,
        "device": "cpu",
        "threads": 1,
    }
    config = FinetuneConfig(valid=Path("valid.json"), **options)
    whole = finetune(models / "rmoe", Path("talk.json"), Path("out"), config, progress=False)
    assert (whole.examples, whole.left_out) == (6, 0)
    weights = (tmp_path / "one/out/model/model.safetensors").read_bytes()
    (tmp_path / "one/out/result.json").unlink()
    newest = max((tmp_path / "one/out/checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    for part in (tmp_path / "one/out/model", newest):
        part.rename(tmp_path / f"away-{part.name}")

    monkeypatch.chdir(tmp_path / "two")
    (tmp_path / "one" / "talk.json").rename("renamed.json")
    moved = [
        "finetune",
        str(models / "rmoe"),
        "--data=renamed.json",
        "--out=../one/out",
        "--resume",
        "--epochs=2",
    ]
    moved += ["--batch-size=1", "--sequence-length=512", "--device=cpu", "--threads=1"]
    assert main([*moved, "--valid=../one/valid.json"]) == 0
    assert "resuming ../one/out at step" in capsys.readouterr().err
    assert (tmp_path / "one/out/model/model.safetensors").read_bytes() == weights
    (tmp_path / "two" / "other.json").write_text(json.dumps(rows[:1]))
    assert main([*moved, "--valid=other.json"]) == 2
    assert "valid_sha256" in capsys.readouterr().err
