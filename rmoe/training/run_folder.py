"""One run, one folder: who may write in it, and what was asked for in it.

    DIR/config.json     the resolved configuration, written first
    DIR/run.lock        held (flock) by the process that writes here; the kernel frees it when that dies
    DIR/metrics.jsonl   see `rmoe.training.metrics`
    DIR/checkpoints/    see `rmoe.training.checkpoint`
    DIR/staging/        what is being written
    DIR/model/          the final model
    DIR/result.json     written last: a run with one is finished

Imports no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import socket
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from rmoe.errors import RequestError
from rmoe.places import expand
from rmoe.records import Record, read_record
from rmoe.results.run import RESULT_VERSION, Hardware, InitialLogits, RunResult, Versions

CONFIG_VERSION = 1
CONFIG, LOCK, METRICS, MODEL, RESULT = "config.json", "run.lock", "metrics.jsonl", "model", "result.json"
CHECKPOINTS = "checkpoints"
SECONDS_TO_LOOK = 0.2  # after which whoever holds a run's lock is not only looking
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")

MAY_DIFFER = frozenset(
    {
        "preset",
        "data.path",  # the text's own sha256 is checked
        "data.cache_dir",
        "data.download",
        "training.micro_batch_size",  # with the number of devices: the batch of a step stays what it was
        "training.max_skipped_batches",
        "parallel.fsdp",
        "parallel.expert",
        "parallel.replicate",
        "parallel.tensor",
        "parallel.pipeline",
        "checkpoints.keep",
        "logging.final_blocks",
        "logging.test_blocks",
        "logging.test",
        "logging.report_to",
    }
)
"""Settings that may change when a run is resumed: none decides what is learned."""


class RunRecord(Record, frozen=True, kw_only=True):
    """`config.json`: what was asked for, resolved, and what it ran on.

    Attributes:
        config: the `RunConfig`; equal settings give equal bits on equal hardware.
        router_spec: the router's three stages, spelled out.
        model: the model's own configuration, with sizes that came from the data.
        plugins: plugin -> sha256 of its source.
        data_sha256: identity of the encoded corpus.
        started_in: the working folder, in which relative paths of the configuration were meant.
        initial_logits: their scale before step 0; None for a router without a scorer, or of an earlier release.
    """

    schema_version: int = CONFIG_VERSION
    config: dict[str, Any]
    router_spec: dict[str, Any]
    model: dict[str, Any]
    plugins: dict[str, str]
    data_sha256: str
    versions: Versions
    hardware: Hardware
    started_in: str = ""
    initial_logits: InitialLogits | None = None


def read_run(folder: Path) -> RunRecord:
    """The configuration of the run in a folder.

    Raises:
        RequestError: there is none, or it is not one.
    """
    return read_record(folder / CONFIG, RunRecord, CONFIG_VERSION)


def read_result(folder: Path) -> RunResult:
    """The result of the finished run in a folder.

    Raises:
        RequestError: there is none.
    """
    found = read_record(folder / RESULT, RunResult, RESULT_VERSION)
    # Where it is now, not where it was written.
    return msgspec.structs.replace(found, folder=str(folder), model=str(folder / MODEL))


def checkpoints_of(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything in a run that has a checkpoint's name, whole or not, oldest first."""
    paths = (folder / CHECKPOINTS).glob("checkpoint-*")
    return sorted((int(match[1]), path) for path in paths if (match := _CHECKPOINT.fullmatch(path.name)))


