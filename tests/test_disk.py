"""Disks: full, read-only, locked, corrupted, or gone under the process.

Whatever happens: the exit status of the table in README, one sentence that names the right
file, nothing lost that was stored, and the next run goes on once the cause is gone.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sqlite3
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import pipeline
from artefact import wait_for
from conftest import add_posts, count_posts, finish, says, stored
from virtual import VirtualClock

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("app")]

is_root = hasattr(os, "geteuid") and os.geteuid() == 0
needs_root = pytest.mark.skipif(not is_root, reason="only root may mount file systems")


def history(count=10_000):
    """Yield posts, a line each; ten thousand are about 2 MB in a database."""
    for n in range(count):
        yield f'{{"name": "t3_p{n:06}", "created_utc": {n}, "title": "{"x" * 80}"}}\n'


HISTORY = [f"p{n:06}" for n in range(10_000)]


@pytest.fixture
def import_history(tmp_path):
    """Give the arguments that import the history."""
    (tmp_path / "history.ndjson").write_text("".join(history()))
    return f"--from={tmp_path / 'history.ndjson'}"


@pytest.fixture
def filled(redpipe, fake_reddit, database):
    """Give the ids in a database that was made of r/python."""
    return fill(redpipe, fake_reddit, database)


def fill(redpipe, reddit, database, count=7):
    ids = add_posts(reddit, range(count))
    assert redpipe("--once", database, "python") == (0, "", "")
    return ids


def goes_on(redpipe, reddit, database, ids):
    """Tell whether the next run stores what is new, and all that was there is still there."""
    ids = ids + add_posts(reddit, range(len(ids), len(ids) + 5))
    assert redpipe("--once", database, "python") == (0, "", "")
    return stored(database) == ids


@pytest.fixture
def follow(redpipe, fake_reddit):
    """Give what starts to follow r/python, and is back when seven posts are stored."""

    def start(database):
        ids = add_posts(fake_reddit, range(7))
        process = redpipe.start("--interval=1", database, "python")
        wait_for(lambda: count_posts(database) >= 7)
        return process, ids

    return start


# Full


def remount(directory, options):
    subprocess.run(["mount", "-o", f"remount,{options}", directory], check=True)


@pytest.fixture
def mount(tmp_path):
    """Give what makes a small file system in memory; skip where even root may not."""
    directory = tmp_path / "disk"

    def make(size):
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        return directory

    yield make
    if os.path.ismount(directory):
        subprocess.run(["umount", "--lazy", directory], check=True)


@needs_root
@pytest.mark.parametrize(("size", "least"), [("600k", 500), ("8k", 0)])
def test_a_full_disk_is_said_and_given_room_the_next_run_goes_on(
    size, least, redpipe, mount, import_history
):
    directory = mount(size)
    database = directory / "posts.db"
    assert says(redpipe(import_history, database), 74, database, "full")
    kept = count_posts(database)
    assert least <= kept < 10_000
    assert kept % 500 == 0
    remount(directory, "size=20m")
    assert redpipe(import_history, database) == (0, "", "")
    assert stored(database) == HISTORY


@needs_root
def test_a_disk_that_fills_up_while_following_ends_it(redpipe, fake_reddit, follow, mount):
    directory = mount("1m")
    database = directory / "posts.db"
    process, first = follow(database)
    with suppress(OSError), (directory / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    second = add_posts(fake_reddit, range(7, 700))
    assert says(finish(process), 74, database, "full")
    (directory / "filler").unlink()
    assert stored(database)[:7] == first
    remount(directory, "size=20m")
    assert goes_on(redpipe, fake_reddit, database, first + second)


@pytest.fixture
def run_limited(redpipe):
    """Give what runs with a limit on the length of files, which acts as a full disk does."""

    def run(kilobytes, *arguments):
        limit = (kilobytes * 1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        lower = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)  # noqa: E731 (ulimit counts in units that depend on the shell)
        return finish(redpipe.start_through(*redpipe.command, *arguments, preexec_fn=lower))

    return run


def test_a_limit_on_files_is_said_and_without_it_the_next_run_goes_on(
    redpipe, run_limited, database, import_history
):
    assert says(run_limited(400, import_history, database), 74, database)
    kept = len(stored(database))
    assert 500 <= kept < 10_000
    assert kept % 500 == 0
    assert redpipe(import_history, database) == (0, "", "")
    assert stored(database) == HISTORY


def test_a_temporary_directory_without_room_is_said(redpipe, fake_reddit, run_limited, database):
    done = run_limited(64, "--once", database, "python")
    assert says(done, 74, "temporary directory", redpipe.tmpdir, "TMPDIR")
    assert list(redpipe.tmpdir.iterdir()) == []
    assert says(run_limited(0, "--once", database, "python"), 74, "temporary directory")
    assert not database.exists() or database.stat().st_size == 0
    assert goes_on(redpipe, fake_reddit, database, fill(redpipe, fake_reddit, database))


@needs_root
def test_a_full_temporary_directory_does_not_matter_to_files(
    redpipe, mount, import_history, database
):
    assert redpipe(import_history, database, TMPDIR=str(mount("8k"))) == (0, "", "")
    assert len(stored(database)) == 10_000


# Read-only


@needs_root
def test_a_read_only_disk_is_said(redpipe, fake_reddit, mount):
    directory = mount("4m")
    database, new = directory / "posts.db", directory / "new.db"
    ids = fill(redpipe, fake_reddit, database)
    remount(directory, "ro")
    assert says(redpipe("--once", database, "python"), 74, database, "read")
    assert says(redpipe("--once", new, "python"), 73, new)
    remount(directory, "rw")
    assert goes_on(redpipe, fake_reddit, database, ids)


@pytest.fixture
def run_without_rights(redpipe):
    """Give what runs as a user who is bound by the permissions of files."""
    drop = []
    if is_root:
        setpriv = shutil.which("setpriv")
        if not setpriv:
            pytest.skip("root may write anything, and there is no setpriv to give that up")
        bounds = "--bounding-set=-dac_override,-dac_read_search,-fowner"
        drop = [setpriv, bounds, "--inh-caps=-all"]
    return lambda *arguments: finish(redpipe.start_through(*drop, *redpipe.command, *arguments))


def test_a_read_only_file_is_said(redpipe, fake_reddit, run_without_rights, database, filled):
    database.chmod(0o444)
    assert says(run_without_rights("--once", database, "python"), 74, database, "read")
    database.chmod(0o644)
    assert goes_on(redpipe, fake_reddit, database, filled)


def test_a_file_that_may_not_be_read_is_said(run_without_rights, database):
    database.touch()
    database.chmod(0o000)
    assert says(run_without_rights("--once", database, "python"), 73, database, "ermission")


def test_a_folder_that_may_not_be_written_is_said(run_without_rights, tmp_path):
    database = tmp_path / "closed" / "posts.db"
    database.parent.mkdir(mode=0o555)
    assert says(run_without_rights("--once", database, "python"), 73, database)
    assert list(database.parent.iterdir()) == []


@pytest.mark.parametrize("option", ["--once", "--from=/dev/null", "--status"])
def test_a_current_folder_that_is_deleted_is_said(redpipe, tmp_path, option):
    (tmp_path / "gone").mkdir()
    go = 'cd gone && rmdir ../gone && exec "$@"'
    process = redpipe.start_through("sh", "-c", go, "sh", *redpipe.command, option, "posts.db")
    assert says(finish(process), 73, "posts.db")


# Gone


def test_a_database_deleted_while_running_ends_it(follow, database):
    process, _ = follow(database)
    for path in database.parent.glob("posts.db*"):
        path.unlink()
    assert says(finish(process), 74, database, "deleted")
    assert not database.exists()


def test_a_database_replaced_while_running_ends_it_and_stays_as_it_is(
    redpipe, fake_reddit, follow, database, tmp_path
):
    other = tmp_path / "other.db"
    ids = fill(redpipe, fake_reddit, other)
    content = other.read_bytes()
    process, _ = follow(database)
    for path in database.parent.glob("posts.db-*"):
        path.unlink()
    other.replace(database)
    assert says(finish(process), 74, database)
    assert database.read_bytes() == content
    assert stored(database) == ids


def test_a_file_deleted_during_an_import_ends_it(redpipe, database):
    def feed(pipe):
        with suppress(OSError), pipe:
            pipe.writelines(history(1_000_000))

    process = redpipe.start("--from=-", database)
    feeder = threading.Thread(target=feed, args=(process.stdin,))
    feeder.start()
    process.stdin = None
    wait_for(lambda: count_posts(database) >= 500)
    database.unlink()
    done = finish(process)
    feeder.join(10)
    assert says(done, 74, database, "deleted")


# Locked


@pytest.fixture
def other_program(database):
    """Connect to the database without redpipe."""
    sqlite3.connect(database).close()
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False, timeout=5)
    yield connection
    connection.close()


@pytest.mark.parametrize("at", ["the start", "the load"])
def test_a_lock_of_some_seconds_is_waited_for(
    redpipe, fake_reddit, database, filled, other_program, at
):
    def lock(*request):
        if not other_program.in_transaction:
            other_program.execute("BEGIN IMMEDIATE")

    ids = filled + add_posts(fake_reddit, range(7, 12))
    if at == "the start":
        lock()
    else:
        fake_reddit.faults = lock
    process = redpipe.start("--once", database, "python")
    wait_for(lambda: other_program.in_transaction)
    time.sleep(2.5)  # longer than SQLite itself waits
    assert process.poll() is None
    fake_reddit.faults = None
    other_program.execute("ROLLBACK")
    assert finish(process) == (0, "", "")
    assert stored(database) == ids


class HurriedClock(VirtualClock):
    """A clock on which each sleep takes a virtual minute, so that two minutes are few tries."""

    def sleep(self, seconds: float) -> None:
        super().sleep(60.0)


def test_a_lock_for_ever_is_given_up_after_two_minutes(database, other_program):
    clock = HurriedClock()
    with pipeline.Database(str(database), clock=clock) as ours:
        assert pipeline.load(ours, [pipeline.transform({"id": "before"})]) == 1
        other_program.execute("BEGIN IMMEDIATE")
        began = clock.monotonic()
        sentence = f"{re.escape(str(database))}.*locked"
        with pytest.raises(pipeline.StorageFailed, match=sentence) as failed:
            pipeline.load(ours, [pipeline.transform({"id": "during"})])
        assert failed.value.exit_status == 74
        assert clock.monotonic() - began == pytest.approx(120)
        other_program.execute("ROLLBACK")
        assert pipeline.load(ours, [pipeline.transform({"id": "after"})]) == 1
    assert sorted(stored(database)) == ["after", "before"]


# Corrupted


def overwrite(path, start, end):
    """Fill a part of a file with what cannot be a page."""
    content = path.read_bytes()
    path.write_bytes(content[:start] + b"\xa5" * (end - start) + content[end:])


DAMAGES = {
    "the middle": lambda path: overwrite(path, 4096, path.stat().st_size),
    "the schema": lambda path: overwrite(path, 100, 4096),
    "the end": lambda path: os.truncate(path, 8192),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_corrupted_database_is_said_and_its_backup_goes_on(
    redpipe, fake_reddit, database, tmp_path, damage
):
    ids = fill(redpipe, fake_reddit, database, 500)
    backup = shutil.copy(database, tmp_path / "backup.db")
    damage(database)
    ids += add_posts(fake_reddit, range(500, 510))
    assert says(redpipe("--once", database, "python"), 74, database)
    for path in tmp_path.glob("posts.db*"):
        path.unlink()
    backup.replace(database)
    assert goes_on(redpipe, fake_reddit, database, ids)


def test_garbage_in_the_place_of_the_wal_does_no_harm(redpipe, fake_reddit, database, filled):
    Path(f"{database}-wal").write_bytes(b"\xa5" * 20_000)
    assert goes_on(redpipe, fake_reddit, database, filled)
