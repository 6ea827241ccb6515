"""From text to a cached corpus: splits, units, cache hits and damage, and what is refused."""

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmoe.data import DataConfig, ingest, prepare
from rmoe.data.encode import words
from rmoe.data.text import SEPARATOR, Text
from rmoe.errors import RequestError, RunError
from tests.data.texts import LINES, TEXT, everything, files_below, read
from tests.versions import since

# --- what comes out ---------------------------------------------------------------------------------------------------


def test_bytes_of_a_file(request_for) -> None:
    corpus = prepare(request_for(), 32)
    assert everything(corpus) == TEXT
    assert (corpus.manifest.dtype, corpus.unit, corpus.vocab_size) == ("uint8", "bits_per_byte", 320)
    for split in ("train", "valid", "test"):
        entry = corpus.manifest.splits[split]
        assert entry.tokens == entry.bytes == len(read(corpus, split))
    assert len(corpus.train) == 1 + (corpus.manifest.splits["train"].tokens - 32) // 31
    assert bytes(corpus.valid[0]["input_ids"].tolist()) == read(corpus, "valid")[:32]


def test_bytes_that_are_no_text(request_for) -> None:
    data = bytes(range(256)) * 40
    assert everything(prepare(request_for(data), 16)) == data


def test_manifest_and_sums_can_be_checked_by_others(request_for) -> None:
    corpus = prepare(request_for(tokenizer="words"), 16)
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=corpus.folder, check=True
    )
    written = json.loads((corpus.folder / "manifest.json").read_text())
    sums = dict(
        reversed(line.split("  ")) for line in (corpus.folder / "SHA256SUMS").read_text().splitlines()
    )
    assert {split["file"]: split["sha256"] for split in written["splits"].values()}.items() <= sums.items()
    assert files_below(corpus.folder) == sorted([*sums, "SHA256SUMS"])
    assert str(corpus.folder.parent.parent) not in (corpus.folder / "manifest.json").read_text()


def test_words_are_counted_in_the_training_split_only(request_for) -> None:
    corpus = prepare(request_for(tokenizer="words"), 16)
    vocabulary = corpus.tokenizer.get_vocab()
    splits = corpus.manifest.splits
    train, test = TEXT[: splits["train"].bytes].decode(), TEXT[-splits["test"].bytes :].decode()
    assert vocabulary.keys() == {*words(train), "<unk>", "<|pad|>"}
    unknown = sum(word not in vocabulary for word in words(test))
    ids = np.fromfile(corpus.folder / "test.bin", dtype=corpus.manifest.dtype)
    assert (ids == vocabulary["<unk>"]).sum() == unknown > 10
    assert len(ids) == splits["test"].tokens == splits["test"].words == len(words(test))
    assert corpus.unit == "perplexity"
    assert len(vocabulary) <= corpus.vocab_size < len(vocabulary) + 64
    assert corpus.vocab_size % 64 == 0


def test_units_by_hand(request_for) -> None:
    corpus = prepare(request_for(), 32)
    assert corpus.in_unit("valid", math.log(256)) == pytest.approx(8.0)
    words = prepare(request_for(tokenizer="words"), 16)
    assert words.in_unit("valid", math.log(100)) == pytest.approx(100)
    assert words.in_unit("valid", 1e6) == math.inf


