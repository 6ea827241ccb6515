"""Tokenizers: the fast way gives what the saved tokenizer gives, and bytes are bytes."""

import mmap
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rmoe.data.encode import (
    ByteEncoder,
    Encoder,
    HubEncoder,
    WordEncoder,
    build_vocabulary,
    byte_tokenizer,
    load_encoder,
    word_tokenizer,
)
from rmoe.errors import RequestError

SPECIAL = {"<unk>": 0, "<eos>": 1, "<|pad|>": 2}


def encode(encoder: Encoder, data: bytes) -> list[int]:
    with mmap.mmap(-1, len(data)) as text:
        text[:] = data
        return np.concatenate(list(encoder.encode(text, (0, len(data))))).tolist()


@cache
def loaded(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


@given(st.binary(min_size=1, max_size=300))
@example(b"\xff\xfe\x80 invalid \xc3")
@example(bytes(range(256)))
def test_bytes_are_bytes(data: bytes) -> None:
    assert encode(ByteEncoder(), data) == list(data)


@given(st.text(max_size=200))
@example("\x00\u0100\u00ff\r\n\t  a .b , c's")
@example("<|endoftext|><|pad|>")
def test_saved_byte_tokenizer_gives_the_bytes_and_back(saved_bytes: Path, text: str) -> None:
    tokenizer = loaded(saved_bytes)
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_byte_tokenizer_special_tokens(saved_bytes: Path) -> None:
    tokenizer = loaded(saved_bytes)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)
    assert tokenizer.decode([72, 105, 256, 257], skip_special_tokens=True) == "Hi"
    padded = tokenizer(["a", "abc"], padding=True, padding_side="left")
    assert padded["input_ids"][0] == [257, 257, 97]
    assert padded["attention_mask"][0] == [0, 0, 1]


def test_byte_tokenizer_loads_where_rmoe_is_not_imported(saved_bytes: Path) -> None:
    code = (
        "import sys; from transformers import AutoTokenizer;"
        f"t = AutoTokenizer.from_pretrained({str(saved_bytes)!r});"
        "assert t.encode('né') == [110, 195, 169]; assert 'rmoe' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_saved_byte_tokenizer_is_known_again(saved_bytes: Path) -> None:
    assert isinstance(load_encoder(str(saved_bytes)), ByteEncoder)


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_what_a_user_added_to_a_tokenizer_stays(kind: str, tmp_path: Path) -> None:
    """A chat template and tokens for it; text is encoded as before, written-out tokens as text."""
    own = ByteEncoder() if kind == "bytes" else WordEncoder(SPECIAL | {"a": 3})
    tokenizer = own.tokenizer
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert type(encoder) is type(own)
    assert encoder.tokenizer.chat_template == "{{ messages }}"
    assert "<|im_start|>" in encoder.tokenizer.get_vocab()
    assert encode(encoder, b"a <|im_start|> a\n") == encode(own, b"a <|im_start|> a\n")
    assert encode(encoder, b"a <|im_start|> a\n") == encoder.tokenizer("a <|im_start|> a\n")["input_ids"]


WORDS = st.text(
    st.sampled_from("ab<unk>é\n \t\r\f\x0b\x1c\x1d\x1e\x1f\x85\xa0\u2003\u2028\u3000.,@-0"),
    min_size=1,
    max_size=80,
)


@given(WORDS)
@example("<unk> <eos> <|pad|> x<unk>y\n")
def test_words_are_what_the_saved_tokenizer_gives(text: str) -> None:
    vocabulary = build_vocabulary(["a ab b é . , @-@ <unk> b ba\n"], max_vocab=None, min_count=1)
    encoder = WordEncoder(vocabulary)
    if text.split() or "\n" in text:
        assert encode(encoder, text.encode()) == encoder.tokenizer(text)["input_ids"]


def test_words_cut_by_count_and_size() -> None:
    text = ["the cat the dog\n", "the cat <unk> zebra\n\n"]
    assert build_vocabulary(text, None, 1) == SPECIAL | {"the": 3, "cat": 4, "dog": 5, "zebra": 6}
    assert build_vocabulary(text, None, 2) == SPECIAL | {"the": 3, "cat": 4}
    assert build_vocabulary(text, 4, 1) == SPECIAL | {"the": 3}
    assert encode(WordEncoder(build_vocabulary(text, 4, 1)), b"the cat\n\nthe") == [3, 0, 1, 1, 3]


def test_words_by_hand_on_wikitext(shared_data: Path) -> None:
    # The published count of WikiText's validation set: 217,646 tokens, one <eos> per line among them.
    import gzip

    text = gzip.decompress((shared_data / "wikitext103_valid.tokens.txt.gz").read_bytes())
    encoder = WordEncoder(build_vocabulary([text.decode()], None, 1))
    ids = encode(encoder, text)
    assert len(ids) == 217_646
    assert ids.count(1) == 3760
    by_id = {number: word for word, number in encoder.ids.items()}
    assert [by_id[number] for number in ids[:8]] == [
        "<eos>",
        "=",
        "Homarus",
        "gammarus",
        "=",
        "<eos>",
        "<eos>",
        "Homarus",
    ]


def test_saved_word_tokenizer_is_known_again(tmp_path: Path) -> None:
    vocabulary = build_vocabulary(["one two two\n"], None, 1)
    word_tokenizer(vocabulary).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert isinstance(encoder, WordEncoder)
    assert encode(encoder, b"two three one\n") == [3, 0, 4, 1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-pair tokenizer with a post-processor that adds special tokens, as many published ones have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return folder


def test_any_tokenizer_without_its_special_tokens(trained: Path) -> None:
    encoder = load_encoder(str(trained))
    assert isinstance(encoder, HubEncoder)
    text = Path(__file__).read_text() + "<s> written out\n"
    ids = encode(encoder, text.encode())
    assert 0 not in ids
    assert encoder.tokenizer.decode(ids) == text
    assert (
        ids
        == AutoTokenizer.from_pretrained(trained)(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
    )


def test_pieces_of_a_long_text_give_the_whole_text(trained: Path) -> None:
    encoder = load_encoder(str(trained))
    text = "".join(f"line {number} of a long text, né\n" for number in range(9000))
    assert encoder.tokenizer.decode(encode(encoder, text.encode())) == text


@pytest.mark.parametrize("kind", ["words", "hub"])
def test_text_that_is_not_utf8_names_the_byte(trained: Path, kind: str) -> None:
    encoder = load_encoder(str(trained)) if kind == "hub" else WordEncoder(SPECIAL)
    with pytest.raises(RequestError, match=r"byte 0xff at offset 5.*takes any text"):
        encode(encoder, b"fine\n\xff\n")


def test_unknown_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"data\.tokenizer is .*bytes, words, or the folder") as caught:
        load_encoder(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
