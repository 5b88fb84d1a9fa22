"""Build redpipe.pyz, and run it as on a machine that has Python and nothing else."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED_TO_BUILD = ("__main__.py", "pipeline.py", "requirements.txt", "build.sh")
PROBE = "import platform, sys; print(platform.python_implementation(), *sys.version_info[:3])"

LISTING = {
    "kind": "Listing",
    "data": {
        "after": None,
        "children": [
            {"kind": "t3", "data": {"id": "b", "created_utc": 1700000060.0, "title": "Second"}},
            {"kind": "t3", "data": {"id": "a", "created_utc": 1700000000.0, "title": "First"}},
        ],
    },
}


class Python(NamedTuple):
    """An interpreter that was found on this machine."""

    version: tuple[int, int, int]
    path: str

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


def build(
    output: Path,
    root: Path = ROOT,
    python: str = sys.executable,
    umask: int = -1,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run build.sh of the checkout `root`."""
    return subprocess.run(
        [root / "build.sh", output],
        env={**os.environ, "PYTHON": python, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        umask=umask,
    )


def copy_checkout(directory: Path) -> Path:
    """Copy what building needs into a new directory."""
    directory.mkdir(parents=True)
    for name in NEEDED_TO_BUILD:
        shutil.copy(ROOT / name, directory)
    return directory


def bare_environment(**environment: str) -> dict[str, str]:
    """Return the environment of `env -i PATH=/usr/bin:/bin`, and `environment`."""
    return {"PATH": "/usr/bin:/bin", **environment}


def run_bare(
    *command: str | Path, cwd: str | Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end with nothing of this process's environment."""
    return subprocess.run(
        command,
        cwd=cwd,
        env=bare_environment(**environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def wait_for(what: Callable[[], object], seconds: float = 20) -> None:
    """Wait until `what` is true; after `seconds`, fail."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} seconds in vain")
        time.sleep(0.01)


def readme_blocks() -> list[str]:
    """Return the fenced blocks of README."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def candidates() -> Iterator[str]:
    """Yield where interpreters may be, those the user names first."""
    yield from filter(None, os.environ.get("REDPIPE_PYTHONS", "").split(os.pathsep))
    yield sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob("versions/*/bin/python")))
    folders = [d for d in os.get_exec_path() if "/shims" not in d]  # they lead to the ones above
    for name in ["python3", *(f"python3.{minor}" for minor in range(6, 20))]:
        found = shutil.which(name, path=os.pathsep.join(folders))
        if found:
            yield found


def probe(path: str) -> Python | None:
    """Ask an interpreter for its version; None if it is no CPython 3 that runs."""
    try:
        done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, timeout=20)
    except OSError:
        return None
    words = done.stdout.split()
    if done.returncode or words[:2] != ["CPython", "3"]:
        return None
    return Python((int(words[1]), int(words[2]), int(words[3])), path)


@functools.cache
def find_pythons() -> list[Python]:
    """Find one interpreter of each CPython 3 release on this machine, oldest first."""
    found: dict[tuple[int, int, int], Python] = {}
    for path in candidates():
        python = probe(path)
        if python:
            found.setdefault(python.version, python)
    return [found[version] for version in sorted(found)]


def make_bare(python: str, directory: Path) -> Path:
    """Make a virtual environment without any package, and return its interpreter."""
    command = [python, "-I", "-m", "venv", "--without-pip", str(directory)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return directory / "bin" / "python3"


class ListingHandler(BaseHTTPRequestHandler):
    """Answer every GET with the same listing of two posts."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps(LISTING).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in {"used": "1", "remaining": "999.0", "reset": "600"}.items():
            self.send_header(f"x-ratelimit-{name}", value)
        self.end_headers()
        self.wfile.write(body)
        self.server.served.release()  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass


class ListingServer(ThreadingHTTPServer):
    """Serve two posts on the loopback; `served` is released once for each answer."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), ListingHandler)
        self.served = threading.Semaphore(0)
        if context:
            # The handshake is left to the handler's thread: a client that refuses our
            # certificate must not stop the server.
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that go away are part of the tests."""


@contextmanager
def serve_listing(context: ssl.SSLContext | None = None) -> Iterator[ListingServer]:
    """Run a ListingServer."""
    with ListingServer(context) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)


@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the checkout's redpipe.pyz, once, with the running Python."""
    output = tmp_path_factory.mktemp("built") / "redpipe.pyz"
    done = build(output)
    if done.returncode:
        raise RuntimeError(f"build.sh failed:\n{done.stderr}")
    return output


@pytest.fixture(scope="session")
def bare_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give for an interpreter one like it that has nothing installed."""
    return functools.cache(lambda python: make_bare(python, tmp_path_factory.mktemp("bare")))


@pytest.fixture(scope="session")
def bare_python(bare_of: Callable[[str], Path]) -> Path:
    """Give the running Python with nothing installed."""
    return bare_of(sys.executable)
