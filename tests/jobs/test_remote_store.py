"""Copies behind ``checkpoint.url``: two lives of one run, two runs of one name, a storage that is away.

On folders (``file://``) and memory (``memory://``); and on a real S3 endpoint (moto's server, s3fs) where both are
installed (``pip install s3fs 'moto[server]'``)."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ergo_rl.jobs import lease, remote_store, storage
from ergo_rl.jobs.checkpoint_store import (
    LATEST,
    MANIFEST,
    RUN_ID,
    CheckpointStore,
    read_manifest,
)
from ergo_rl.jobs.config import CheckpointConfig, ConfigError, TrainConfig, config_yaml, load_config
from ergo_rl.jobs.lease import Lease, RunInUse, RunTakenOver
from ergo_rl.jobs.remote_store import BackgroundCopies, RemoteRuns, RemoteStore
from ergo_rl.jobs.resume import ResumePoint, find_resume_point
from ergo_rl.jobs.run_paths import CONFIG, ENDED, step_folder
from ergo_rl.jobs.storage import Storage, patiently
from tests.conftest import ROOT
from tests.jobs.test_checkpoint_store import fill, step_in


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE_S", 0.3), ("RENEW_S", 0.05), ("SETTLE_S", 0.0)):
        monkeypatch.setattr(lease, name, seconds)
    for module in (storage, remote_store):
        monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket of a real S3 server on this machine."""
    if not (importlib.util.find_spec("s3fs") and importlib.util.find_spec("moto")):
        pytest.skip("needs s3fs and moto: pip install s3fs 'moto[server]'")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    import fsspec

    fsspec.filesystem("s3").mkdir("ergo")
    yield "s3://ergo"
    server.stop()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return f"file://{tmp_path / 'bucket'}" if request.param == "file" else f"memory://{tmp_path.name}"


