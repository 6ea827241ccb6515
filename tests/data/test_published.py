"""enwik8 and WikiText-103 as their authors pack them; nothing is fetched from outside."""

import gzip
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from rmoe.data import DataConfig, prepare, published
from rmoe.data.published import DOWNLOADS, Download
from rmoe.errors import RequestError, RunError
from tests.data.texts import files_below, read

WIKI = {
    split: f" \n = Title of {split} = \n \n Some <unk> words here . \n".encode() * 30
    for split in ("train", "valid", "test")
}


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for name, data in members.items():
            packed.writestr(name, data)
    return path


@pytest.fixture(scope="module")
def hundred_million() -> bytes:
    """As long as enwik8, each split filled with a byte of its own."""
    return b"r" * 90_000_000 + b"v" * 5_000_000 + b"t" * 5_000_000


def check_enwik8(config: DataConfig) -> None:
    corpus = prepare(config, 512)
    assert {name: entry.tokens for name, entry in corpus.manifest.splits.items()} == {
        "train": 90_000_000,
        "valid": 5_000_000,
        "test": 5_000_000,
    }
    for split, byte in (("train", b"r"), ("valid", b"v"), ("test", b"t")):
        assert set(read(corpus, split)) == set(byte)
    assert corpus.unit == "bits_per_byte"


@pytest.mark.parametrize("form", ["enwik8", "enwik8.zip", "other.txt.gz"])
def test_enwik8_split(tmp_path: Path, cache: Path, hundred_million: bytes, form: str) -> None:
    path = tmp_path / form
    if form.endswith("zip"):
        write_zip(path, {"enwik8": hundred_million})
    else:
        path.write_bytes(gzip.compress(hundred_million, 1) if form.endswith("gz") else hundred_million)
    check_enwik8(DataConfig(path=str(path), split="enwik8", cache_dir=str(cache)))


def test_wiki100_by_its_published_hash(shared_data: Path, corpus_cache: Path) -> None:
    config = DataConfig(path=str(shared_data / "wiki100.txt.gz"), split="enwik8", cache_dir=str(corpus_cache))
    corpus = prepare(config, 512)
    assert corpus.manifest.source.sha256 == "d2fb8bf4a7f066c77ba4ec3f920062bff3e957e101c07ab8d683aadd1a54326d"
    digest = hashlib.sha256(b"".join(read(corpus, split) for split in ("train", "valid", "test")))
    assert digest.hexdigest() == corpus.manifest.source.sha256


def test_part_of_enwik8_is_refused_as_enwik8(shared_data: Path, cache: Path) -> None:
    path = str(shared_data / "enwik8_prefix.xml.gz")
    with pytest.raises(RequestError, match=r"exactly 100,000,000 bytes, not 4,154,399"):
        prepare(DataConfig(path=path, split="enwik8", cache_dir=str(cache)), 512)
    assert prepare(DataConfig(path=path, cache_dir=str(cache)), 512).manifest.source.bytes == 4_154_399


@pytest.mark.parametrize("form", ["folder", "zip", "raw zip"])
def test_wikitext_as_published(tmp_path: Path, cache: Path, form: str) -> None:
    kind = "raw" if form.startswith("raw") else "tokens"
    files = {f"wikitext-103/wiki.{split}.{kind}": data for split, data in WIKI.items()}
    if form == "folder":
        path = tmp_path / "wikitext-103"
        path.mkdir()
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
    else:
        path = write_zip(tmp_path / "wikitext-103-v1.zip", files)
    corpus = prepare(
        DataConfig(path=str(path), split="wikitext-103", tokenizer="words", cache_dir=str(cache)), 16
    )
    splits = corpus.manifest.splits
    assert {split: entry.bytes for split, entry in splits.items()} == {
        split: len(data) for split, data in WIKI.items()
    }
    assert splits["valid"].tokens == splits["valid"].words == 30 * (4 + 5 + 5)
    assert corpus.tokenizer.decode(np.fromfile(corpus.folder / "test.bin", dtype="uint8")[:7]).split() == (
        ["<eos>", "=", "Title", "of", "<unk>", "=", "<eos>"]
    )
    # With another tokenizer the unit stays perplexity per word, so that models can be compared.
    by_bytes = prepare(DataConfig(path=str(path), split="wikitext-103", cache_dir=str(cache)), 16)
    entry = by_bytes.manifest.splits["valid"]
    assert (entry.words, entry.tokens) == (splits["valid"].words, len(WIKI["valid"]))
    assert by_bytes.unit == "perplexity"
    bits = np.log(2) * entry.words / entry.tokens
    assert by_bytes.in_unit("valid", bits) == pytest.approx(2.0)


