"""What tests share: an invented Reddit, the recorded samples, the built file as a command."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import artefact
from fake_reddit import FakeReddit

pyz, bare_of, bare_python = artefact.pyz, artefact.bare_of, artefact.bare_python  # fixtures

for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:  # by nohup, or by & in a script
        signal.signal(number, lambda *_: None)  # what is started now does not inherit that


SOON = 2.0
"""The seconds within which a process ends that was sent a signal."""


class Done(NamedTuple):
    """Hold what a finished command leaves."""

    status: int
    """As the shell says it: negative for the signal that ended the process."""
    out: str
    err: str


class Redpipe:
    """Run the built file as a user does, with an environment of its own.

    Each run gets PATH, TMPDIR, REDPIPE_URL, and what is passed by name; nothing else.
    """

    def __init__(self, pyz: Path, python: Path, url: str, directory: Path) -> None:
        """Keep what every run has in common; `directory` is the working directory."""
        self.command = [str(python), str(pyz)]
        self.directory = directory
        self.tmpdir = directory / "tmp"
        self.tmpdir.mkdir()
        self.environment = artefact.bare_environment(TMPDIR=str(self.tmpdir), REDPIPE_URL=url)
        self.started: list[subprocess.Popen[str]] = []

    def __call__(
        self, *arguments: object, stdin: str = "", timeout: float = 30, **environment: str
    ) -> Done:
        """Run redpipe to its end; end it after `timeout` seconds and fail."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(stdin, timeout)
        return Done(process.returncode, out, err)

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """Start redpipe and leave it running; the fixture kills it in the end."""
        process = subprocess.Popen(
            [*self.command, *map(str, arguments)],
            cwd=self.directory,
            env={**self.environment, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",
        )
        self.started.append(process)
        return process

    def stop(
        self,
        process: subprocess.Popen[str],
        with_signal: signal.Signals = signal.SIGTERM,
    ) -> Done:
        """Send a signal to what `start` gave, and see that it ends soon."""
        process.send_signal(with_signal)
        seconds = wait_for_end(process.pid)
        out, err = process.communicate()
        assert seconds < SOON
        return Done(process.returncode, out, err)

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


def wait_for_end(pid: int) -> float:
    """Wait until a process has ended; give the seconds, less those it waited for a processor."""
    began, others = time.monotonic(), kept_waiting(pid) + kept_waiting("self")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    others = kept_waiting(pid) + kept_waiting("self") - others
    return time.monotonic() - began - others


def kept_waiting(pid: int | str) -> float:
    """Give the seconds for which a process could not run as others had the processors."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text("utf-8").split()[1]) / 1e9
    except OSError:  # not Linux
        return 0.0


@pytest.fixture(scope="session")
def program() -> ModuleType:
    """Load __main__.py under another name."""
    spec = importlib.util.spec_from_file_location("redpipe_main", artefact.ROOT / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
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


@pytest.fixture(scope="session")
def samples() -> Path:
    """Give the folder of recorded answers, which is not part of the project."""
    folder = os.environ.get("REDPIPE_SAMPLES")
    if not folder:
        pytest.skip("REDPIPE_SAMPLES does not name a folder of recorded answers")
    return Path(folder)
