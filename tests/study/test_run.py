"""The run folder: locking, torn lines, foreign versions, a full disk."""

import json
import multiprocessing
import os
import resource
from pathlib import Path

import pytest

from autocomp.errors import RunError
from autocomp.storage import write_atomic
from autocomp.study.run import Manifest, Run, read_manifest

MANIFEST = Manifest("0.1.0", {"model": "zoo:resnet8"}, ["autocomp"], {"torch": "2"}, {"name": "cpu"}, {"weights": "w"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_entries_survive_reopening_in_order(folder: Path) -> None:
    with Run.create(folder, MANIFEST) as run:
        run.record("trial", number=0)
        run.record("wave", role="search")
        run.record("trial", number=1)
    with Run.open(folder) as run:
        assert [entry["number"] for entry in run.entries("trial")] == [0, 1]
        assert len(run.entries("opened")) == 2
    assert read_manifest(folder) == MANIFEST


def test_a_torn_last_line_is_cut_off_and_writing_goes_on(folder: Path) -> None:
    with Run.create(folder, MANIFEST) as run:
        run.record("trial", number=0)
    journal = folder / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"kind": "trial", "numb')
    with Run.open(folder) as run:
        run.record("trial", number=1)
        assert [entry["number"] for entry in run.entries("trial")] == [0, 1]
    assert journal.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_last_line_that_is_whole_but_lacks_its_newline_is_torn_too(folder: Path) -> None:
    with Run.create(folder, MANIFEST) as run:
        run.record("trial", number=0)
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().rstrip(b"\n"))
    with Run.open(folder) as run:
        assert run.entries("trial") == []


def test_damage_in_the_middle_is_refused(folder: Path) -> None:
    with Run.create(folder, MANIFEST) as run:
        run.record("trial", number=0)
    journal = folder / "journal.jsonl"
    journal.write_bytes(b"not json\n" + journal.read_bytes())
    with pytest.raises(RunError, match="damaged at byte 0"):
        Run.open(folder)


@pytest.mark.parametrize("line", ["[]", "{}", '{"kind": "trial"}', "7"])
def test_a_line_that_is_no_entry_is_damage(folder: Path, line: str) -> None:
    with Run.create(folder, MANIFEST) as run:
        run.record("trial", number=0)
    journal = folder / "journal.jsonl"
    journal.write_text(f"{line}\n{journal.read_text()}")
    with pytest.raises(RunError, match="damaged at byte 0"):
        Run.open(folder)


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_a_path_that_no_folder_can_have_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose another folder with --out"):
        Run.create(tmp_path / name, MANIFEST)


def test_seconds_add_up_over_parts(folder: Path) -> None:
    lines = [("opened", 0.0), ("trial", 5.0), ("opened", 0.0), ("trial", 7.5)]
    Run.create(folder, MANIFEST).close()
    (folder / "journal.jsonl").write_text(
        "".join(json.dumps({"kind": kind, "seconds": seconds}) + "\n" for kind, seconds in lines)
    )
    with Run.open(folder) as run:
        assert 12.5 <= run.seconds < 13.5


def _hold(folder: Path, ready: "multiprocessing.synchronize.Event", done: "multiprocessing.synchronize.Event") -> None:
    with Run.open(folder):
        ready.set()
        done.wait(30)


def test_a_second_process_is_refused_until_the_first_is_gone(folder: Path) -> None:
    Run.create(folder, MANIFEST).close()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(folder, ready, done))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(RunError, match="another process"):
        Run.open(folder)
    holder.kill()
    holder.join(30)
    Run.open(folder).close()


def test_an_existing_folder_is_not_overwritten(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match="exists already"):
        Run.create(folder, MANIFEST)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ('{"format": 99, "version": "9.0"}', "format 99.*autocomp 9.0"),
        ('{"format": 1}', "damaged"),
        (json.dumps({**MANIFEST.to_json(), "config": 3}), "damaged.*config"),
    ],
)
def test_foreign_or_damaged_manifests_are_refused(folder: Path, content: str, message: str) -> None:
    Run.create(folder, MANIFEST).close()
    (folder / "manifest.json").write_text(content)
    with pytest.raises(RunError, match=message):
        Run.open(folder)


def test_a_folder_without_manifest_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder"):
        Run.open(tmp_path)


def _fill(folder: Path, outcome: "multiprocessing.queues.SimpleQueue[str]") -> None:
    with Run.open(folder) as run:
        size = (folder / "journal.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
        try:
            run.record("trial", text="x" * 1000)
        except RunError as error:
            outcome.put(str(error))
            os._exit(0)
        outcome.put("written")


def test_a_full_disk_says_so_and_leaves_the_journal_whole(folder: Path) -> None:
    with Run.create(folder, MANIFEST) as run:
        run.record("trial", number=0)
    context = multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    child = context.Process(target=_fill, args=(folder, outcome))
    child.start()
    message = outcome.get()
    child.join(30)
    assert "no space left" in message and "resume" in message
    assert [entry["number"] for entry in Run.entries_of(folder) if entry["kind"] == "trial"] == [0]


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomic(target, "old")

    def refuse(self: Path, other: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
