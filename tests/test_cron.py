"""Unattended: README's cron line and systemd unit, run as cron and systemd run them.

The paths of README are replaced by temporary ones; nothing else is changed. Where the tests
run as root, another user runs the line too.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from artefact import ROOT, probe, readme_blocks, wait_for
from conftest import add_posts, count_posts, one_line, stored
from fake_reddit import FakeReddit

pytestmark = pytest.mark.timeout(60)

CRON_PATH = "/usr/bin:/bin"
NOBODY = "nobody"
is_root = os.geteuid() == 0


def block(start: str) -> str:
    """Give the one fenced block of README that begins so."""
    (found,) = [block for block in readme_blocks() if block.startswith(start)]
    return found


def cron_command() -> str:
    """Give what cron hands to the shell: the line after its five fields."""
    (line,) = [line for line in block("*/5").splitlines() if line.startswith("*/5 * * * * ")]
    assert not re.search(r"(?<!\\)%", line)  # cron makes a newline of it
    return line.split(maxsplit=5)[5]


class Host(NamedTuple):
    """A place where the file, a home and a database are, for one user."""

    directory: Path
    user: str
    python: str

    @property
    def database(self) -> Path:
        return self.directory / "data" / "posts.db"

    def located(self, command: str) -> str:
        """Replace README's paths."""
        pyz, database = self.directory / "redpipe.pyz", self.database
        command, count = re.subn(r"\S*/redpipe\.pyz", str(pyz), command)
        assert count == 1
        command, count = re.subn(r"\S*/posts\.db", str(database), command)
        assert count == 1
        return command.replace("/usr/bin/python3", self.python)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command as this user, with no terminal and nothing of our environment."""
        who: dict[str, Any] = {}
        if is_root:
            entry = pwd.getpwnam(self.user)
            who = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        return subprocess.Popen(
            command,
            cwd="/",
            env={"PATH": CRON_PATH, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            umask=0o022,
            **who,
        )

    def run(self, command: str, **environment: str) -> tuple[int, str]:
        """Give the exit status of a shell command, and what cron would mail."""
        process = self.start("/bin/sh", "-c", command, **environment)
        try:
            mail, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return process.returncode, mail


def usable_python(user: str, bare_python: Path) -> str:
    """Give README's interpreter where it is new enough, else the one of the tests."""
    found = probe("/usr/bin/python3")
    if found and found.version >= (3, 10, 0):
        return "/usr/bin/python3"
    if is_root and user == NOBODY:
        pytest.skip("there is no /usr/bin/python3 (3.10 or newer), and ours is for root only")
    return str(bare_python)


@pytest.fixture(params=["this user", "another user"])
def host(request: pytest.FixtureRequest, pyz: Path, bare_python: Path) -> Iterator[Host]:
    """Set up a directory for a user as README says."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    if request.param == "another user":
        if not is_root:
            pytest.skip("only root may run something as another user")
        user = NOBODY
    python = usable_python(user, bare_python)
    directory = Path(tempfile.mkdtemp(prefix="redpipe-host-", dir="/tmp"))
    try:
        directory.chmod(0o755)
        shutil.copy(pyz, directory)
        for folder in (directory / "home", directory / "data"):
            folder.mkdir()
            shutil.chown(folder, user)
        yield Host(directory, user, python)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def environment_file(host: Host, fake_reddit: FakeReddit) -> Path:
    """Write ~/.redpipe.env in README's form."""
    path = host.directory / "home" / ".redpipe.env"
    lines = {
        "REDDIT_CLIENT_ID": "app-id",
        "REDDIT_CLIENT_SECRET": "app-secret",
        "REDDIT_USERNAME": "some_body",
        "REDPIPE_URL": fake_reddit.url,
    }
    path.write_text("".join(f"export {name}={value}\n" for name, value in lines.items()))
    path.chmod(0o600)
    shutil.chown(path, host.user)
    return path


def run_line(host: Host) -> tuple[int, str]:
    """Run README's line as cron does."""
    home = str(host.directory / "home")
    environment = {"HOME": home, "LOGNAME": host.user, "SHELL": "/bin/sh"}
    return host.run(host.located(cron_command()), **environment)


def test_readmes_line_is_silent_and_goes_on_from_run_to_run(host, environment_file, fake_reddit):
    first = add_posts(fake_reddit, range(120))
    assert run_line(host) == (0, "")
    assert stored(host.database) == sorted(first)
    second = add_posts(fake_reddit, range(120, 130))
    assert run_line(host) == (0, "")
    assert stored(host.database) == sorted(first + second)
    assert run_line(host) == (0, "")
    page = fake_reddit.requests("/new")[0]
    assert page.path == "/r/python/new"  # with the credentials of the file
    assert page.headers["user-agent"].endswith(" (by /u/some_body)")


def test_readmes_line_says_one_line_on_failure(host, environment_file, fake_reddit):
    for spoil, expected, word in [
        (lambda: fake_reddit.refuse("python", "private"), 69, "r/python"),
        (fake_reddit.clients.clear, 77, "credentials"),
        (lambda: shutil.rmtree(host.database.parent), 73, "/data/posts.db"),
    ]:
        spoil()
        status, mail = run_line(host)
        assert status == expected
        assert one_line(mail)
        assert word in mail


def without_credentials() -> str:
    """Give the line without its first command, as README advises who has none."""
    first, _, rest = cron_command().partition(";")
    assert first == '. "$HOME/.redpipe.env"'
    return rest.strip()


def test_without_home_terminal_and_credentials_it_runs_as_well(host, fake_reddit):
    fake_reddit.anonymous_json_blocked = True
    ids = add_posts(fake_reddit, range(7))
    command = host.located(without_credentials())
    assert host.run(command, REDPIPE_URL=fake_reddit.url) == (0, "")
    assert stored(host.database) == sorted(ids)
    assert {seen.path for seen in fake_reddit.log} == {
        "/r/python/new/.json",
        "/r/python/new/.rss",
    }


# The file with the credentials


def test_each_line_of_the_environment_file_sets_one_variable():
    """As systemd reads them, a line is one assignment, to its very end."""
    text = (ROOT / "README.md").read_text()
    exports = re.findall(r"^ *export (REDDIT_.*)$", text, re.MULTILINE)
    assert exports
    assert [line for line in exports if line.count("=") != 1] == []


# systemd


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """Write README's unit to a file."""
    text = block("[Unit]")
    if not Path("/usr/bin/python3").exists():
        text = text.replace("/usr/bin/python3", sys.executable)
    path = tmp_path / "redpipe.service"
    path.write_text(text)
    return path


def settings(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if re.match(r"\w+=", line)]
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_passes_systemds_own_check(unit):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_starts_what_stops_by_sigterm(host, fake_reddit):
    ids = add_posts(fake_reddit, range(7))
    command = shlex.split(host.located(settings(block("[Unit]"))["ExecStart"]))
    process = host.start(*command, REDPIPE_URL=fake_reddit.url)
    try:
        # Root, who is quicker to look than they are to make it, would make SQLite's index of the
        # WAL for itself.
        index = Path(f"{host.database}-shm")
        wait_for(lambda: index.exists() and count_posts(host.database))
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=10)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, said) == (-signal.SIGTERM, "")
    assert stored(host.database) == sorted(ids)


def test_the_unit_does_not_restart_what_would_fail_again():
    unit = settings(block("[Unit]"))
    assert unit["Restart"] in ("on-failure", "always")
    assert set(unit["RestartPreventExitStatus"].split()) >= {"64", "69", "73", "77", "78"}
    assert not {"74", "75"} & set(unit["RestartPreventExitStatus"].split())  # these may pass
