"""What tests share: an invented Reddit, the recorded samples, the built file as a command."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import artefact
from fake_reddit import FakeReddit, make_post
from virtual import VirtualClock

pyz, bare_of, bare_python = artefact.pyz, artefact.bare_of, artefact.bare_python  # fixtures

for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:  # by nohup, or by & in a script
        signal.signal(number, lambda *_: None)  # what is started now does not inherit that


APP = {"REDDIT_CLIENT_ID": "app-id", "REDDIT_CLIENT_SECRET": "app-secret"}
"""Credentials that a FakeReddit knows. Without, polls are six seconds apart at first."""
SOON = 2.0
"""The seconds within which a process ends that was sent a signal."""


class Done(NamedTuple):
    """Hold what a finished command leaves; `status` is negative for the signal that ended it."""

    status: int
    out: str
    err: str


def finish(process: subprocess.Popen[str], stdin: str | None = None, timeout: float = 30) -> Done:
    """Wait until a process has ended; fail after `timeout` seconds."""
    out, err = process.communicate(stdin, timeout)
    return Done(process.returncode, out, err)


class Redpipe:
    """Run the built file as a user does, with an environment of its own.

    Each run gets PATH, TMPDIR, REDPIPE_URL, and what is passed by name; nothing else.
    """

    def __init__(self, pyz: Path, python: Path, url: str, directory: Path) -> None:
        self.command = [str(python), str(pyz)]
        self.directory = directory
        self.tmpdir = directory / "tmp"
        self.tmpdir.mkdir()
        self.environment = artefact.bare_environment(TMPDIR=str(self.tmpdir), REDPIPE_URL=url)
        self.started: list[subprocess.Popen[str]] = []

    def __call__(
        self, *arguments: object, stdin: str = "", timeout: float = 30, **environment: str
    ) -> Done:
        """Run redpipe to its end."""
        return finish(self.start(*arguments, **environment), stdin, timeout)

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """Start redpipe and leave it running; the fixture kills it in the end."""
        return self.start_through(
            *self.command,
            *arguments,
            env={**self.environment, **environment},
            stdin=subprocess.PIPE,
            errors="surrogateescape",
        )

    def start_through(self, *words: object, **more: Any) -> subprocess.Popen[str]:
        """Start redpipe by another command, or with streams of its own."""
        options = {"cwd": self.directory, "env": self.environment, "encoding": "utf-8"}
        streams = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        options |= {"stdin": subprocess.DEVNULL, **streams, **more}
        process = subprocess.Popen(list(map(str, words)), **options)
        self.started.append(process)
        return process

    def stop(
        self, process: subprocess.Popen[str], with_signal: signal.Signals = signal.SIGTERM
    ) -> Done:
        """Send a signal to what `start` gave, and see that it ends soon."""
        process.send_signal(with_signal)
        seconds = wait_for_end(process.pid)
        done = finish(process, timeout=10)
        assert seconds < SOON
        return done

    def kill_all(self) -> None:
        """End whatever still runs."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def open_terminal() -> tuple[int, int]:
    """Open a pseudo-terminal and give both ends, ours first; skip where there is none."""
    try:
        import pty

        return pty.openpty()
    except (ImportError, OSError) as exc:
        pytest.skip(f"no pseudo-terminal can be had: {exc}")


def one_line(message: str) -> bool:
    """Tell whether it is one of redpipe's messages, and no more."""
    return bool(re.fullmatch(r"redpipe: [^\n]+\n", message))


def says(done: Done, status: int, *words: object) -> bool:
    """Tell whether a run ended with a status and one line that holds the words."""
    assert (done.status, done.out) == (status, "")
    assert one_line(done.err)
    assert [word for word in words if str(word) not in done.err] == []
    return True


def add_posts(
    reddit: FakeReddit, numbers: Iterable[int], subreddit: str = "python", **fields: Any
) -> list[str]:
    """List posts that are a second apart, the oldest half an hour old; give their ids."""
    now = int(time.time()) - 2000
    return [reddit.add(make_post(n, now + n, subreddit, **fields))["id"] for n in numbers]


def query(database: Path, sql: str) -> list[Any]:
    """Give the rows that a statement finds."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


def stored(database: Path) -> list[str]:
    """Give the ids in a database that must be sound, oldest first."""
    assert query(database, "PRAGMA integrity_check") == [("ok",)]
    return [i for (i,) in query(database, "SELECT id FROM posts ORDER BY created_utc, id")]


def count_posts(database: Path) -> int:
    """Count the posts in a database that may still have to be made."""
    with suppress(sqlite3.OperationalError):
        if database.exists():
            return int(query(database, "SELECT count(*) FROM posts")[0][0])
    return 0


def wait_for_end(pid: int) -> float:
    """Wait until a process has ended; give the seconds, less those it waited for a processor."""
    began, others = time.monotonic(), kept_waiting(pid) + kept_waiting("self")
    with suppress(ChildProcessError):  # it has ended, and was waited for
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    others = kept_waiting(pid) + kept_waiting("self") - others
    return time.monotonic() - began - others


def kept_waiting(who: int | str) -> float:
    """Give the seconds for which a process, `self` or `thread-self` waited for a processor."""
    try:
        return int(Path(f"/proc/{who}/schedstat").read_text("utf-8").split()[1]) / 1e9
    except OSError:  # not Linux
        return 0.0


@pytest.fixture(scope="session")
def program() -> ModuleType:
    """Load __main__.py under another name."""
    spec = importlib.util.spec_from_file_location("redpipe_main", artefact.ROOT / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_reddit() -> Iterator[FakeReddit]:
    """Serve an invented Reddit while the test runs."""
    with FakeReddit() as reddit:
        yield reddit


@pytest.fixture
def redpipe(
    pyz: Path, bare_python: Path, fake_reddit: FakeReddit, tmp_path: Path
) -> Iterator[Redpipe]:
    """Give the built file as a command that talks to `fake_reddit`."""
    redpipe = Redpipe(pyz, bare_python, fake_reddit.url, tmp_path)
    yield redpipe
    redpipe.kill_all()


@pytest.fixture
def app(redpipe: Redpipe) -> None:
    """Give every run an app's credentials."""
    redpipe.environment |= APP


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Name a database that is not there yet."""
    return tmp_path / "posts.db"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Name a file of posts that is not there yet."""
    return tmp_path / "posts.ndjson"


@pytest.fixture
def clock() -> VirtualClock:
    """Give a clock that shows 1,790,000,000 until somebody sleeps."""
    return VirtualClock()


@pytest.fixture
def seed() -> int:
    """Draw a seed, or take that of REDPIPE_SEED; a failing test shows it."""
    drawn = int(os.environ.get("REDPIPE_SEED") or random.SystemRandom().randrange(10**9))
    print(f"REDPIPE_SEED={drawn}")
    return drawn


@pytest.fixture(scope="session")
def samples() -> Path:
    """Give the folder of recorded answers, which is not part of the project."""
    folder = os.environ.get("REDPIPE_SAMPLES")
    if not folder:
        pytest.skip("REDPIPE_SAMPLES does not name a folder of recorded answers")
    return Path(folder)
