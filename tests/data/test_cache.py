"""The cache: hits, misses, damage, and several processes at once."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rmoe.data import DataConfig, prepare
from rmoe.data import cache as cache_module
from tests.data.texts import TEXT, everything, files_below


def test_second_run_does_not_encode_again(request_for, monkeypatch: pytest.MonkeyPatch) -> None:
    config = request_for(tokenizer="words")
    first = prepare(config, 16)
    monkeypatch.setattr("rmoe.data.encode.WordEncoder.encode", None)
    assert prepare(config, 64).manifest == first.manifest


def test_other_text_tokenizer_or_split_is_another_entry(request_for) -> None:
    configs = [
        request_for(),
        request_for(TEXT + b"more\n", "more.txt"),
        request_for(tokenizer="words"),
        request_for(tokenizer="words", min_count=2),
        request_for(tokenizer="words", max_vocab=10),
        request_for(split="whole"),
    ]
    assert len({prepare(config, 16).folder for config in configs}) == len(configs)


def test_changed_file_is_not_served_from_the_cache(request_for) -> None:
    prepare(request_for(), 32)
    changed = TEXT.replace(b"line 7:", b"LINE 7:")
    assert everything(prepare(request_for(changed), 32)) == changed


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, Path.unlink], ids=["cut", "flipped", "gone"])
@pytest.mark.parametrize(
    "file", ["train.bin", "test.bin", "manifest.json", "SHA256SUMS", "tokenizer/tokenizer.json"]
)
def test_damaged_entry_is_seen_and_made_again(request_for, caplog, damage, file: str) -> None:
    config = request_for()
    corpus = prepare(config, 32)
    before = {name: (corpus.folder / name).read_bytes() for name in files_below(corpus.folder)}
    damage(corpus.folder / file)
    again = prepare(config, 32)
    assert {name: (again.folder / name).read_bytes() for name in files_below(again.folder)} == before
    assert "is damaged" in caplog.text
    assert os.listdir(corpus.folder.parent) == [corpus.folder.name]  # nothing of the repair is left
    caplog.clear()
    prepare(config, 32)
    assert not caplog.text


def test_a_file_that_does_not_belong_is_damage(request_for, caplog) -> None:
    corpus = prepare(request_for(), 32)
    (corpus.folder / "tokenizer" / "extra.json").write_text("{}")
    prepare(request_for(), 32)
    assert "extra.json" in caplog.text
    assert "tokenizer/extra.json" not in files_below(corpus.folder)


def test_entry_of_another_request_is_not_taken(request_for, caplog) -> None:
    one = prepare(request_for(), 32)
    other = prepare(request_for(TEXT + b"x\n", "other.txt"), 32)
    shutil.rmtree(one.folder)
    shutil.copytree(other.folder, one.folder)
    assert everything(prepare(request_for(), 32)) == TEXT
    assert "made for another request" in caplog.text


def test_an_open_corpus_stays_readable_while_it_is_made_again(request_for) -> None:
    config = request_for()
    blocks = prepare(config, 32).train
    before = blocks[3]["input_ids"].tolist()
    cut_short(blocks.path.with_name("test.bin"))
    prepare(config, 32)
    assert blocks[3]["input_ids"].tolist() == before


def test_processes_at_once_make_one_entry(request_for, cache: Path) -> None:
    config = request_for(TEXT * 20)
    code = (
        "import sys; from rmoe.data import DataConfig, prepare;"
        "c = prepare(DataConfig(path=sys.argv[1], cache_dir=sys.argv[2]), 32); print(c.manifest.source.sha256)"
    )
    command = [sys.executable, "-c", code, str(config.path), str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    outputs = [process.communicate() for process in running]
    assert all(process.returncode == 0 for process in running), outputs
    assert len({out for out, _ in outputs}) == 1
    assert len(os.listdir(cache / "corpora")) == 1
    assert everything(prepare(config, 32)) == TEXT * 20


def test_what_a_killed_process_left_is_removed_a_day_later(request_for, cache: Path) -> None:
    old, new = cache / "corpora" / ".staging-old", cache / "corpora" / ".staging-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "text").write_bytes(TEXT)
    os.utime(old, (time.time() - 90_000,) * 2)
    prepare(request_for(), 32)
    assert not old.exists()
    assert new.exists()


def test_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RMOE_CACHE", str(tmp_path))
    assert DataConfig().cache_folder == tmp_path
    monkeypatch.delenv("RMOE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataConfig().cache_folder == tmp_path / "rmoe"
    assert DataConfig(cache_dir="/x").cache_folder == Path("/x")


def test_a_damaged_entry_that_another_process_has_moved_away_is_no_error(
    request_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = prepare(request_for(), 32)
    cut_short(corpus.folder / "test.bin")
    checked, seen = cache_module._checked, []

    def and_gone(entry: Path, key: str):
        """As it is; but when it is looked at again, before it is moved, another process has moved it."""
        try:
            return checked(entry, key)
        except ValueError:
            seen.append(entry)
            if len(seen) == 2:
                shutil.rmtree(entry)
            raise

    monkeypatch.setattr(cache_module, "_checked", and_gone)
    assert everything(prepare(request_for(), 32)) == TEXT
    assert len(seen) == 2