def refuse_other(folder: Path, own: str, leftovers: set[str], allowed: str) -> None:
    """Refuse a folder that has something else in it.

    Args:
        own: the file that tells what it is.
        leftovers: what a kill leaves before that file is there.
        allowed: what the refusal says.

    Raises:
        RequestError: it is a file, or has neither `own` nor only `leftovers` in it.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError("--out", str(folder), "a folder")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if own not in found and found - leftovers:
        raise RequestError("--out", str(folder), allowed)


def refuse_used(folder: Path, first: str = CONFIG) -> None:
    """Refuse to start a new run in a folder that holds anything.

    Args:
        first: the file that is written first. A kill while it is written leaves a part of it, which is no run.

    Raises:
        RequestError: it is a file, or it is not empty.
    """
    if folder.is_dir():
        if any(path.name not in (LOCK, f"{first}.part") for path in folder.iterdir()):
            holds = "another run" if (folder / CONFIG).exists() else "other files"
            raise RequestError(
                "--out",
                str(folder),
                f"a new or empty folder (this one holds {holds}; --resume goes on with a run)",
            )
    elif folder.exists():
        raise RequestError("--out", str(folder), "a folder")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if needed and hold its lock; the lock of a process that was killed is free again.

    Raises:
        RequestError: another process is writing there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RequestError(
            "--out", str(folder), f"a folder that can be written ({error.strerror})"
        ) from error
    try:
        try:
            _take(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise RequestError(
                "--out", str(folder), f"a folder no other run is writing to ({holder} is)"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> None:
    """Take the lock, also from those who only look: `listing.is_locked` holds it for a moment."""
    deadline = time.monotonic() + SECONDS_TO_LOOK
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def fingerprint(record: RunRecord) -> str:
    """What makes two runs the same run: every setting but those of `MAY_DIFFER`, the model, the data."""
    settings = {name: value for name, value in flat(record.config).items() if name not in MAY_DIFFER}
    identity = msgspec.json.encode(
        [settings, record.model, record.plugins, record.data_sha256], order="sorted"
    )
    return hashlib.sha256(identity).hexdigest()


def completed(record: RunRecord) -> RunRecord:
    """A stored record with the defaults of settings and router options that came after it was written.

    Raises:
        RequestError: it has some that are no more.
    """
    from rmoe.routing.spec import RouterSpec
    from rmoe.training.config import RunConfig

    model = record.model
    if "router" in model:
        model = {**model, "router": RouterSpec.from_dict(model["router"]).to_dict()}
    return msgspec.structs.replace(record, config=RunConfig.from_dict(record.config).to_dict(), model=model)


def require_same(folder: Path, record: RunRecord) -> None:
    """Check that what is asked for now is the run that is in the folder.

    The content of text, tokenizer and plugins decides, not where they lie now.

    Raises:
        RequestError: naming the first setting that differs.
    """
    stored, may_differ = completed(read_run(folder)), MAY_DIFFER
    tokenizers = [str(flat(each.config).get("data.tokenizer")) for each in (stored, record)]
    if stored.data_sha256 == record.data_sha256 or len({Path(name).name for name in tokenizers}) == 1:
        may_differ |= {"data.tokenizer"}  # of another place, or it is the hash that has to be said
    parts = ["config", "model", "plugins", "data_sha256"]
    if sorted(stored.plugins.values()) == sorted(record.plugins.values()):
        may_differ |= {"plugin"}
        parts.remove("plugins")
    was, now = (settings_of(each, parts) for each in (stored, record))
    require_equal(was, now, may_differ, f"the run in {folder}")


def settings_of(record: Record, parts: Iterable[str]) -> dict[str, Any]:
    """What a record asks for, flat, part by part; names below `config` have no prefix, others that of their field."""
    prefixes = {part: "" if part == "config" else part for part in parts}
    return {
        name: value
        for part, prefix in prefixes.items()
        for name, value in sorted(flat(getattr(record, part), prefix).items())
    }


def require_equal(
    was: Mapping[str, Any], now: Mapping[str, Any], may_differ: Container[str], where: str
) -> None:
    """Check that two requests are the same, but for the names in `may_differ`.

    Args:
        where: what asked for `was`, for the error.

    Raises:
        RequestError: naming the first difference.
    """
    for name in dict.fromkeys((*was, *now)):
        if was.get(name) != now.get(name) and name not in may_differ:
            raise RequestError(name, now.get(name), f"{was.get(name)!r}, as {where} was started with")


def places_of(path: str, folder: Path, record: RunRecord) -> list[Path]:
    """Where a path of a run's configuration may lead now, most likely first: existing, each once.

    It is tried from this working folder and from that of the run's start; then from each folder above the run's own,
    for a project that moved as a whole.
    """
    folder = folder.resolve()
    given = expand(path, "data.path")
    tails = [given]
    if given.is_absolute():
        tails += [Path(*given.parts[start:]) for start in range(1, len(given.parts))]
    tried = [given, Path(record.started_in) / given]
    tried += [above / tail for above in (folder, *folder.parents) for tail in tails]
    return list({place.resolve(): place for place in reversed(tried) if os.path.exists(place)}.values())[::-1]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names, the way JSON would give them back.

    >>> flat({"data": {"path": None, "words": (1, 2)}})
    {'data.path': None, 'data.words': [1, 2]}
    """
    value = msgspec.to_builtins(value)
    if not isinstance(value, dict):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }
