"""Checkpoints that are damaged in every way we know: each is survived (the one before is used), or refused in a
sentence that names it. ``test_every_damage_is_survived_or_refused`` prints how many were tried and held."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from ergo_rl.errors import ErgoError
from ergo_rl.jobs import resume
from ergo_rl.jobs.checkpoint_manager import STATE, read_state
from ergo_rl.jobs.checkpoint_store import LATEST, MANIFEST, RUN_ID, CheckpointStore
from ergo_rl.jobs.config import CheckpointConfig, TrainConfig
from ergo_rl.jobs.resume import find_resume_point
from ergo_rl.jobs.run_paths import CHECKPOINTS, CONFIG, ENDED
from ergo_rl.jobs.shutdown import Stopped
from tests.backends.memory import Learners, MemoryBackend
from tests.jobs.test_trainer import config, data, fit  # noqa: F401

NEWEST, BEFORE = "step-000004", "step-000002"
DEEP = b"[" * 200_000
Damage = Callable[[Path], None]
"""Gets the folder of the run's checkpoints."""


@pytest.fixture
def run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[TrainConfig, Path]:  # noqa: F811
    """A run that was stopped after step 4 with two checkpoints, the second with groups that wait in its store."""
    config = replace(config, max_staleness=2, checkpoint=CheckpointConfig(every=2))
    update = Learners.update

    async def stops(self: Learners, groups: Any) -> dict[str, float]:
        if self.step == 4:
            raise Stopped(15)
        return await update(self, groups)

    monkeypatch.setattr(Learners, "update", stops)
    with pytest.raises(Stopped):
        fit(config, MemoryBackend())
    folder = Path(config.runs_dir) / config.name
    assert [path.name for path in sorted((folder / CHECKPOINTS).glob("step-*"))] == [BEFORE, NEWEST]
    return config, folder


def outcome(config: TrainConfig, folder: Path, log: str) -> str:  # noqa: F811
    """What became of the run: where it goes on from, or that it is refused in a sentence that names the place."""
    try:
        with (start := find_resume_point(config)).lock:
            if start.checkpoint is None:
                return "nothing"
            state = read_state(start.checkpoint, put=lambda value: value)
            assert state.step == int(start.checkpoint.name.removeprefix("step-"))
            return start.checkpoint.name
    except ErgoError as error:
        message = str(error)
        assert str(folder) in message and len(message) < 4000 and "\n" not in message.strip(), message
        return "refused"


@pytest.mark.hostile("checkpoints")
def test_every_damage_is_survived_or_refused(
    run: tuple[TrainConfig, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    config, folder = run  # noqa: F811
    held, failed = Counter[str](), []
    whole = tmp_path / "whole"
    folder.rename(whole)
    for name, damage, expected in chain(damages(), damages_of_content()):
        if not name.startswith(CONFIG):  # comparing two configurations takes half a second
            monkeypatch.setattr(resume, "_must_fit", lambda *_: None)
        shutil.copytree(whole, folder, symlinks=True)
        caplog.clear()
        damage(folder / CHECKPOINTS)
        try:
            found = outcome(config, folder, caplog.text)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        else:
            if found not in expected:
                failed.append(f"{name}: {found}, not {' or '.join(expected)}")
            elif found == BEFORE and "checkpoint refused: " not in caplog.text:
                failed.append(f"{name}: the newest was passed over and not named")
            held[found] += 1
        shutil.rmtree(folder)
        monkeypatch.undo()
    tried = held.total() + sum(": " in line and "Error" in line for line in failed)
    record_property("tried", tried)
    record_property("held", tried - len(failed))
    with capsys.disabled():
        print(
            f"\ndamaged checkpoints: {tried} tried, {tried - len(failed)} held ({held[BEFORE]} survived by the one "
            f"before, {held['refused']} refused by name, {held[NEWEST]} harmless)"
        )
    assert not failed and tried >= 100, "\n".join(failed)


def damages() -> Iterator[tuple[str, Damage, tuple[str, ...]]]:
    """Name, damage, and what may become of it."""
    for file in ("learner-00000.safetensors", "learner-00001.safetensors", STATE, CONFIG, "groups.arrow",
                 "trajectories.arrow", "views.arrow", "inputs.json", MANIFEST):  # fmt: skip
        for name, change in _OF_A_FILE.items():
            yield f"{file} {name}", _on(f"{NEWEST}/{file}", change), (BEFORE, NEWEST)[: 1 + (file == MANIFEST)]
    for name, content in _MANIFESTS.items():
        yield f"manifest: {name}", _on(f"{NEWEST}/{MANIFEST}", _writes(content)), (BEFORE,)
    for name, cells in _CELLS.items():
        yield f"manifest with {name}", _with_cells(cells), (BEFORE,)
    for name, change in _LATESTS.items():
        yield f"LATEST {name}", _on(LATEST, change), (NEWEST,)
        yield f"run id {name}", _on(RUN_ID, change), (NEWEST,)
        yield f"ended.json {name}", _on(f"../{ENDED}", change), (NEWEST,)
    for name, change in _OF_A_FOLDER.items():
        yield f"folder {name}", _on(NEWEST, change), (BEFORE,)


def damages_of_content() -> Iterator[tuple[str, Damage, tuple[str, ...]]]:
    """As ``damages``: what the manifest agrees with and is still no checkpoint."""
    for name, state in _STATES.items():
        yield f"state: {name}", _consistently(STATE, state), ("refused",)
    for name, content in _CONFIGS.items():
        yield f"{CONFIG} with {name}", _consistently(CONFIG, lambda _, content=content: content), ("refused",)  # type: ignore[misc]
    for seed in range(12):
        for file in ("groups", "trajectories", "views"):
            yield (
                f"{file}.arrow with noise {seed}",
                _consistently(f"{file}.arrow", lambda content, seed=seed: _noise(content, seed)),  # type: ignore[misc]
                ("refused", NEWEST),
            )
    yield (
        "both cut",
        _both_cut,
        ("refused",),
    )
    yield "names that are none", _foreign, (NEWEST,)


# --- kinds of damage ----------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def _link(path: Path) -> None:
    """A link out of the folder, to a file with the right content."""
    outside = path.parent.parent.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path)


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _writes(content: bytes) -> Callable[[Path], None]:
    return lambda path: _put(path, content)


def _emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"x")