@pytest.fixture
def machine(url: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    """The configuration of the run ``x`` on a machine of some name."""

    def make(machine: str, **values: Any) -> TrainConfig:
        checkpoint = CheckpointConfig(url=url, outage_deadline_s=5)
        return replace(recipe(), runs_dir=str(tmp_path / machine), checkpoint=checkpoint, **values)

    return make


@cache
def recipe() -> TrainConfig:
    steps = ["name=x", "total_steps=200", "learner.optimizer.total_steps=200"]
    return load_config(ROOT / "configs" / "panels.yaml", steps)


@cache
def recipe_text() -> bytes:
    return config_yaml(recipe()).encode()


def save(start: ResumePoint, config: TrainConfig, step: int) -> None:
    """As a run does it, without learners."""
    assert start.remote is not None
    with start.store.write(step) as writer:
        writer.write(CONFIG, recipe_text())
        fill(writer, step % 256)
    stay = start.store.prune(config.checkpoint.keep)
    start.remote.upload(start.store.folder / step_folder(step))
    start.remote.prune(stay)


def copies(url: str, name: str = "x") -> list[str]:
    return sorted(RemoteStore(f"{url}/{name}").names())


@pytest.mark.parametrize(
    ("last", "values", "folder", "checkpoint"),
    [
        (200, {}, "x-2", None),
        (150, {}, "x", "step-000150"),
        (150, {"resume": "never"}, "x-2", None),
    ],
    ids=["finished", "unfinished", "never"],
)
def test_second_machine_never_touches_what_another_life_saved(
    machine: Any, url: str, last: int, values: dict[str, str], folder: str, checkpoint: str | None
) -> None:
    first = machine("A")
    with (start := find_resume_point(first)).lock:
        for step in (50, 100, last):
            save(start, first, step)
    before = copies(url)
    second = machine("B", **values)
    with (again := find_resume_point(second)).lock:
        assert again.folder.name == folder and (again.checkpoint and again.checkpoint.name) == checkpoint
        save(again, second, 25 if checkpoint is None else 175)
    assert set(before) - set(copies(url)) == ({"step-000100"} if folder == "x" else set()), "keep=2, of one run"


def test_machine_with_a_stale_folder_resumes_from_the_newer_copy(machine: Any, url: str, tmp_path: Path) -> None:
    """B begins, A goes on from the URL to step 150, B comes back with its folder of step 25."""
    stale, other = machine("B"), machine("A")
    with (start := find_resume_point(stale)).lock:
        save(start, stale, 25)
    with (start := find_resume_point(other)).lock:
        assert start.checkpoint is not None and start.checkpoint.name == "step-000025"
        for step in (100, 150):
            save(start, other, step)
    with (start := find_resume_point(stale)).lock:
        assert start.folder == tmp_path / "B" / "x" and start.checkpoint == start.store.folder / "step-000150"
        save(start, stale, 175)
    assert copies(url) == ["step-000150", "step-000175"]


def test_folder_that_is_newer_than_the_copies_is_resumed(machine: Any) -> None:
    config = machine("A")
    with (start := find_resume_point(config)).lock:
        save(start, config, 50)
        with start.store.write(75) as writer:  # its copy was not made: the storage was away
            writer.write(CONFIG, recipe_text())
            fill(writer, 75)
    with (start := find_resume_point(config)).lock:
        assert start.checkpoint is not None and start.checkpoint.name == "step-000075"


def test_damaged_copy_costs_only_what_is_newer_than_the_folder(machine: Any, url: str) -> None:
    config = machine("A")
    with (start := find_resume_point(config)).lock:
        save(start, config, 50)
    with (start := find_resume_point(machine("B"))).lock:
        save(start, config, 75)
    Storage.open(url).below("x", "step-000075").write("state.json", b"?")
    with (start := find_resume_point(config)).lock:
        assert start.checkpoint is not None and start.checkpoint.name == "step-000050"


def test_run_marked_as_done_is_left_alone_whatever_its_steps(machine: Any, url: str) -> None:
    config = machine("A")
    with (start := find_resume_point(config)).lock:
        save(start, config, 50)
        assert start.remote is not None
        start.remote.mark_ended(b'{"done": true, "why": ""}')
    with (start := find_resume_point(machine("B"))).lock:
        assert start.folder.name == "x-2"


def test_two_runs_of_one_name_are_refused_by_both_places(machine: Any, tmp_path: Path) -> None:
    config = machine("A")
    with (start := find_resume_point(config)).lock:
        save(start, config, 50)
    stranger = CheckpointStore(tmp_path / "B" / "x" / "checkpoints")
    with stranger.write(75) as writer:
        fill(writer, 75)
    with pytest.raises(ConfigError, match=r"B/x \(\w{8}\) and .*/x \(\w{8}\) are two different runs of one name"):
        find_resume_point(machine("B"))


# --- the owner record ---------------------------------------------------------------------------------------------


def test_second_living_writer_is_refused_by_name(machine: Any, url: str, tmp_path: Path) -> None:
    first = machine("A")
    with (start := find_resume_point(first)).lock:
        save(start, first, 50)
        with pytest.raises(
            RunInUse, match=rf"{url}/x is written by process {os.getpid()} on .* since 20.*resume=never"
        ):
            find_resume_point(machine("B"))
        assert not (tmp_path / "B" / "x").exists(), "the name stays free"
        with (beside := find_resume_point(machine("C", resume="never"))).lock:
            assert beside.folder.name == "x-2"
        save(start, first, 75)
    with (after := find_resume_point(machine("B"))).lock:
        assert after.checkpoint is not None and after.checkpoint.name == "step-000075"


def record(storage: Storage, **cells: object) -> None:
    found = json.loads(storage.read(lease.OWNER) or b"{}")
    storage.write(lease.OWNER, json.dumps({**found, **cells}).encode())


def test_owner_elsewhere_is_taken_over_after_its_lease_and_must_not_write_again(machine: Any, url: str) -> None:
    """The record of another machine is watched: no clock is compared. The first, which was only away, is told."""
    first = machine("A")
    with (start := find_resume_point(first)).lock:
        save(start, first, 50)
        assert start.remote is not None and start.remote.lease is not None
        start.remote.lease._released.set()  # its renewals do not get through
        start.remote.lease._thread.join()
        record(Storage.open(url).below("x"), machine="another", host="far-away")
        since = time.monotonic()
        with (second := find_resume_point(machine("B"))).lock:
            assert time.monotonic() - since >= 0.3 and second.checkpoint is not None
            with pytest.raises(RunTakenOver, match=r"is written by process .* must not write there"):
                save(start, first, 75)
            with pytest.raises(RunTakenOver):
                start.remote.prune([])
            save(second, machine("B"), 60)
    assert copies(url) == ["step-000050", "step-000060"]


def test_owner_elsewhere_that_renews_its_record_is_alive(machine: Any, url: str) -> None:
    with (start := find_resume_point(machine("A"))).lock:
        assert start.remote is not None and start.remote.lease is not None
        start.remote.lease._record["machine"] = "another"
        time.sleep(0.2)
        with pytest.raises(RunInUse, match="which is alive"):
            find_resume_point(machine("B"))


def test_owner_whose_process_has_ended_here_is_followed_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1000.0)
    place = Storage.open(url).below("x")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    about = lease._about_this_process() | {"pid": child.pid, "started": lease._started(child.pid), "life": "child"}
    record(place, **about)
    with pytest.raises(RunInUse, match=f"process {child.pid} on"):
        Lease.acquire(place)
    child.communicate(b"\n")
    Lease.acquire(place).release()
    assert place.names() == [], "a run that ends leaves no record"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"pid": [], "machine": 3}', b"[" * 100_000])
