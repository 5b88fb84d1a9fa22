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
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from test_cli import Terminal

from artefact import wait_for
from conftest import (
    SOON,
    Done,
    Redpipe,
    add_posts,
    count_posts,
    query,
    stored,
    wait_for_end,
)
from fake_reddit import HANG, FakeReddit, error_reply, make_post
from pipeline import Database

pytestmark = [
    pytest.mark.usefixtures("app"),
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals"),
]

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
FOLLOW = ("--interval=1", "posts.db", "python")
SLOW_INSERTS = """
CREATE TRIGGER slow BEFORE INSERT ON posts BEGIN SELECT (
    WITH RECURSIVE counted (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < 10000)
    SELECT max(n) FROM counted
); END
"""


def left_by(redpipe: Redpipe) -> int:
    """Count the posts that a run left, in a sound and closed database; nothing else is left."""
    assert list(redpipe.tmpdir.iterdir()) == []
    assert [path.name for path in redpipe.directory.glob("posts.db*")] == ["posts.db"]
    return len(stored(redpipe.directory / "posts.db"))


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


STATUS, HEADERS, BODY = error_reply(429, "Too Many Requests")
WAIT = STATUS, {**HEADERS, "retry-after": "300"}, BODY


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("answer", [HANG, WAIT], ids=["a hang", "a wait for the budget"])
def test_during_a_request_that_hangs_and_a_wait_of_minutes(redpipe, fake_reddit, answer, number):
    add_posts(fake_reddit, range(7))
    fake_reddit.script(None, answer)
    process = redpipe.start(*FOLLOW, "rust")
    wait_for(lambda: len(fake_reddit.requests()) == 2)
    time.sleep(0.1)
    assert redpipe.stop(process, number) == (-number, "", "")
    assert left_by(redpipe) == 7


def test_in_the_middle_of_a_walk_back(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(300))
    fake_reddit.script(None, None, HANG)
    process = redpipe.start("--once", database, "python")
    wait_for(lambda: len(fake_reddit.requests()) == 3)
    assert redpipe.stop(process, signal.SIGTERM) == (-signal.SIGTERM, "", "")
    assert left_by(redpipe) == 0  # a walk that did not finish stores nothing
    assert redpipe("--once", database, "python") == (0, "", "")
    assert left_by(redpipe) == 300


def start_and_write(
    redpipe: Redpipe, fake_reddit: FakeReddit, database: Path
) -> subprocess.Popen[str]:
    """Start a follower that is in the middle of a transaction."""
    fake_reddit.create("python")
    assert redpipe("--once", database, "python") == (0, "", "")
    query(database, SLOW_INSERTS)
    add_posts(fake_reddit, range(100))
    asked = len(fake_reddit.requests())
    process = redpipe.start(*FOLLOW)
    wait_for(lambda: len(fake_reddit.requests()) > asked)
    wait_for(lambda: is_locked(database))
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_transaction_under_way_is_finished(redpipe, fake_reddit, database, number):
    process = start_and_write(redpipe, fake_reddit, database)
    assert redpipe.stop(process, number) == (-number, "", "")
    assert left_by(redpipe) == 100


def test_the_first_of_two_signals_is_the_one_it_dies_of(redpipe, fake_reddit, database):
    process = start_and_write(redpipe, fake_reddit, database)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    assert redpipe.stop(process, signal.SIGTERM) == (-signal.SIGINT, "", "")
    assert left_by(redpipe) == 100


@pytest.fixture
def other(
    redpipe: Redpipe, fake_reddit: FakeReddit, database: Path
) -> Iterator[sqlite3.Connection]:
    """Make a database of seven posts that another program has open, and may lock."""
    add_posts(fake_reddit, range(7))
    assert redpipe("--once", database, "python") == (0, "", "")
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    with closing(connection):
        yield connection


@pytest.mark.parametrize("number", SIGNALS)
def test_while_another_program_holds_a_lock(redpipe, fake_reddit, other, number):
    def lock(*request: Any) -> None:
        if not other.in_transaction:
            other.execute("BEGIN IMMEDIATE")

    add_posts(fake_reddit, range(7, 12))
    fake_reddit.faults = lock
    asked = len(fake_reddit.requests())
    process = redpipe.start(*FOLLOW)
    wait_for(lambda: len(fake_reddit.requests()) > asked)
    time.sleep(0.5)
    assert redpipe.stop(process, number) == (-number, "", "")
    other.close()
    assert left_by(redpipe) == 7  # what waits for a lock is dropped