def _renamed(path: Path) -> None:
    path.rename(path.with_name("step-000009"))


def _both_cut(store: Path) -> None:
    for step in (NEWEST, BEFORE):
        _truncate(store / step / STATE)


_OF_A_FILE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": _writes(b""),
    "cut": _truncate,
    "one byte longer": lambda path: _put(path, path.read_bytes() + b" "),
    "one bit": _flip,
    "a link to itself": _loop,
    "a folder": _folder,
}
_MANIFESTS = {
    "empty object": b"{}",
    "a list": b"[1]",
    "a text": b'"x"',
    "null": b"null",
    "nested deep": DEEP,
    "nested deep in files": b'{"step": 4, "score": null, "format": 1, "files": ' + DEEP,
    "not UTF-8": b"\xff\xfe{}",
    "half a surrogate": b'{"step": "\\ud800"}',
    "17 MB": b" " * (17 << 20),
    "two objects": b"{}{}",
    "a number of 10,000 digits": b'{"step": ' + b"9" * 10_000 + b"}",
}
_CELLS: dict[str, dict[str, Any]] = {
    "no files": {"files": {}},
    "files as a list": {"files": [["state.json", 1, "00"]]},
    "files as a text": {"files": "state.json"},
    "a file without size": {"files": {"state.json": ["00" * 32]}},
    "a size that is a text": {"files": {"state.json": ["7", "00" * 32]}},
    "a size that is a share": {"files": {"state.json": [7.5, "00" * 32]}},
    "a size below 0": {"files": {"state.json": [-1, "00" * 32]}},
    "a size of true": {"files": {"state.json": [True, "00" * 32]}},
    "a size above all": {"files": {"state.json": [10**30, "00" * 32]}},
    "a digest that is none": {"files": {"state.json": [1, "no"]}},
    "a digest that is a number": {"files": {"state.json": [1, 3]}},
    "a name of 5,000 letters": {"files": {"x" * 5000: [1, "00" * 32]}},
    "a name above": {"files": {"../LATEST": [1, "00" * 32]}},
    "an absolute name": {"files": {"/etc/passwd": [1, "00" * 32]}},
    "an empty name": {"files": {"": [1, "00" * 32]}},
    "a name of dots": {"files": {"..": [1, "00" * 32]}},
    "a name with a null": {"files": {"a\0b": [1, "00" * 32]}},
    "a name with a line break": {"files": {"a\nb": [1, "00" * 32]}},
    "a name with markup": {"files": {"[/red]": [1, "00" * 32]}},
    "itself": {"files": {MANIFEST: [1, "00" * 32]}},
    "a text as score": {"score": "high"},
    "a list as score": {"score": [1]},
    "true as score": {"score": True},
    "no step": {"step": None},
    "a step below 0": {"step": -4},
    "another step": {"step": 5},
    "a step that is a text": {"step": "4"},
    "a step that is a share": {"step": 4.0},
    "an endless step": {"step": 1e400},
    "a newer format": {"format": 2},
    "a format that is a text": {"format": "1"},
    "no format": {"format": None},
    "a run that is a number": {"run": 7},
}
_LATESTS: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(missing_ok=True),
    "empty": _writes(b""),
    "not UTF-8": _writes(b"\xff\xfe\x00"),
    "of 40 MB": _writes(b"x" * 40_000_000),
    "of another folder": _writes(b"../../../etc"),
    "a folder": _folder,
    "a link to itself": _loop,
    "nested deep": _writes(DEEP),
}
_OF_A_FOLDER: dict[str, Callable[[Path], None]] = {
    "empty": _emptied,
    "a link out": _link,
    "a file": _a_file,
    "under another step": _renamed,
}