def test_owner_record_that_is_none_lapses_like_another(url: str, content: bytes) -> None:
    place = Storage.open(url).below("x")
    place.write(lease.OWNER, content)
    Lease.acquire(place).release()


# --- names and protocols ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x[1]", "x*", "a b ü"])
def test_names_with_glob_signs_are_names(machine: Any, url: str, name: str) -> None:
    first = machine("A", name=name)
    with (start := find_resume_point(first)).lock:
        for step in (10, 20, 30):
            save(start, first, step)
    assert copies(url, name) == ["step-000020", "step-000030"]
    with (start := find_resume_point(machine("B", name=name))).lock:
        assert start.checkpoint is not None and step_in(start.checkpoint) == 30


def test_foreign_folders_and_copies_are_left_alone(machine: Any, url: str) -> None:
    config, place = machine("A"), Storage.open(url).below("x")
    with (start := find_resume_point(config)).lock:
        for step in (10, 20):
            save(start, config, step)
        for folder in ("step-mine", "step-000005-old", "notes"):
            place.below(folder).write("kept", b"1")
        theirs = json.loads(place.below("step-000010").read(MANIFEST) or b"")
        place.below("step-000005").write(MANIFEST, json.dumps({**theirs, "step": 5, "run": "another"}).encode())
        place.below("step-000007").write(MANIFEST, json.dumps({**theirs, "step": 7, "format": 9}).encode())
        place.below("step-000004").write(MANIFEST, b"{")
        place.below("step-000003").write(RUN_ID, start.store.run_id.encode())  # ours, cut off
        for step in (30, 40):
            save(start, config, step)
    names = set(place.names()) - {LATEST}
    assert names == {"step-mine", "step-000005-old", "notes", "step-000005", "step-000007", "step-000004",
                     "step-000030", "step-000040"}  # fmt: skip


def test_copy_of_another_run_or_a_newer_version_is_not_replaced(machine: Any, url: str) -> None:
    config, place = machine("A"), Storage.open(url).below("x")
    with (start := find_resume_point(config)).lock:
        save(start, config, 10)
        mine = json.loads(place.below("step-000010").read(MANIFEST) or b"")
        newer = json.dumps({**mine, "step": 20, "format": 9}).encode()
        place.below("step-000020").write(MANIFEST, newer)
        save(start, config, 20)
        assert place.below("step-000020").read(MANIFEST) == newer
        place.below("step-000030").write(MANIFEST, json.dumps({**mine, "step": 30, "run": "another"}).encode())
        with pytest.raises(RunTakenOver, match="written by another run"):
            save(start, config, 30)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://bucket", "checkpoint.url: nothing://bucket cannot be opened: .*Protocol not known"),
        ("gs://bucket/x", "gs://bucket/x cannot be opened: ImportError.*gcsfs.*gcsfs for gs://"),
        ("abfs://runs@account.dfs.core.windows.net/x", "cannot be opened: ImportError.*adlfs"),
    ],
)
def test_missing_package_is_said_in_a_sentence(url: str, message: str) -> None:
    if importlib.util.find_spec({"gs": "gcsfs", "ab": "adlfs"}.get(url[:2], "no_such_package")):
        pytest.skip("the package is here")
    with pytest.raises(ConfigError, match=message):
        RemoteRuns(CheckpointConfig(url=url))


