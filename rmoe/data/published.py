"""The two published corpora of the paper's Table 1: enwik8 and WikiText-103, as their authors distribute them.

Archives are read where they lie: nothing is unpacked to disk, members are found by their base name, and no member may
be larger than the corpus can be. Imports no torch.
"""

from __future__ import annotations

import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rmoe.data.config import SPLITS, DataConfig
from rmoe.data.text import SplitTexts, Text, open_text, read_bytes
from rmoe.errors import RequestError, RunError
from rmoe.places import expand
from rmoe.records import atomic_write, sha256

ENWIK8_BYTES = 100_000_000
ENWIK8_CUTS = (90_000_000, 95_000_000)
_MAX_MEMBER_BYTES = 2**30  # wiki.train.tokens has 541 million
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Download:
    """One archive as published."""

    url: str
    bytes: int
    sha256: str


DOWNLOADS = {
    "enwik8": Download(
        "http://mattmahoney.net/dc/enwik8.zip",
        36_445_475,
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    ),
    # The author's own copy; the first address, on S3, has gone.
    "wikitext-103": Download(
        "https://wikitext.smerity.com/wikitext-103-v1.zip",
        190_229_076,
        "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    ),
}


def enwik8_text(config: DataConfig) -> Text:
    """enwik8, or any other text that asks for its split: a file, a `.gz`, or a zip with the member `enwik8`."""
    path = _fetched(config) if config.path is None else expand(config.path, "data.path")
    if zipfile.is_zipfile(path):
        return Text("enwik8", partial(_read_member, path, "enwik8"))
    return open_text(str(path), config.text_field)


def wikitext103_texts(config: DataConfig) -> SplitTexts:
    """`wiki.{train,valid,test}.tokens` (or `.raw`) of a folder or zip; WikiText-2 has the same names."""
    path = _fetched(config) if config.path is None else expand(config.path, "data.path")
    for kind in ("tokens", "raw"):
        files = {split: f"wiki.{split}.{kind}" for split in SPLITS}
        if path.is_dir() and all((path / file).is_file() for file in files.values()):
            texts = {split: Text(file, partial(read_bytes, path / file)) for split, file in files.items()}
            return SplitTexts(path.name, texts)
        if (
            path.is_file()
            and zipfile.is_zipfile(path)
            and all(_members(path, file) for file in files.values())
        ):
            texts = {split: Text(file, partial(_read_member, path, file)) for split, file in files.items()}
            return SplitTexts(path.stem, texts)
    allowed = "a folder or zip with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens (or .raw)"
    raise RequestError("data.path", str(path), allowed)


def _members(archive: Path, file: str) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(archive) as packed:
        return [info for info in packed.infolist() if not info.is_dir() and Path(info.filename).name == file]


def _read_member(archive: Path, file: str) -> Iterator[bytes]:
    """The bytes of the one member of that base name; the size it declares is not trusted."""
    members = _members(archive, file)
    if len(members) != 1:
        raise RequestError(
            "data.path", str(archive), f"a zip with one file named {file} (it has {len(members)})"
        )
    size = 0
    try:
        with zipfile.ZipFile(archive) as packed, packed.open(members[0]) as stream:
            while chunk := stream.read(_CHUNK):
                size += len(chunk)
                if size > _MAX_MEMBER_BYTES:
                    allowed = f"{file} of at most {_MAX_MEMBER_BYTES} bytes"
                    raise RequestError("data.path", str(archive), allowed)
                yield chunk
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise RequestError("data.path", str(archive), f"a whole, readable zip ({error})") from error


def _fetched(config: DataConfig) -> Path:
    """The archive of `config.split` in the cache, downloaded if that is asked for and it is not there yet."""
    wanted = DOWNLOADS[config.split]
    target = config.cache_folder / "downloads" / wanted.url.rpartition("/")[2]
    if target.is_file() and sha256(target) == wanted.sha256:
        return target
    where = f"the path of {wanted.url} ({wanted.bytes / 1e6:.0f} MB), fetched by you"
    if not config.download:
        raise RequestError("data.path", None, f"{where}, or --data.download to have it fetched")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the cache {target.parent} cannot be written ({error})"
        raise RunError(what, "nothing", config.another_cache) from None
    try:
        with atomic_write(target, alone=False) as staged:
            _download(wanted, staged)
            if sha256(staged) != wanted.sha256:
                raise RunError(
                    f"{wanted.url} is not the published file", "nothing", f"give data.path: {where}"
                )
    except (urllib.error.URLError, OSError) as error:
        raise RequestError(
            "data.download", True, f"a network that reaches {wanted.url} ({error}), or {where}"
        ) from error
    return target


def _download(wanted: Download, target: Path) -> None:
    # The server of WikiText refuses urllib's own name.
    request = urllib.request.Request(
        wanted.url, headers={"User-Agent": "rmoe (https://arxiv.org/abs/2408.06793)"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer, target.open("wb") as file:  # nosec B310: fixed URLs
        size = 0
        while size <= wanted.bytes and (chunk := answer.read(_CHUNK)):
            file.write(chunk)
            size += len(chunk)
