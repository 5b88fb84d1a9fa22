"""Signals, at every stage: the process ends soon, by that signal, and leaves nothing open.

Also what a process may find at its start: signals that are ignored, standard streams that
are closed, and a terminal that goes away.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from artefact import wait_for
from conftest import (
    SOON,
    Done,
    Redpipe,
    add_posts,
    count_posts,
    open_terminal,
    query,
    stored,
    wait_for_end,
)
from fake_reddit import HANG, FakeReddit, error_reply, make_post

pytestmark = [
    pytest.mark.usefixtures("app"),
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals"),
]

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
SLOW_INSERTS = """
CREATE TRIGGER slow BEFORE INSERT ON posts BEGIN SELECT (
    WITH RECURSIVE counted (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < 20000)
    SELECT max(n) FROM counted
); END
"""


def count(database: Path) -> int:
    """Count the posts of a database that must be sound and closed."""
    assert not any(Path(f"{database}{end}").exists() for end in ("-wal", "-shm", "-journal"))
    return len(stored(database))


def left_behind(redpipe: Redpipe) -> list[Path]:
    return list(redpipe.tmpdir.iterdir())


def is_locked(database: Path) -> bool:
    """Tell whether somebody is writing."""
    with closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        return False


def catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Tell whether a process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(mask, 16) >> (number - 1) & 1)


# Stages


@pytest.mark.parametrize("number", SIGNALS)
def test_during_a_request_that_hangs(redpipe, fake_reddit, database, number):
    add_posts(fake_reddit, range(7))
    fake_reddit.script(None, HANG)
    process = redpipe.start("--interval=1", database, "python", "rust")
    wait_for(lambda: len(fake_reddit.requests()) == 2)
    assert redpipe.stop(process, number) == (-number, "", "")
    assert count(database) == 7
    assert left_behind(redpipe) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_during_a_wait_of_minutes_for_the_budget(redpipe, fake_reddit, database, number):
    add_posts(fake_reddit, range(7))
    status, headers, body = error_reply(429, "Too Many Requests")
    fake_reddit.script(None, (status, {**headers, "retry-after": "300"}, body))
    process = redpipe.start("--interval=1", database, "python", "rust")
    wait_for(lambda: len(fake_reddit.requests()) == 2)
    time.sleep(0.1)
    assert redpipe.stop(process, number) == (-number, "", "")
    assert count(database) == 7
    assert left_behind(redpipe) == []


def test_in_the_middle_of_a_walk_back(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(300))
    fake_reddit.script(None, None, HANG)
    process = redpipe.start("--once", database, "python")
    wait_for(lambda: len(fake_reddit.requests()) == 3)
    assert redpipe.stop(process, signal.SIGTERM) == (-signal.SIGTERM, "", "")
    assert count(database) == 0  # a walk that did not finish stores nothing
    assert redpipe("--once", database, "python") == (0, "", "")
    assert count(database) == 300


@pytest.mark.parametrize("number", SIGNALS)
def test_a_transaction_under_way_is_finished(redpipe, fake_reddit, database, number):
    fake_reddit.create("python")
    assert redpipe("--once", database, "python") == (0, "", "")
    query(database, SLOW_INSERTS)
    add_posts(fake_reddit, range(100))
    asked = len(fake_reddit.requests())
    process = redpipe.start("--interval=1", database, "python")
    wait_for(lambda: len(fake_reddit.requests()) > asked)
    wait_for(lambda: is_locked(database))
    assert redpipe.stop(process, number) == (-number, "", "")
    assert count(database) == 100
    assert left_behind(redpipe) == []


class Lock:
    """Somebody else's write transaction."""

    def __init__(self, database: Path) -> None:
        self.connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)

    def take(self) -> None:
        self.connection.execute("BEGIN IMMEDIATE")

    def release(self) -> None:
        """End it, and close the database."""
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")
        self.connection.close()


@pytest.fixture
def lock(redpipe: Redpipe, fake_reddit: FakeReddit, database: Path) -> Iterator[Lock]:
    """Make a database of seven posts, and what can lock it."""
    add_posts(fake_reddit, range(7))
    assert redpipe("--once", database, "python") == (0, "", "")
    lock = Lock(database)
    yield lock
    with suppress(sqlite3.ProgrammingError):
        lock.release()