def _cells_of_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        cells = json.loads(content)
        change(cells)
        return json.dumps(cells).encode()

    return changed


_STATES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "a list": lambda _: b"[]",
    "null": lambda _: b"null",
    "nested deep": lambda _: DEEP,
    "not UTF-8": lambda _: b"\xff",
    "no flow": _cells_of_state(lambda cells: cells.pop("flow")),
    "flow as a text": _cells_of_state(lambda cells: cells.update(flow="x")),
    "a step that is a text": _cells_of_state(lambda cells: cells.update(step="x")),
    "endless rows": _cells_of_state(lambda cells: cells.update(rows=float("inf"))),
    "a cursor of texts": _cells_of_state(lambda cells: cells["flow"].update(cursor={"epoch": "a"})),
    "a cursor with a strange key": _cells_of_state(lambda cells: cells["flow"]["cursor"].update(x=1)),
    "a cursor that is a list": _cells_of_state(lambda cells: cells["flow"].update(cursor=[1])),
    "questions in flight that are none": _cells_of_state(lambda cells: cells["flow"].update(in_flight=[1])),
    "a number twice": _cells_of_state(
        lambda cells: cells["flow"]["in_flight"].append([0, {"epoch": 0, "position": 1}])
    ),
    "counts that are texts": _cells_of_state(lambda cells: cells["flow"].update(next_number="a")),
    "a key of a newer version": _cells_of_state(lambda cells: cells["flow"].update(unheard_of=1)),
    "more numbers than questions": _cells_of_state(lambda cells: cells["flow"].update(started=10**6)),
}
_CONFIGS = {
    "empty": b"",
    "a list": b"- 1",
    "not UTF-8": b"\xff\xfe\xfa",
    "no YAML": b"{[",
    "another seed": b"seed: 7",
    "nested deep": DEEP[:5_000],
    "an interpolation in a circle": b"seed: ${seed}",
    "a tag of Python": b"seed: !!python/object/apply:os.system ['true']",
}


def _on(name: str, change: Callable[[Path], None]) -> Damage:
    return lambda store: change(store / name)


def _with_cells(cells: dict[str, Any]) -> Damage:
    def damage(store: Path) -> None:
        path = store / NEWEST / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **cells}))

    return damage


def _consistently(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Change a file and the manifest with it, in both checkpoints: as if this content had been saved."""

    def damage(store: Path) -> None:
        for step in (NEWEST, BEFORE):
            path, manifest = store / step / name, store / step / MANIFEST
            content = change(path.read_bytes())
            path.write_bytes(content)
            cells = json.loads(manifest.read_bytes())
            cells["files"][name] = [len(content), hashlib.blake2b(content, digest_size=32).hexdigest()]
            manifest.write_text(json.dumps(cells))

    return damage


def _noise(content: bytes, seed: int) -> bytes:
    """Some bytes exchanged, or the end cut off."""
    draw, changed = random.Random(seed), bytearray(content)
    if seed % 4 == 0:
        return bytes(changed[: draw.randrange(len(changed))])
    for _ in range(draw.choice((1, 8, 64))):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _foreign(store: Path) -> None:
    for name in ("step-", "step-abc", "step-99", "step-000009-copy", "step-" + "9" * 100, "step-०००००९", ".old-step-x"):
        (store / name).mkdir()


def test_checkpoint_of_a_newer_version_is_never_removed_or_overwritten(tmp_path: Path, caplog: Any) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        with store.write(step) as writer:
            writer.write("a", b"1")
    path = tmp_path / "step-000020" / MANIFEST
    newer = json.dumps({"format": 2, "parts": "of some other kind"})
    path.write_text(newer)
    newest = store.newest()
    assert newest is not None and newest.name == "step-000010"
    assert "step-000020: format 2, this version reads 1; it is left alone" in caplog.text
    for step in (15, 20, 30, 40):
        with store.write(step) as writer:
            writer.write("a", b"1")
        store.prune(keep=1)
    (aside,) = tmp_path.glob("step-000020.newer-*")
    assert (aside / MANIFEST).read_text() == newer and store.names() == ["step-000040"]


def test_prune_leaves_alone_what_another_run_wrote_and_what_is_no_folder(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    other = CheckpointStore(tmp_path / "other")
    with other.write(5) as writer:
        writer.write("a", b"1")
    shutil.copytree(other.folder / "step-000005", store.folder / "step-000005")
    (store.folder / "step-000006").symlink_to(other.folder / "step-000005")
    (store.folder / "step-000007").write_bytes(b"a file")
    for step in (10, 20):
        with store.write(step) as writer:
            writer.write("a", b"1")
        store.prune(keep=1)
    assert sorted(store.names()) == ["step-000005", "step-000006", "step-000007", "step-000020"]
    assert (other.folder / "step-000005" / "a").exists()