def test_archive_members_are_never_written_anywhere(tmp_path: Path, cache: Path) -> None:
    members = {f"../../up/wiki.{split}.tokens": data for split, data in WIKI.items()}
    path = write_zip(tmp_path / "w.zip", members | {"/etc/other": b"x", "../evil": b"y"})
    prepare(DataConfig(path=str(path), split="wikitext-103", cache_dir=str(cache)), 16)
    assert {name.split("/")[0] for name in files_below(tmp_path)} == {"w.zip", "cache"}
    assert not (tmp_path.parent / "up").exists()


def test_damaged_archive(tmp_path: Path, cache: Path) -> None:
    path = write_zip(tmp_path / "enwik8.zip", {"enwik8": np.random.default_rng(0).bytes(100_000)})
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(RequestError, match=r"a whole, readable zip"):
        prepare(DataConfig(path=str(path), split="enwik8", cache_dir=str(cache)), 16)


def test_archive_bomb(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "_MAX_MEMBER_BYTES", 1_000_000)
    path = write_zip(tmp_path / "enwik8.zip", {"enwik8": bytes(1_000_001)})
    with pytest.raises(RequestError, match="enwik8 of at most 1000000 bytes"):
        prepare(DataConfig(path=str(path), split="enwik8", cache_dir=str(cache)), 16)


@pytest.mark.parametrize("members", [{"other": b"x"}, {"a/enwik8": b"x", "b/enwik8": b"y"}])
def test_archive_without_the_one_file(tmp_path: Path, cache: Path, members: dict[str, bytes]) -> None:
    path = write_zip(tmp_path / "some.zip", members)
    with pytest.raises(RequestError, match="a zip with one file named enwik8"):
        prepare(DataConfig(path=str(path), split="enwik8", cache_dir=str(cache)), 16)


# --- download ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["enwik8", "wikitext-103"])
def test_without_a_path_the_error_says_what_to_fetch(cache: Path, split: str) -> None:
    with pytest.raises(RequestError) as caught:
        prepare(DataConfig(split=split, cache_dir=str(cache)), 16)
    assert DOWNLOADS[split].url in str(caught.value)
    assert "--data.download" in str(caught.value)
    assert not cache.exists()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """An HTTP server on this machine in the place of the two outside; the dict is what it serves."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files.get(self.path)
            assert not self.headers["User-Agent"].startswith("Python")
            self.send_response(200 if data is not None else 404)
            self.end_headers()
            with suppress(ConnectionError):  # a reader that has had enough hangs up
                self.wfile.write(data or b"")

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/wikitext-103-v1.zip"
        monkeypatch.setattr(published, "DOWNLOADS", {"wikitext-103": Download(url, 10_000, "0" * 64)})
        yield files
        running.shutdown()


def offer(
    server: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, data: bytes, digest: str | None = None
) -> None:
    server["/wikitext-103-v1.zip"] = data
    wanted = published.DOWNLOADS["wikitext-103"]
    known = Download(wanted.url, len(data), digest or hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(published, "DOWNLOADS", {"wikitext-103": known})


def test_download_is_checked_kept_and_used_again(server, tmp_path: Path, cache: Path, monkeypatch) -> None:
    path = write_zip(
        tmp_path / "w.zip", {f"wikitext-103/wiki.{split}.tokens": data for split, data in WIKI.items()}
    )
    offer(server, monkeypatch, path.read_bytes())
    config = DataConfig(split="wikitext-103", download=True, tokenizer="words", cache_dir=str(cache))
    corpus = prepare(config, 16)
    assert files_below(cache / "downloads") == ["wikitext-103-v1.zip"]
    server.clear()  # now offline
    assert prepare(config, 16).folder == corpus.folder
    assert (
        prepare(DataConfig(split="wikitext-103", tokenizer="words", cache_dir=str(cache)), 16).folder
        == corpus.folder
    )


def test_download_of_another_file_is_not_kept(server, cache: Path, monkeypatch) -> None:
    offer(server, monkeypatch, b"not the published file", digest="0" * 64)
    with pytest.raises(RunError, match="is not the published file"):
        prepare(DataConfig(split="wikitext-103", download=True, cache_dir=str(cache)), 16)
    assert files_below(cache) == []


def test_download_stops_beyond_the_published_size(server, cache: Path, tmp_path: Path) -> None:
    server["/wikitext-103-v1.zip"] = bytes(50_000_000)
    wanted = published.DOWNLOADS["wikitext-103"]
    published._download(wanted, tmp_path / "part")
    assert wanted.bytes < (tmp_path / "part").stat().st_size <= wanted.bytes + published._CHUNK


def test_download_without_a_network_says_what_to_fetch(server, cache: Path) -> None:
    with pytest.raises(RequestError, match=r"a network that reaches http.*404.*fetched by you") as caught:
        prepare(DataConfig(split="wikitext-103", download=True, cache_dir=str(cache)), 16)
    assert "\n" not in str(caught.value)
    assert files_below(cache) == []