@pytest.mark.parametrize("number", SIGNALS)
def test_while_another_program_holds_a_lock(redpipe, fake_reddit, database, lock, number):
    def take(*request: Any) -> None:
        if not lock.connection.in_transaction:
            lock.take()

    add_posts(fake_reddit, range(7, 12))
    fake_reddit.faults = take
    asked = len(fake_reddit.requests())
    process = redpipe.start("--interval=1", database, "python")
    wait_for(lambda: len(fake_reddit.requests()) > asked)
    time.sleep(0.5)
    assert redpipe.stop(process, number) == (-number, "", "")
    lock.release()
    assert count(database) == 7  # what waits for a lock is dropped
    assert left_behind(redpipe) == []


def test_while_another_program_holds_a_lock_at_the_start(redpipe, database, lock):
    lock.take()
    process = redpipe.start("--once", database, "python")
    time.sleep(0.8)
    assert redpipe.stop(process, signal.SIGTERM) == (-signal.SIGTERM, "", "")
    lock.release()
    assert count(database) == 7


def random_moments(runs: int) -> list[float]:
    """Choose moments after the start, in seconds, anew in each run of the tests."""
    return [random.uniform(0, 0.3) for _ in range(runs)]


def die_at(redpipe: Redpipe, number: signal.Signals, moment: float, *arguments: object) -> str:
    """Start, send a signal some time later, and tell what was wrong with the end."""
    process = redpipe.start(*arguments)
    # Before its first line there is nothing of ours that could catch SIGINT.
    if number == signal.SIGINT:
        wait_for(lambda: catches(process, signal.SIGTERM))
    time.sleep(moment)
    done = redpipe.stop(process, number)
    left = left_behind(redpipe)
    for path in left:
        path.unlink()
    return "" if done == (-number, "", "") and not left else f"{done} {left}"


def at_random_moments(redpipe: Redpipe, database: Path, runs: int) -> list[tuple[float, str]]:
    """Give the moments at which something went wrong, and what."""
    wrong = []
    for n, moment in enumerate(random_moments(runs)):
        said = die_at(redpipe, SIGNALS[n % 3], moment, "--interval=1", database, "python")
        if said:
            wrong.append((moment, said))
        elif database.exists() and database.stat().st_size:
            count_or_none(database)
    return wrong


def count_or_none(database: Path) -> None:
    """Check that a database is sound, if it has come to having tables."""
    with suppress(sqlite3.OperationalError):
        count(database)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_at_random_moments_of_the_start_when_requests_is_imported(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(7))
    assert at_random_moments(redpipe, database, 18) == []


def test_at_the_moment_when_the_certificates_are_written(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(7))
    for n in range(9):
        process = redpipe.start("--interval=1", database, "python")
        ends = time.monotonic() + 10
        while not left_behind(redpipe) and time.monotonic() < ends:
            pass  # at once, or the moment is over
        assert redpipe.stop(process, SIGNALS[n % 3]) == (-SIGNALS[n % 3], "", "")
        assert left_behind(redpipe) == []


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_at_many_random_moments_of_the_start(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(7))
    assert at_random_moments(redpipe, database, 600) == []