def test_while_another_program_holds_a_lock_at_the_start(redpipe, database, other):
    other.execute("BEGIN IMMEDIATE")
    process = redpipe.start("--once", database, "python")
    time.sleep(0.8)
    assert redpipe.stop(process, signal.SIGTERM) == (-signal.SIGTERM, "", "")
    other.close()
    assert left_by(redpipe) == 7


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "runs", [18, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(600)])]
)
def test_at_random_moments_of_the_start_when_requests_is_imported(
    redpipe, fake_reddit, database, runs
):
    add_posts(fake_reddit, range(7))
    for n in range(runs):
        number, moment = SIGNALS[n % 3], random.uniform(0, 0.3)
        print(number, moment)
        process = redpipe.start(*FOLLOW)
        # Before its first line there is nothing of ours that could catch SIGINT.
        if number == signal.SIGINT:
            wait_for(lambda process=process: catches(process, signal.SIGTERM))
        time.sleep(moment)
        assert redpipe.stop(process, number) == (-number, "", "")
        assert list(redpipe.tmpdir.iterdir()) == []
        if database.exists() and database.stat().st_size:
            with suppress(sqlite3.OperationalError):  # it has no tables yet
                left_by(redpipe)


def test_at_the_moment_when_the_certificates_are_written(redpipe, fake_reddit):
    add_posts(fake_reddit, range(7))
    for number in SIGNALS:
        process = redpipe.start(*FOLLOW)
        ends = time.monotonic() + 10
        while not list(redpipe.tmpdir.iterdir()) and time.monotonic() < ends:
            pass  # at once, or the moment is over
        assert redpipe.stop(process, number) == (-number, "", "")
        assert list(redpipe.tmpdir.iterdir()) == []


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
    assert left_by(redpipe) >= 500
    assert left_by(redpipe) % 500 == 0  # whole transactions


def test_while_a_pipe_gives_nothing(redpipe, database):
    process = redpipe.start("--from=-", database)
    wait_for(lambda: database.exists() and database.stat().st_size > 0)
    time.sleep(0.2)
    assert redpipe.stop(process, signal.SIGINT) == (-signal.SIGINT, "", "")
    assert left_by(redpipe) == 0


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
    for _ in range(3):
        database.unlink(missing_ok=True)
        process = redpipe.start(*FOLLOW)
        wait_for(lambda: count_posts(database))
        assert hammer(process, number) == (-number, "", "")
        assert left_by(redpipe) == 7


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
def test_one_that_is_lost_stops_a_follower_that_sleeps(redpipe, fake_reddit, number):
    fake_reddit.script(WAIT)
    process = start_to_lose_one(redpipe, number, *FOLLOW)
    wait_for(fake_reddit.requests)
    time.sleep(0.1)
    assert redpipe.stop(process, signal.SIGUSR1) == (-number, "", "")
    assert left_by(redpipe) == 0


def test_one_that_is_lost_stops_an_import_that_waits_for_a_pipe(redpipe, database):
    process = start_to_lose_one(redpipe, signal.SIGINT, "--from=-", database)
    wait_for(lambda: database.exists() and database.stat().st_size > 0)
    time.sleep(0.2)
    process.stdin, pipe = None, process.stdin
    assert redpipe.stop(process, signal.SIGUSR1) == (-signal.SIGINT, "", "")
    assert left_by(redpipe) == 0
    pipe.close()


# Ignored at the start


def goes_on(fake_reddit: FakeReddit) -> None:
    """Wait for one more poll."""
    asked = len(fake_reddit.requests())
    wait_for(lambda: len(fake_reddit.requests()) > asked)


TRAP = "trap '' {}; exec \"$@\""


@pytest.mark.parametrize(
    ("ignored", "through"),
    [
        (signal.SIGHUP, ["nohup"]),
        *[(number, ["sh", "-c", TRAP.format(number.name[3:]), "sh"]) for number in SIGNALS],
    ],
)
def test_what_is_ignored_at_the_start_stays_ignored(redpipe, fake_reddit, ignored, through):
    add_posts(fake_reddit, range(7))
    process = redpipe.start_through(*through, *redpipe.command, *FOLLOW)
    wait_for(fake_reddit.requests)
    process.send_signal(ignored)
    goes_on(fake_reddit)
    other = signal.SIGTERM if ignored != signal.SIGTERM else signal.SIGINT
    assert redpipe.stop(process, other).status == -other
    assert left_by(redpipe) == 7