def test_a_tokenizer_folder_gives_bits_per_byte_of_the_text(request_for, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(LINES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "bpe")
    corpus = prepare(request_for(tokenizer=str(tmp_path / "bpe")), 16)
    assert corpus.manifest.dtype == "uint16"
    assert everything(corpus) == TEXT
    entry = corpus.manifest.splits["test"]
    assert entry.tokens < entry.bytes
    # The same total loss, spread over tokens or over bytes, is the same number of bits.
    assert corpus.in_unit("test", 3.0) == pytest.approx(3.0 * entry.tokens / math.log(2) / entry.bytes)
    assert corpus.tokenizer.get_vocab() == PreTrainedTokenizerFast(tokenizer_object=tokenizer).get_vocab()


def test_whole_is_for_measuring(request_for) -> None:
    corpus = prepare(request_for(split="whole"), 32)
    assert read(corpus, "test") == TEXT
    with pytest.raises(RequestError, match=r"split is 'train'; allowed: one of test"):
        corpus.blocks("train")


def test_first_bytes_only(request_for) -> None:
    corpus = prepare(request_for(max_bytes=5000), 16)
    assert everything(corpus) == TEXT[:5000]


# --- where text comes from --------------------------------------------------------------------------------------------


def test_gzip_is_the_same_corpus_as_its_content(request_for) -> None:
    plain, packed = prepare(request_for(), 32), prepare(request_for(gzip.compress(TEXT), "text.txt.gz"), 32)
    assert plain.folder == packed.folder
    assert (plain.manifest.source.name, packed.manifest.source.name) == ("text.txt", "text.txt.gz")
    # Named as what is in it, as a download that was unpacked in name alone.
    assert prepare(request_for(gzip.compress(TEXT), "packed.txt"), 32).folder == plain.folder
    # Two gzip files in one, as `cat a.gz b.gz` makes.
    double = gzip.compress(TEXT[:7000]) + gzip.compress(TEXT[7000:])
    assert prepare(request_for(double, "double.gz"), 32).folder == plain.folder


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL.gz"])
def test_json_lines(request_for, name: str) -> None:
    texts = [f"text {number}: é \U0001f600\n two lines" for number in range(200)]
    data = "\n".join(json.dumps({"id": 1, "body": text}) for text in texts).encode() + b"\n\n"
    corpus = prepare(
        request_for(gzip.compress(data) if name.endswith("gz") else data, name, text_field="body"), 32
    )
    assert everything(corpus) == SEPARATOR.join(text.encode() for text in texts)


def test_folder_takes_text_files_in_a_fixed_mixed_order(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "corpus"
    inside = {
        f"{folder}/{n:03d}.txt": f"{folder} {n}\n".encode() * 20 for folder in ("a", "b/c") for n in range(40)
    }
    outside = {".hidden/x.txt": b"hidden", "a/picture.png": b"\x89PNG", "a/.x.txt": b"hidden too"}
    for name, data in (inside | outside).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "a/zipped.md.gz").write_bytes(gzip.compress(b"zipped\n"))
    (root / "link.txt").symlink_to(root / "a/000.txt")
    os.symlink(root / "a", root / "loop")
    config = DataConfig(path=str(root), cache_dir=str(cache))
    documents = everything(corpus := prepare(config, 32)).split(SEPARATOR)
    assert sorted(documents) == sorted([*inside.values(), b"zipped\n"])
    assert documents != sorted(documents)
    assert {part[:1] for part in read(corpus, "test").split(SEPARATOR) if part} == {b"a", b"b"}
    # Another place and another order of creation give the same corpus.
    other = tmp_path / "elsewhere" / "corpus"
    for name, data in reversed(inside.items()):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes(data)
    (other / "a/zipped.md").write_bytes(b"zipped\n")
    (other / "a/zipped.md").rename(other / "a/zipped.md.gz")
    (other / "a/zipped.md.gz").write_bytes(gzip.compress(b"zipped\n", compresslevel=1))
    assert prepare(DataConfig(path=str(other), cache_dir=str(cache)), 32).folder == corpus.folder


def test_default_is_the_standard_library(cache: Path) -> None:
    import argparse

    corpus = prepare(DataConfig(cache_dir=str(cache)), 256)
    assert 8e6 < corpus.manifest.source.bytes < 40e6
    text = everything(corpus)
    documents = text.split(SEPARATOR)
    assert Path(argparse.__file__).read_bytes() in documents
    assert Path(math.__file__ or "").suffix != ".py"  # extension modules are no source
    assert not any(b"build_time_vars = {" in document[:200] for document in documents)
    assert Path(np.__file__).read_bytes() not in documents


def test_dataset_from_disk(tmp_path: Path, cache: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [f"row {number} é\n" for number in range(500)]
    splits = {"train": rows[:400], "validation": rows[400:450], "test": rows[450:]}
    folder = tmp_path / "rows"
    datasets.DatasetDict(
        {k: datasets.Dataset.from_dict({"text": v}) for k, v in splits.items()}
    ).save_to_disk(folder)
    corpus = prepare(DataConfig(path=f"hf:{folder}", cache_dir=str(cache)), 32)
    for ours, theirs in (("train", "train"), ("valid", "validation"), ("test", "test")):
        assert read(corpus, ours) == SEPARATOR.join(row.encode() for row in splits[theirs])
    whole = prepare(DataConfig(path=f"hf:{folder}", split="whole", cache_dir=str(cache)), 32)
    assert read(whole, "test") == read(corpus, "test")
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "single")
    single = prepare(DataConfig(path=f"hf:{tmp_path / 'single'}", cache_dir=str(cache)), 32)
    assert everything(single) == SEPARATOR.join(row.encode() for row in rows)
    with pytest.raises(RequestError, match=r"data\.text_field is 'body'; allowed: a column of train: text"):
        prepare(DataConfig(path=f"hf:{folder}", text_field="body", cache_dir=str(cache)), 32)
    with pytest.raises(RequestError, match="unset with a dataset that has its own splits"):
        prepare(DataConfig(path=f"hf:{folder}", max_bytes=9, cache_dir=str(cache)), 32)


@pytest.mark.parametrize(
    ("splits", "evaluated", "trained"),
    [
        ("train test", "test", "train"),
        ("train validation", "validation", "train"),
        ("train dev test", "test", None),
        ("test", "test", "test"),
        ("train unsupervised", None, "train"),
        ("a b", None, None),
    ],
)
def test_which_split_of_a_dataset_it_is(
    splits: str, evaluated: str | None, trained: str | None, tmp_path: Path, cache: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    names = splits.split()
    rows = {name: datasets.Dataset.from_dict({"text": [f"{name} row\n"] * 200}) for name in names}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "rows")
    for split, wanted in (("whole", evaluated), ("auto", trained)):
        config = DataConfig(path=f"hf:{tmp_path / 'rows'}", split=split, cache_dir=str(cache))  # type: ignore[arg-type]
        if wanted is None and not (split == "auto" and "test" in names):
            with pytest.raises(RequestError, match=rf"a dataset with a split .*it has {', '.join(names)}"):
                prepare(config, 16)
            continue
        corpus = prepare(config, 16)
        if wanted is None:  # all three
            continue
        assert read(corpus, "test").endswith(f"{wanted} row\n".encode())
        assert corpus.manifest.source.name.endswith(f" ({wanted})" if len(names) > 1 else "rows")


@given(st.text("aé€😀", max_size=12), st.integers(1, 40), st.integers(1, 5))
def test_the_first_bytes_end_with_a_character(text: str, limit: int, size: int) -> None:
    raw = text.encode()
    whole = Text("t", lambda: iter([raw[i : i + size] for i in range(0, len(raw), size)]))
    assert b"".join(whole.first(limit).read()) == raw[:limit]
    expected = raw[:limit].decode(errors="ignore").encode()
    assert b"".join(whole.first(limit, characters=True).read()) == expected


def test_dataset_that_is_not_there(cache: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(
        RequestError, match=r"data\.path is 'hf:nobody/nothing'; allowed: a dataset that can be"
    ):
        prepare(DataConfig(path="hf:nobody/nothing", cache_dir=str(cache)), 32)


def test_dataset_without_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"pip install 'rmoe\[data\]'"):
        prepare(DataConfig(path="hf:any/thing", cache_dir=str(cache)), 32)


# --- what is refused --------------------------------------------------------------------------------------------------


BAD_JSON = b'{"text": "fine"}\n\n{"text": 3}\n'
WHOLE_GZIP = gzip.compress(TEXT, mtime=0)
WORDS = {"tokenizer": "words"}
# what is wrong -> content, file name, options, what the error says
BAD_TEXTS: dict[str, tuple[bytes, str, dict[str, str], str]] = {
    "empty": (b"", "empty.txt", {}, r"data\.path is 'empty\.txt'; allowed: a text that is not empty"),
    "empty gzip": (gzip.compress(b""), "empty.gz", {}, "a text that is not empty"),
    "no lines": (b"\n\n", "empty.jsonl", {}, "a text that is not empty"),
    "short": (b"word " * 60, "short.txt", {}, r"at least sequence_length \(32\) tokens"),
    "few words": (b"word " * 60 + b"\n", "short.txt", WORDS, r"tokens in valid.*sequence_length \(32\)"),
    "short whole": (b"word", "short.txt", {"split": "whole"}, r"with 4 tokens in test"),
    "cut gzip": (WHOLE_GZIP[:-9], "cut.gz", {}, r"cut\.gz'; allowed: a whole gzip file"),
    "bent gzip": (WHOLE_GZIP[:200] + b"\0" + WHOLE_GZIP[201:], "bent.gz", {}, "a whole gzip file"),
    "no gzip": (b"no gzip at all", "no.gz", {}, "a whole gzip file"),
    "number for text": (BAD_JSON, "bad.jsonl", {}, r"bad\.jsonl line 3 is .*text in the field 'text'"),
    "no such field": (
        BAD_JSON,
        "bad.jsonl",
        {"text_field": "body"},
        r"bad\.jsonl line 1 is \"no field 'body'\"",
    ),
    "cut line": (
        b'{"text": "a"}\n{"text": "b"',
        "cut.jsonl",
        {},
        r"cut\.jsonl line 2 is 'Input data was truncated'",
    ),
    "list": (b'["text"]', "list.jsonl", {}, r"list\.jsonl line 1 is"),
    "half a character": (b'{"text": "\\ud800"}', "surrogate.jsonl", {}, r"surrogate\.jsonl line 1 is"),
    "no UTF-8": (b"\xff" * 3000, "binary.txt", WORDS, "byte 0xff at offset 0"),
    "archive": (b"PK\3\4", "some.zip", {}, "zip: a published corpus"),
    "not 100 MB": (TEXT, "text.txt", {"split": "enwik8"}, "exactly 100,000,000 bytes"),
    "no WikiText": (TEXT, "text.txt", {"split": "wikitext-103"}, r"wiki\.train\.tokens"),
    "nothing to count": (TEXT, "text.txt", WORDS | {"split": "whole"}, "folder of a saved tokenizer"),
    "no tokenizer": (
        TEXT,
        "text.txt",
        {"tokenizer": "/no/such/folder"},
        r"data\.tokenizer is '/no/such/folder'",
    ),
}


@pytest.mark.parametrize(("data", "name", "options", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_bad_text_is_one_line_and_writes_nothing(
    request_for, cache: Path, data, name, options, message
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        prepare(request_for(data, name, **options), 32)
    assert "\n" not in str(caught.value)
    assert files_below(cache) == []
    assert not cache.exists() or os.listdir(cache / "corpora") == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.txt", "an existing file or folder"),
        (".", "a folder that holds text files"),
        ("caf\udce9.txt", r"caf.+txt'; allowed: a path whose name is UTF-8"),
    ],
)
def test_nothing_there(tmp_path: Path, cache: Path, path: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        prepare(DataConfig(path=str(tmp_path / path), cache_dir=str(cache)), 32)
    assert not cache.exists()


def test_short_text_is_refused_from_the_cache_too(request_for) -> None:
    prepare(request_for(), 32)
    with pytest.raises(RequestError, match=r"sequence_length \(100000\)"):
        prepare(request_for(), 100_000)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"split": "enwik9"}, "data.split"),
        ({"max_vocab": 3}, "data.max_vocab"),
        ({"min_count": 0}, "data.min_count"),
        ({"max_bytes": 0}, "data.max_bytes"),
        ({"max_bytes": 5, "split": "enwik8"}, "data.max_bytes"),
    ],
)
def test_bad_options(options: dict, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        DataConfig(**options)
    assert caught.value.field == field


def test_sequence_length_of_one_predicts_nothing(request_for) -> None:
    with pytest.raises(RequestError, match="sequence_length is 1"):
        prepare(request_for(), 1)


def test_gzip_bomb(request_for, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmoe.data.rows.MAX_UNPACKED_BYTES", 10_000_000)
    with pytest.raises(RequestError, match="at most 10000000 bytes when unpacked"):
        prepare(request_for(gzip.compress(bytes(10_000_001)), "bomb.gz"), 32)
    assert not cache.exists()


def test_cache_that_cannot_be_written(request_for, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"cannot be written.*saved: nothing.*data\.cache_dir"):
        prepare(request_for(), 32)


def test_text_that_changes_while_it_is_read(
    request_for, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = request_for()
    # The file changes between the pass that hashes it and the pass that copies it.
    monkeypatch.setattr(
        ingest, "read_entry", lambda *_: Path(str(config.path)).write_bytes(TEXT[1:]) and None
    )
    with pytest.raises(RunError, match="changed while it was read"):
        prepare(config, 32)
    assert files_below(cache) == []


@since("transformers", "5.23", "transformers.utils imports torch")
def test_prepare_needs_no_torch(request_for) -> None:
    config = request_for()
    code = (
        "import sys; from rmoe.data import DataConfig, prepare;"
        f"prepare(DataConfig(path={config.path!r}, cache_dir={config.cache_dir!r}), 32);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