def write_posts(pipe: Any) -> None:
    """Write a post a line until nobody reads any more."""
    with suppress(OSError), pipe:
        for n in range(1_000_000):
            pipe.write(json.dumps(make_post(n)) + "\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_middle_of_a_file(redpipe, database, number):
    process = redpipe.start("--from=-", database)
    writer = threading.Thread(target=write_posts, args=(process.stdin,))
    writer.start()
    process.stdin = None
    wal = Path(f"{database}-wal")
    wait_for(lambda: wal.exists() and wal.stat().st_size > 200_000)
    assert redpipe.stop(process, number) == (-number, "", "")
    writer.join(10)
    assert count(database) >= 500
    assert count(database) % 500 == 0  # whole transactions
    assert left_behind(redpipe) == []


def test_while_a_pipe_gives_nothing(redpipe, database):
    process = redpipe.start("--from=-", database)
    wait_for(lambda: database.exists() and database.stat().st_size > 0)
    time.sleep(0.2)
    assert redpipe.stop(process, signal.SIGINT) == (-signal.SIGINT, "", "")
    assert count(database) == 0


def hammer(process: subprocess.Popen[str], number: signal.Signals) -> Done:
    """Send a signal again and again until the process has ended."""
    ends = time.monotonic() + SOON
    while process.poll() is None and time.monotonic() < ends:
        process.send_signal(number)
        time.sleep(0.00005)
    out, err = process.communicate(timeout=20)
    return Done(process.returncode, out, err)


@pytest.mark.parametrize("number", SIGNALS)
def test_more_signals_do_not_disturb_the_end(redpipe, fake_reddit, database, number):
    add_posts(fake_reddit, range(7))
    for _ in range(5):
        database.unlink(missing_ok=True)
        process = redpipe.start("--interval=1", database, "python")
        wait_for(lambda: count_posts(database))
        assert hammer(process, number) == (-number, "", "")
        assert left_behind(redpipe) == []
        assert count(database) == 7


def test_the_first_of_two_signals_is_the_one_it_dies_of(redpipe, fake_reddit, database):
    fake_reddit.create("python")
    assert redpipe("--once", database, "python") == (0, "", "")
    query(database, SLOW_INSERTS)
    add_posts(fake_reddit, range(100))
    asked = len(fake_reddit.requests())
    process = redpipe.start("--interval=1", database, "python")
    wait_for(lambda: len(fake_reddit.requests()) > asked)
    wait_for(lambda: is_locked(database))
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    assert redpipe.stop(process, signal.SIGTERM) == (-signal.SIGINT, "", "")
    assert count(database) == 100


# Lost: what is raised in a finalizer goes nowhere

LOSE_ONE = """
import os, runpy, signal, sys

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), int(number))
        for _ in range(1000):
            pass

signal.signal(signal.SIGUSR1, lambda *_: Finalized())
_, number, *sys.argv = sys.argv
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_to_lose_one(
    redpipe: Redpipe, number: signal.Signals, *arguments: object
) -> subprocess.Popen[str]:
    """Start what gets a signal in a finalizer when SIGUSR1 comes; it reads from a pipe."""
    python, pyz = redpipe.command
    command = [python, "-c", LOSE_ONE, number.value, pyz, *arguments]
    return redpipe.start_through(*command, stdin=subprocess.PIPE)


@pytest.mark.parametrize("number", SIGNALS)
def test_one_that_is_lost_stops_a_follower_that_sleeps(redpipe, fake_reddit, database, number):
    status, headers, body = error_reply(429, "Too Many Requests")
    fake_reddit.script((status, {**headers, "retry-after": "300"}, body))
    process = start_to_lose_one(redpipe, number, "--interval=1", database, "python")
    wait_for(fake_reddit.requests)
    time.sleep(0.1)
    assert redpipe.stop(process, signal.SIGUSR1) == (-number, "", "")
    assert count(database) == 0
    assert left_behind(redpipe) == []


def test_one_that_is_lost_stops_an_import_that_waits_for_a_pipe(redpipe, database):
    process = start_to_lose_one(redpipe, signal.SIGINT, "--from=-", database)
    wait_for(lambda: database.exists() and database.stat().st_size > 0)
    time.sleep(0.2)
    process.stdin, pipe = None, process.stdin
    assert redpipe.stop(process, signal.SIGUSR1) == (-signal.SIGINT, "", "")
    assert count(database) == 0
    pipe.close()


# Ignored at the start


def goes_on(fake_reddit: FakeReddit) -> None:
    """Wait for one more poll."""
    asked = len(fake_reddit.requests())
    wait_for(lambda: len(fake_reddit.requests()) > asked)


def test_nohup_works(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(7))
    command = [*redpipe.command, "--interval=1", database, "python"]
    process = redpipe.start_through("nohup", *command)
    wait_for(fake_reddit.requests)
    process.send_signal(signal.SIGHUP)
    goes_on(fake_reddit)
    assert redpipe.stop(process, signal.SIGTERM).status == -signal.SIGTERM
    assert count(database) == 7


@pytest.mark.parametrize("ignored", SIGNALS)
def test_what_is_ignored_at_the_start_stays_ignored(redpipe, fake_reddit, database, ignored):
    add_posts(fake_reddit, range(7))
    shell = f"trap '' {ignored.name[3:]}; exec \"$@\""
    command = [*redpipe.command, "--interval=1", database, "python"]
    process = redpipe.start_through("sh", "-c", shell, "sh", *command)
    wait_for(fake_reddit.requests)
    process.send_signal(ignored)
    goes_on(fake_reddit)
    other = signal.SIGTERM if ignored != signal.SIGTERM else signal.SIGINT
    assert redpipe.stop(process, other) == (-other, "", "")
    assert count(database) == 7


# Standard streams


def test_help_into_a_pipe_that_is_closed_early_is_silent(redpipe):
    shell = 'set -o pipefail; "$@" --help | head -1; exit ${PIPESTATUS[0]}'
    process = redpipe.start_through("bash", "-c", shell, "bash", *redpipe.command)
    out, err = process.communicate(timeout=20)
    assert out == "Keep a SQLite database of Reddit's new posts.\n"
    assert err == ""
    assert process.returncode in (0, 128 + signal.SIGPIPE)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_output_that_nobody_reads_ends_in_silence(redpipe, option):
    read, write = os.pipe()
    os.close(read)
    process = redpipe.start_through(*redpipe.command, option, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_lead_messages_into_the_database(
    redpipe, fake_reddit, database, closed
):
    add_posts(fake_reddit, range(7))
    command = [*redpipe.command, "-v", "--once", database, "python"]
    process = redpipe.start_through("sh", "-c", f'exec "$@" {closed}', "sh", *command)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert count(database) == 7
    assert left_behind(redpipe) == []
    assert b"redpipe: " not in database.read_bytes()


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_no_exit_status(redpipe, database, closed):
    for arguments, status in (["--nonsense", 64], [f"--once {database} missing_place", 69]):
        shell = f'exec "$@" {arguments} {closed}'
        process = redpipe.start_through("sh", "-c", shell, "sh", *redpipe.command)
        process.communicate(timeout=20)
        assert process.returncode == status


def full_device() -> int:
    """Open what has no space left, ever."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    return os.open("/dev/full", os.O_WRONLY)


def pipe_without_a_reader() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize("unwritable", [full_device, pipe_without_a_reader])
@pytest.mark.parametrize(("name", "status"), [("python", 0), ("missing_place", 69)])
def test_messages_that_cannot_be_written_change_no_exit_status(
    redpipe, fake_reddit, database, unwritable, name, status
):
    add_posts(fake_reddit, range(7))
    stream = unwritable()
    command = [*redpipe.command, "-v", "--once", database, name]
    process = redpipe.start_through(*command, stderr=stream)
    os.close(stream)
    process.communicate(timeout=20)
    assert process.returncode == status
    assert database.exists() == (status == 0)
    assert status or count(database) == 7


def test_a_reader_of_messages_that_goes_away_stops_nothing(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(7))
    process = redpipe.start("-v", "--interval=1", database, "python")
    wait_for(fake_reddit.requests)
    process.stderr.close()
    process.stdout.close()
    goes_on(fake_reddit)
    process.send_signal(signal.SIGTERM)
    assert wait_for_end(process.pid) < SOON
    assert process.wait() == -signal.SIGTERM
    assert count(database) == 7
    assert left_behind(redpipe) == []


# A terminal that goes away


TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def on_terminal(
    redpipe: Redpipe, *arguments: object, shell: str = 'exec "$@"'
) -> tuple[subprocess.Popen[str], int]:
    """Start redpipe on a terminal of its own; give the process and the terminal."""
    terminal, theirs = open_terminal()
    command = [redpipe.command[0], "-c", TAKE_TERMINAL, "sh", "-c", shell, "sh", *redpipe.command]
    streams = dict.fromkeys(["stdin", "stdout", "stderr"], theirs)
    process = redpipe.start_through(*command, *arguments, start_new_session=True, **streams)
    os.close(theirs)
    return process, terminal


def ended(process: subprocess.Popen[str]) -> int:
    """Give the exit status of a process that ends soon."""
    assert wait_for_end(process.pid) < SOON
    return process.wait()


def drain(terminal: int, until: Callable[[], object]) -> None:
    """Read a terminal, as its window does, until something has happened."""
    os.set_blocking(terminal, False)

    def happened() -> object:
        with suppress(BlockingIOError, OSError):
            os.read(terminal, 65536)
        return until()

    wait_for(happened)


def test_a_terminal_that_goes_away_ends_it_by_sighup(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(7))
    child, terminal = on_terminal(redpipe, "-v", "--interval=1", database, "python")
    drain(terminal, lambda: count_posts(database))
    os.close(terminal)
    assert ended(child) == -signal.SIGHUP
    assert count(database) == 7
    assert left_behind(redpipe) == []


def test_ctrl_c_on_a_terminal_ends_it_by_sigint(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(7))
    child, terminal = on_terminal(redpipe, "--interval=1", database, "python")
    drain(terminal, lambda: count_posts(database))
    os.write(terminal, b"\x03")
    assert ended(child) == -signal.SIGINT
    os.set_blocking(terminal, True)
    shown = b""
    with suppress(OSError):
        while chunk := os.read(terminal, 65536):
            shown += chunk
    os.close(terminal)
    assert shown.endswith(b"\n")
    assert b"Traceback" not in shown
    assert count(database) == 7


def test_without_its_terminal_it_goes_on_where_sighup_is_ignored(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(7))
    shell = "trap '' HUP; exec \"$@\""
    child, terminal = on_terminal(redpipe, "-v", "--interval=1", database, "python", shell=shell)
    drain(terminal, fake_reddit.requests)
    os.close(terminal)
    try:
        goes_on(fake_reddit)
    finally:
        child.terminate()
        status = ended(child)
    assert status == -signal.SIGTERM
    assert count(database) == 7
    assert left_behind(redpipe) == []