@pytest.mark.parametrize(
    ("url", "taken"),
    [
        ("abfs://runs@account.dfs.core.windows.net/x", True),
        ("abfss://runs@account.dfs.core.windows.net", True),
        ("s3://bucket/a@b", True),
        ("folder/with?mark", True),
        ("s3://key:secret@bucket/runs", False),
        ("s3://user@bucket", False),
        ("abfs://runs:secret@account.dfs.core.windows.net/x", False),
        ("abfs://runs@account.dfs.core.windows.net/x?sig=abc", False),
        ("https://host/x?X-Amz-Signature=abc", False),
    ],
)
def test_url_with_a_secret_is_refused_and_azures_own_form_is_none(url: str, taken: bool) -> None:
    if taken:
        assert CheckpointConfig(url=url).url == url
    else:
        with pytest.raises(ValueError, match="holds a user or password, or a signature"):
            CheckpointConfig(url=url)


def test_url_that_cannot_be_written_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"checkpoint\.url: cannot write to file://.*file/run"):
        RemoteRuns(CheckpointConfig(url=f"file://{tmp_path / 'file'}/run"))


# --- a storage that is away ---------------------------------------------------------------------------------------


class Away:
    """Makes a storage's writes fail while ``on``, as a lost network does; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.on, self.refused = True, 0
        for name in ("upload", "write"):
            monkeypatch.setattr(Storage, name, self._failing(getattr(Storage, name), error))

    def _failing(self, work: Callable[..., None], error: Exception) -> Callable[..., None]:
        def attempt(*arguments: Any) -> None:
            if self.on:
                self.refused += 1
                raise error
            work(*arguments)

        return attempt


@pytest.fixture
def saved(tmp_path: Path) -> CheckpointStore:
    here = CheckpointStore(tmp_path / "here")
    for step in (10, 25):
        with here.write(step) as writer:
            fill(writer, step)
    return here


def test_copies_wait_for_a_storage_that_is_away_and_training_goes_on(
    saved: CheckpointStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, said = Away(monkeypatch, ConnectionError("no route to host")), list[str]()
    background = BackgroundCopies(RemoteStore(f"{url}/x"), saved, 60.0, said.append)
    background.copy("step-000010", [])
    while away.refused < 3:
        background.check()  # what a step asks: the run goes on
        time.sleep(0.005)
    assert background.busy == ["step-000010"], "it must not be pruned meanwhile"
    background.copy("step-000025", [])  # the newest one replaces the one that waits
    away.on = False
    asyncio.run(background.finish(10))
    background.close()
    assert copies(url) == ["step-000025"] and not background.busy
    assert "step-000010 cannot be written to" in said[0] and "ConnectionError: no route to host" in said[0]
    assert "trying again for another 60 s" in said[0] and "answers again after" in said[-1]


def test_outage_beyond_the_deadline_is_an_error_that_names_the_key(
    saved: CheckpointStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Away(monkeypatch, TimeoutError("timed out"))
    background = BackgroundCopies(RemoteStore(f"{url}/x"), saved, 0.05, lambda _: None)
    background.copy("step-000025", [])
    with pytest.raises(OSError, match=r"nothing could be written to .* for 0 s \(checkpoint\.outage_deadline_s\)"):
        asyncio.run(background.finish())
    background.close()


def test_run_that_is_stopped_waits_a_moment_for_its_copies_and_no_longer(
    saved: CheckpointStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Away(monkeypatch, ConnectionError("reset"))
    background = BackgroundCopies(RemoteStore(f"{url}/x"), saved, 60.0, lambda _: None)
    background.copy("step-000025", [])
    with pytest.raises(TimeoutError, match=r"step-000025 is not at .*/x yet; the next start copies it"):
        asyncio.run(background.finish(patience_s=0.1))
    background.close()


def test_start_waits_for_a_storage_that_is_away(machine: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    away, calls = Away(monkeypatch, ConnectionError("no route to host")), [0]

    def pause(_: float) -> None:
        calls[0] += 1
        away.on = calls[0] < 4

    monkeypatch.setattr(storage.time, "sleep", pause)
    find_resume_point(machine("A")).lock.close()
    assert calls[0] >= 4 and "cannot write to" in caplog.text and "trying again for another 5 s" in caplog.text


@pytest.mark.parametrize("error", [PermissionError("403"), FileNotFoundError("no such bucket")])
def test_waiting_ends_where_it_is_vain(error: Exception) -> None:
    def refused() -> None:
        raise error

    with pytest.raises(OSError, match=r"checkpoint\.url: cannot write: "):
        patiently(refused, "write", 3600)


def test_interrupted_upload_is_no_copy_and_is_finished_or_removed(
    saved: CheckpointStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every one of its writes: the copy before it stays, and the next life tidies up."""
    for at in range(20):
        remote = RemoteStore(f"{url}/cut-{at}")
        remote.upload(saved.folder / "step-000010")
        count, write, upload = [0], Storage.write, Storage.upload

        def cut(work: Callable[..., None], *arguments: Any, at: int = at, count: list[int] = count) -> None:
            count[0] += 1
            if count[0] > at:
                raise ConnectionError("cut")
            work(*arguments)

        monkeypatch.setattr(Storage, "write", lambda *a, w=write: cut(w, *a))
        monkeypatch.setattr(Storage, "upload", lambda *a, w=upload: cut(w, *a))
        whole = True
        try:
            remote.upload(saved.folder / "step-000025")
        except ConnectionError:
            whole = False
        monkeypatch.setattr(Storage, "write", write)
        monkeypatch.setattr(Storage, "upload", upload)
        assert "step-000010" in remote.names()
        remote.upload(saved.folder / "step-000025")
        remote.prune(["step-000025"])
        assert remote.names() == ["step-000025"]
        if whole:
            assert at >= 4
            break


