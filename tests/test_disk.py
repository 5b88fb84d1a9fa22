"""Disks: full, read-only, locked, corrupted, or gone under the process.

Whatever happens: the exit status of the table in README, one sentence that names the right
file, nothing lost that was stored, and the next run goes on once the cause is gone.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

import pipeline
from artefact import wait_for
from conftest import Done, Redpipe, add_posts, count_posts, says, stored
from virtual import VirtualClock

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("app")]

is_root = hasattr(os, "geteuid") and os.geteuid() == 0
needs_root = pytest.mark.skipif(not is_root, reason="only root may mount file systems")


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """Write a file of 10,000 posts, about 2 MB in a database."""
    path = tmp_path / "history.ndjson"
    with path.open("w") as file:
        for n in range(10_000):
            file.write(
                json.dumps({"name": f"t3_p{n:06}", "created_utc": n, "title": "x" * 80}) + "\n"
            )
    return path


# Full


class Mount:
    """A small file system in memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def make(self, size: str) -> None:
        """Mount it, or skip: in some containers even root may not."""
        self.directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.directory]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")

    def again(self, options: str) -> None:
        """Change it while it is in use."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.directory], check=True)

    def end(self) -> None:
        """Unmount it, if it is there."""
        if os.path.ismount(self.directory):
            subprocess.run(["umount", "--lazy", self.directory], check=True)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    mount = Mount(tmp_path / "disk")
    yield mount
    mount.end()


@needs_root
def test_a_full_disk_is_said_and_given_room_the_next_run_goes_on(redpipe, mount, history):
    mount.make("600k")
    database = mount.directory / "posts.db"
    assert says(redpipe(f"--from={history}", database), 74, database, "full")
    kept = stored(database)
    assert 500 <= len(kept) < 10_000
    assert len(kept) % 500 == 0
    mount.again("size=20m")
    assert redpipe(f"--from={history}", database) == (0, "", "")
    assert stored(database) == [f"p{n:06}" for n in range(10_000)]


@needs_root
def test_a_disk_that_fills_up_while_following_ends_it(redpipe, fake_reddit, mount):
    mount.make("1m")
    database = mount.directory / "posts.db"
    first = add_posts(fake_reddit, range(7))
    process = redpipe.start("--interval=1", database, "python")
    wait_for(lambda: count_posts(database) >= 7)
    with suppress(OSError), (mount.directory / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    second = add_posts(fake_reddit, range(7, 700))
    out, err = process.communicate(timeout=20)
    assert says(Done(process.returncode, out, err), 74, database, "full")
    (mount.directory / "filler").unlink()
    kept = stored(database)
    assert kept[:7] == first
    mount.again("size=20m")
    assert redpipe("--once", database, "python") == (0, "", "")
    assert stored(database) == first + second


@needs_root
def test_a_disk_without_room_for_a_new_database_is_said(redpipe, mount, history):
    mount.make("8k")
    database = mount.directory / "posts.db"
    assert says(redpipe(f"--from={history}", database), 74, database, "full")
    mount.again("size=20m")
    assert redpipe(f"--from={history}", database) == (0, "", "")
    assert len(stored(database)) == 10_000


def run_limited(redpipe: Redpipe, kilobytes: int, *arguments: object, **environment: str) -> Done:
    """Run with a limit on the length of files, which acts as a full disk does."""
    limit = (kilobytes * 1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    process = subprocess.Popen(
        [*redpipe.command, *map(str, arguments)],
        cwd=redpipe.directory,
        env={**redpipe.environment, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),  # noqa: PLW1509 (ulimit counts in units that depend on the shell)
    )
    redpipe.started.append(process)
    out, err = process.communicate(timeout=30)
    return Done(process.returncode, out, err)


def test_a_limit_on_files_is_said_and_without_it_the_next_run_goes_on(redpipe, database, history):
    assert says(run_limited(redpipe, 400, f"--from={history}", database), 74, database)
    kept = stored(database)
    assert 500 <= len(kept) < 10_000
    assert len(kept) % 500 == 0
    assert redpipe(f"--from={history}", database) == (0, "", "")
    assert stored(database) == [f"p{n:06}" for n in range(10_000)]


# Read-only


@needs_root
def test_a_read_only_disk_is_said(redpipe, fake_reddit, mount):
    mount.make("4m")
    database = mount.directory / "posts.db"
    first = add_posts(fake_reddit, range(7))
    assert redpipe("--once", database, "python").status == 0
    mount.again("ro")
    assert says(redpipe("--once", database, "python"), 74, database, "read")
    new = mount.directory / "new.db"
    assert says(redpipe("--once", new, "python"), 73, new)
    mount.again("rw")
    second = add_posts(fake_reddit, range(7, 9))
    assert redpipe("--once", database, "python") == (0, "", "")
    assert stored(database) == first + second


def start_of_nobody(redpipe: Redpipe, *arguments: object) -> list[str]:
    """Give the command that runs redpipe without root's rights on a disk."""
    if not is_root:
        return [*redpipe.command, *map(str, arguments)]
    setpriv = shutil.which("setpriv")
    if not setpriv:
        pytest.skip("root may write anything, and there is no setpriv to give that up")
    drop = "--bounding-set=-dac_override,-dac_read_search,-fowner"
    return [setpriv, drop, "--inh-caps=-all", *redpipe.command, *map(str, arguments)]


