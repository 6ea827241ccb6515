"""What a name on the command line means, decided without a network."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from rmoe.errors import RequestError
from rmoe.places import display_name, expand, model_place, require_writable


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache that holds org/tiny."""
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / "0123456789012345678901234567890123456789"
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    (repository / "blobs" / "b").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.mark.parametrize(
    "name", ["runs/modle", "modle", "runs/modle/", "./runs/modle", "/no/such", "a/b/c", "..x"]
)
def test_a_mistyped_folder_is_an_error_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    begun = time.monotonic()
    with pytest.raises(RequestError, match="allowed: an existing folder") as caught:
        model_place(name)
    assert time.monotonic() - begun < 5
    assert (f"or hf:{name} for" in str(caught.value)) == (name in ("runs/modle", "modle"))


def test_an_empty_path_is_not_the_current_folder(no_network: None) -> None:
    with pytest.raises(RequestError, match=r"^data.path is ''; allowed: a path$"):
        expand("", "data.path")
    with pytest.raises(RequestError, match=r"^MODEL is ''; allowed: a path$"):
        model_place("")
    assert expand(".", "--out") == Path()


def test_the_right_folder_is_proposed(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(RequestError, match=r"did you mean .*/model\?"):
        model_place(tmp_path / "modle")


def test_the_hub_is_asked_only_by_prefix_or_what_is_cached(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_place("org/tiny") == cached
    assert model_place("hf:org/tiny") == cached  # offline
    assert display_name(model_place("org/tiny")) == "org/tiny"
    assert display_name(Path("runs/a/model")) == "a"
    assert display_name(Path("runs/a")) == "a"
    with pytest.raises(RequestError, match=r"outgoing traffic has been disabled.*HF_HUB_OFFLINE=0"):
        model_place("hf:org/other")
    for wrong in ("hf:", "hf:/a", "hf:a/b/c", "hf:../a"):
        with pytest.raises(RequestError, match="hf:NAME or hf:ORG/NAME"):
            model_place(wrong)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert model_place("org/tiny") == Path("org/tiny")  # a folder comes first


def test_a_repository_is_cached_without_the_second_copies_that_are_never_downloaded(cached: Path) -> None:
    entry = {"size": 2, "blob_id": "b"}
    listed = {"config.json": entry, "original/consolidated.safetensors": entry}
    listing = cached.parents[1] / "trees" / f"{cached.name}.json"
    listing.parent.mkdir()
    listing.write_text(json.dumps({"format_version": 1, "files": listed}))
    assert model_place("org/tiny") == cached


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object, **__: object) -> str:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", down)
    with pytest.raises(RequestError, match=r"that can be read \(no network\)"):
        model_place("hf:org/other")


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expand("~/a,b", "--data") == tmp_path / "a,b"
    assert expand("a/~b", "--data") == Path("a/~b")
    with pytest.raises(RequestError, match="--data is '~nobody-here/x'"):
        expand("~nobody-here/x", "--data")
    (tmp_path / "~odd").mkdir()
    assert expand("~odd", "--data") == Path("~odd")  # such a file is there


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    require_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RequestError, match=r"--out is .*; allowed: a folder that can be written"):
        require_writable(tmp_path / "file")
    with pytest.raises(RequestError, match=r"file is no folder\)"):
        require_writable(tmp_path / "file" / "a" / "b")