def test_download_gives_back_the_newest_intact_copy(saved: CheckpointStore, url: str, tmp_path: Path) -> None:
    remote = RemoteStore(f"{url}/run")
    for step in (10, 25):
        remote.upload(saved.folder / step_folder(step))
    assert remote.names() == ["step-000025", "step-000010"]
    there = CheckpointStore(tmp_path / "there")
    fetched = remote.download(there)
    assert fetched is not None and step_in(fetched) == 25 and there.latest == "step-000025"
    assert read_manifest(fetched).run == there.run_id != saved.run_id, "a branch is a run of its own"
    assert {path.name for path in there.folder.iterdir()} == {LATEST, RUN_ID, "step-000025"}
    adopted = CheckpointStore(tmp_path / "adopted")
    assert remote.download(adopted, adopt=True) and adopted.run_id == saved.run_id
    Storage.open(url).below("run", "step-000025").remove("state.json")
    fetched = remote.download(CheckpointStore(tmp_path / "third"))
    assert fetched is not None and step_in(fetched) == 10
    Storage.open(url).below("run", "step-000025").remove(MANIFEST)
    assert remote.names() == ["step-000010"] and remote.download(there, above=10) is None


def test_ended_json_that_cannot_be_read_at_the_url_is_survived(url: str) -> None:
    place = Storage.open(url).below("x")
    for content in (b"", b"\xff", b"[]", b'{"done": "yes"}', b"[" * 100_000):
        place.write(ENDED, content)
        assert not RemoteStore(f"{url}/x").is_done()