def run_without_rights(redpipe: Redpipe, *arguments: object) -> Done:
    """Run as a user who is bound by the permissions of files."""
    done = subprocess.run(
        start_of_nobody(redpipe, *arguments),
        cwd=redpipe.directory,
        env=redpipe.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_a_read_only_file_is_said(redpipe, fake_reddit, database):
    ids = add_posts(fake_reddit, range(7))
    assert redpipe("--once", database, "python").status == 0
    database.chmod(0o444)
    assert says(run_without_rights(redpipe, "--once", database, "python"), 74, database, "read")
    database.chmod(0o644)
    assert redpipe("--once", database, "python") == (0, "", "")
    assert stored(database) == ids


def test_a_file_that_may_not_be_read_is_said(redpipe, database):
    database.touch(mode=0o000)
    database.chmod(0o000)
    done = run_without_rights(redpipe, "--once", database, "python")
    assert says(done, 73, database, "ermission")


def test_a_folder_that_may_not_be_written_is_said(redpipe, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    done = run_without_rights(redpipe, "--once", folder / "posts.db", "python")
    assert says(done, 73, folder / "posts.db")
    assert list(folder.iterdir()) == []


# Gone


def test_a_database_deleted_while_running_ends_it(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(7))
    process = redpipe.start("--interval=1", database, "python")
    wait_for(lambda: count_posts(database) >= 7)
    for path in database.parent.glob("posts.db*"):
        path.unlink()
    out, err = process.communicate(timeout=10)
    assert says(Done(process.returncode, out, err), 74, database, "deleted")
    assert not database.exists()


def test_a_database_replaced_while_running_ends_it_and_stays_as_it_is(
    redpipe, fake_reddit, database, tmp_path
):
    ids = add_posts(fake_reddit, range(7))
    assert redpipe("--once", tmp_path / "other.db", "python").status == 0
    other = (tmp_path / "other.db").read_bytes()
    process = redpipe.start("--interval=1", database, "python")
    wait_for(lambda: count_posts(database) >= 7)
    for path in database.parent.glob("posts.db-*"):
        path.unlink()
    (tmp_path / "other.db").replace(database)
    out, err = process.communicate(timeout=10)
    assert says(Done(process.returncode, out, err), 74, database)
    assert database.read_bytes() == other
    assert stored(database) == ids


def test_a_file_deleted_during_an_import_ends_it(redpipe, database):
    process = redpipe.start("--from=-", database)
    feeder = threading.Thread(target=feed, args=(process.stdin,))
    feeder.start()
    process.stdin = None
    wait_for(lambda: count_posts(database) >= 500)
    database.unlink()
    out, err = process.communicate(timeout=10)
    feeder.join(10)
    assert says(Done(process.returncode, out, err), 74, database, "deleted")


def feed(pipe: Any) -> None:
    """Write a post a line until nobody reads any more."""
    with suppress(OSError), pipe:
        for n in range(1_000_000):
            pipe.write(json.dumps({"name": f"t3_p{n:06}"}) + "\n")


# Locked


class Locker:
    """Another program with a write transaction, or with the database to itself."""

    def __init__(self, database: Path, sql: str) -> None:
        self.connection = sqlite3.connect(
            database, isolation_level=None, check_same_thread=False, timeout=5
        )
        self.sql = sql

    def take(self, *request: Any) -> None:
        if not self.connection.in_transaction:
            self.connection.execute(self.sql)

    def release(self) -> None:
        self.connection.execute("ROLLBACK")
        self.connection.close()


@pytest.mark.parametrize("at", ["the start", "the load"])
def test_a_lock_of_some_seconds_is_waited_for(redpipe, fake_reddit, database, at):
    first = add_posts(fake_reddit, range(7))
    assert redpipe("--once", database, "python").status == 0
    second = add_posts(fake_reddit, range(7, 12))
    locker = Locker(database, "BEGIN IMMEDIATE")
    if at == "the start":
        locker.take()
    else:
        fake_reddit.faults = locker.take
    process = redpipe.start("--once", database, "python")
    wait_for(lambda: locker.connection.in_transaction)
    time.sleep(2.5)  # longer than SQLite itself waits
    assert process.poll() is None
    fake_reddit.faults = None
    locker.release()
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "", "")
    assert stored(database) == first + second


class HurriedClock(VirtualClock):
    """A clock on which each sleep takes a virtual minute, so that two minutes are few tries."""

    def sleep(self, seconds: float) -> None:
        super().sleep(60.0)


def test_a_lock_for_ever_is_given_up_after_two_minutes(database):
    clock = HurriedClock()
    with pipeline.Database(str(database), clock=clock) as ours:
        assert pipeline.load(ours, [pipeline.transform({"id": "before"})]) == 1
        locker = Locker(database, "BEGIN IMMEDIATE")
        locker.take()
        began = clock.monotonic()
        with pytest.raises(pipeline.StorageFailed, match=re.escape(str(database))) as failed:
            pipeline.load(ours, [pipeline.transform({"id": "during"})])
        assert failed.value.exit_status == 74
        assert "locked" in str(failed.value)
        assert clock.monotonic() - began == pytest.approx(120)
        locker.release()
        assert pipeline.load(ours, [pipeline.transform({"id": "after"})]) == 1
    assert sorted(stored(database)) == ["after", "before"]


def test_a_reader_in_the_middle_of_a_long_query_disturbs_nothing(redpipe, fake_reddit, database):
    first = add_posts(fake_reddit, range(7))
    assert redpipe("--once", database, "python").status == 0
    with closing(sqlite3.connect(database)) as reader:
        rows = reader.execute("SELECT id FROM posts ORDER BY created_utc")
        next(rows)
        second = add_posts(fake_reddit, range(7, 12))
        assert redpipe("--once", database, "python") == (0, "", "")
        assert [i for (i,) in rows] == first[1:]
    assert stored(database) == first + second


# Corrupted


def overwrite(database: Path, start: int, end: int | None = None) -> None:
    """Fill a part of a file with what cannot be a page."""
    content = bytearray(database.read_bytes())
    end = len(content) if end is None else end
    content[start:end] = b"\xa5" * (end - start)
    database.write_bytes(content)


@pytest.mark.parametrize("damage", ["the middle", "the schema", "the end"])
def test_a_corrupted_database_is_said_and_its_backup_goes_on(
    redpipe, fake_reddit, database, tmp_path, damage
):
    first = add_posts(fake_reddit, range(500))
    assert redpipe("--once", database, "python").status == 0
    backup = shutil.copy(database, tmp_path / "backup.db")
    if damage == "the middle":
        overwrite(database, 4096)
    elif damage == "the schema":
        overwrite(database, 100, 4096)
    else:
        os.truncate(database, 8192)
    second = add_posts(fake_reddit, range(500, 510))
    assert says(redpipe("--once", database, "python"), 74, database)
    for path in tmp_path.glob("posts.db*"):
        path.unlink()
    backup.replace(database)
    assert redpipe("--once", database, "python") == (0, "", "")
    assert stored(database) == first + second


def test_garbage_in_the_place_of_the_wal_does_no_harm(redpipe, fake_reddit, database):
    first = add_posts(fake_reddit, range(7))
    assert redpipe("--once", database, "python").status == 0
    Path(f"{database}-wal").write_bytes(b"\xa5" * 20_000)
    second = add_posts(fake_reddit, range(7, 9))
    assert redpipe("--once", database, "python") == (0, "", "")
    assert stored(database) == first + second


# The temporary directory


def test_a_temporary_directory_without_room_is_said(redpipe, fake_reddit, database):
    ids = add_posts(fake_reddit, range(7))
    done = run_limited(redpipe, 64, "--once", database, "python")
    assert says(done, 74, "temporary directory", redpipe.tmpdir, "TMPDIR")
    assert list(redpipe.tmpdir.iterdir()) == []
    assert redpipe("--once", database, "python") == (0, "", "")
    assert stored(database) == ids


def test_no_writable_temporary_directory_at_all_is_said(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(7))
    done = run_limited(redpipe, 0, "--once", database, "python")
    assert says(done, 74, "temporary directory")
    assert not database.exists() or database.stat().st_size == 0


@needs_root
def test_a_full_temporary_directory_is_said(redpipe, fake_reddit, mount, database):
    ids = add_posts(fake_reddit, range(7))
    mount.make("100k")
    done = redpipe("--once", database, "python", TMPDIR=str(mount.directory))
    assert says(done, 74, "temporary directory", mount.directory, "TMPDIR")
    assert list(mount.directory.iterdir()) == []
    mount.again("size=4m")
    assert redpipe("--once", database, "python", TMPDIR=str(mount.directory)) == (0, "", "")
    assert stored(database) == ids


@needs_root
def test_a_full_temporary_directory_does_not_matter_to_files(redpipe, mount, history, database):
    mount.make("8k")
    done = redpipe(f"--from={history}", database, TMPDIR=str(mount.directory))
    assert done == (0, "", "")
    assert len(stored(database)) == 10_000