# Standard streams


def full_device() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def pipe_without_a_reader() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


NO_SPACE = "redpipe: standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("unwritable", "status", "said"),
    [(full_device, 74, NO_SPACE), (pipe_without_a_reader, -signal.SIGPIPE, "")],
)
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["--status", "posts.db"], ["--print", "posts.db", "python"]],
)
def test_an_output_that_cannot_be_written_ends_it_and_nothing_is_stored(
    redpipe, fake_reddit, database, unwritable, status, said, arguments
):
    Database(str(database)).__exit__()
    add_posts(fake_reddit, range(300))
    stream = unwritable()
    process = redpipe.start_through(*redpipe.command, *arguments, stdout=stream)
    os.close(stream)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (status, said)
    assert left_by(redpipe) == 0


def test_a_closed_output_ends_what_is_to_print_posts(redpipe, fake_reddit):
    add_posts(fake_reddit, range(3))
    shell = 'exec "$@" --print --once posts.db python >&-'
    process = redpipe.start_through("sh", "-c", shell, "sh", *redpipe.command)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (74, "redpipe: standard output: closed\n")
    assert left_by(redpipe) == 0


@pytest.mark.parametrize(
    "streams", ["<&-", ">&-", "2>&-", "<&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"]
)
def test_streams_that_are_closed_or_full_change_neither_status_nor_database(
    redpipe, fake_reddit, database, streams
):
    add_posts(fake_reddit, range(7))
    for arguments, status in [
        ("--nonsense", 64),
        ("--once posts.db missing_place", 69),
        ("-v --once posts.db python", 0),
    ]:
        shell = f'exec "$@" {arguments} {streams}'
        process = redpipe.start_through("sh", "-c", shell, "sh", *redpipe.command)
        process.communicate(timeout=20)
        assert process.returncode == status
        assert database.exists() == (status == 0)
    assert left_by(redpipe) == 7
    assert b"redpipe: " not in database.read_bytes()


def test_a_reader_of_messages_that_goes_away_stops_nothing(redpipe, fake_reddit):
    add_posts(fake_reddit, range(7))
    process = redpipe.start("-v", *FOLLOW)
    wait_for(fake_reddit.requests)
    process.stderr.close()
    process.stdout.close()
    process.stderr = process.stdout = None
    goes_on(fake_reddit)
    assert redpipe.stop(process).status == -signal.SIGTERM
    assert left_by(redpipe) == 7


# A terminal that goes away


TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def on_terminal(
    redpipe: Redpipe, terminal: Terminal, *arguments: object, shell: str = 'exec "$@"'
) -> subprocess.Popen[str]:
    """Start redpipe on a terminal of its own."""
    command = [redpipe.command[0], "-c", TAKE_TERMINAL, "sh", "-c", shell, "sh", *redpipe.command]
    streams = dict.fromkeys(["stdin", "stdout", "stderr"], terminal.slave)
    return redpipe.start_through(*command, *arguments, start_new_session=True, **streams)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_goes_away_ends_it_by_sighup_unless_that_is_ignored(
    redpipe, fake_reddit, database, ignored
):
    add_posts(fake_reddit, range(7))
    shell = TRAP.format("HUP") if ignored else 'exec "$@"'
    with closing(Terminal()) as terminal:
        child = on_terminal(redpipe, terminal, "-v", *FOLLOW, shell=shell)
        wait_for(lambda: terminal.read() and count_posts(database))
    if ignored:
        goes_on(fake_reddit)
        child.terminate()
    assert wait_for_end(child.pid) < SOON
    assert child.wait() == (-signal.SIGTERM if ignored else -signal.SIGHUP)
    assert left_by(redpipe) == 7


def test_ctrl_c_on_a_terminal_ends_it_by_sigint(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(7))
    with closing(Terminal()) as terminal:
        child = on_terminal(redpipe, terminal, *FOLLOW)
        wait_for(lambda: terminal.read() and count_posts(database))
        os.write(terminal.master, b"\x03")
        assert wait_for_end(child.pid) < SOON
        assert child.wait() == -signal.SIGINT
        assert terminal.read().endswith(b"\n")
    assert b"Traceback" not in terminal.shown
    assert left_by(redpipe) == 7
