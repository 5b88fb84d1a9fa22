"""The command line: arguments, environment, exit statuses, and what is said where."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import select
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pipeline
from artefact import wait_for
from conftest import (
    APP,
    Done,
    Redpipe,
    add_posts,
    count_posts,
    open_terminal,
    query,
    says,
    stored,
)
from fake_reddit import HANG, json_reply, make_post

pytestmark = pytest.mark.timeout(60)

Main = Callable[..., Done]


@pytest.fixture
def main(program: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Main]:
    """Call `main(argv)` in this process, and give back what it takes over for good."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    logger, ours = logging.getLogger("redpipe"), dict(os.environ)
    logged, level = logger.handlers[:], logger.level

    def call(*argv: object, **environment: str) -> Done:
        os.environ.clear()
        os.environ.update({"TMPDIR": str(tmp_path), **environment})
        return Done(program.main(list(map(str, argv))), *capfd.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logger.handlers[:] = logged
    logger.setLevel(level)
    os.environ.clear()
    os.environ.update(ours)


def change(database: Path, script: str) -> None:
    """Change a database behind redpipe's back, or make one."""
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(script)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], "all"),
        (["python"], "python"),
        (["r/python"], "python"),
        (["/r/python"], "python"),
        (["/r/python/"], "python"),
        (["Python", "PYTHON", "r/pyThon"], "python"),
        (["python+rust"], "python rust"),
        (["r/python+rust", "go"], "python rust go"),
        (["reddit.com"], "reddit.com"),
        (["u_some-name"], "u_some-name"),
    ],
)
def test_names_are_read_in_all_spellings(redpipe, fake_reddit, arguments, names):
    fake_reddit.create(*names.split())
    done = redpipe("--once", "posts.db", *arguments)
    assert done == (0, "", "")
    asked = [seen.path.split("/")[2] for seen in fake_reddit.requests()]
    assert asked == names.split()


BAD_NAMES = ["", "r/", "/", "+", "a+", "a++b", ".", "..", "../a", "a b", "r/a/new", "a/b"]
BAD_NAMES += ["u/name", "a?b=c", "a#b", "a%2fb", "größe", "a\nb", "python\n"]
BAD_NAMES += ["https://www.reddit.com/r/python"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_a_usage_error_of_one_line(main, database, name):
    assert says(main(database, "python", name), 64)
    assert not database.exists()


NO_NUMBERS = ("", "soon", "nan", "inf")


@pytest.mark.parametrize(
    "options",
    [
        ["--nonsense"],
        ["-x"],
        ["--once", "--once"],
        ["--once=yes"],
        ["--interval"],
        *[[f"--interval={wrong}"] for wrong in (*NO_NUMBERS, "0", "0.99", "3601", "-5", "5s")],
        *[[f"--recheck={wrong}"] for wrong in (*NO_NUMBERS, "-1", "1e9", "1,5", "0x1")],
        ["--interval=5", "--interval=6"],
        ["-qv"],
        ["--field=two words"],
        ["--field="],
        ["--field=a..b"],
        ["--field=TITLE"],
        ["--field=x:Stored_UTC"],
        ["--field=score", "--field=ups:Score"],
    ],
)
def test_a_bad_option_is_a_usage_error_of_one_line(main, database, options):
    assert says(main(*options, database, "python"), 64)
    assert not database.exists()


@pytest.mark.parametrize("arguments", [[], ["--once"], ["--status"], ["--from=-"], ["--"]])
def test_without_a_database_one_is_asked_for(main, arguments):
    done = main(*arguments)
    assert done == (64, "", "redpipe: missing <database>; see redpipe.pyz --help\n")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("--recheck=1", other) for other in ("--once", "--from=-", "--status", "--print")],
        ("--recheck=1", "--interval=25"),
        ("--from=-", "--once"),
        ("--from=-", "--status"),
        ("--from=-", "--interval=25"),
        ("--from=-", "--print"),
        ("--status", "--once"),
        ("--status", "--interval=25"),
        ("--status", "--print"),
        ("--status", "--field=score"),
        ("--quiet", "--verbose"),
    ],
)
@pytest.mark.parametrize("rest", [["posts.db"], [], ["--nonsense"], ["python", "posts.db"]])
def test_options_that_do_not_go_together_are_named_whatever_else_is_wrong(main, one, other, rest):
    for options in ([one, other], [other, one]):
        done = main(*options, *rest)
        assert says(done, 64)
        assert {one.partition("=")[0], other.partition("=")[0]} < set(done.err.split())


@pytest.mark.parametrize("name", ["posts.db", "Posts.SQLITE", "data/posts.sqlite3"])
@pytest.mark.parametrize("options", [[], ["--status"], ["--from=-"]])
def test_a_database_after_the_subreddits_is_told_where_it_belongs(main, tmp_path, options, name):
    done = main(*options, tmp_path / "python", name)
    said = f"redpipe: {name}: the database comes first, then the subreddits\n"
    assert done == (64, "", said)
    assert not (tmp_path / "python").exists()


@pytest.mark.parametrize("arguments", [["--", "posts.db", "python"], ["posts.db", "--", "python"]])
@pytest.mark.parametrize("interval", ["1", "3600", "2.5"])
def test_intervals_are_taken_and_two_dashes_end_the_options(
    redpipe, fake_reddit, database, arguments, interval
):
    ids = add_posts(fake_reddit, range(3))
    assert redpipe("--once", f"--interval={interval}", *arguments) == (0, "", "")
    assert stored(database) == sorted(ids)


def test_an_empty_file_name_does_not_mean_reddit(main, database):
    assert says(main("--from=", database, REDPIPE_URL="http://127.0.0.1:9"), 66)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["posts.db", "--once", "-h"]])
def test_help_goes_to_standard_output(redpipe, program, arguments):
    assert redpipe(*arguments) == (0, f"{program.USAGE}\n", "")


def test_usage_errors_of_the_built_file_are_those_of_main(redpipe, database):
    done = redpipe("--nonsense", "posts.db")
    expected = "redpipe: unknown or repeated: --nonsense; see redpipe.pyz --help\n"
    assert done == (64, "", expected)
    assert not database.exists()


# Environment


BAD_ADDRESSES = ["www.reddit.com", "ftp://127.0.0.1", "http://", "http:127.0.0.1", "http://[::1"]
BAD_ADDRESSES += [f"http://127.0.0.1{end}" for end in (":99999", ":0", ":port", "/\x1b[31m")]
BAD_ADDRESSES += [f"http://127.0.0.1{end}" for end in ("/?key=sesame", "/#sesame")]
BAD_ADDRESSES += ["http://two words", "http://user:sesame@127.0.0.1"]


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        *[({"REDPIPE_URL": url}, "REDPIPE_URL") for url in BAD_ADDRESSES],
        ({"REDDIT_CLIENT_SECRET": "sesame"}, "REDDIT_CLIENT_ID"),
        ({"REDDIT_FEED_TOKEN": "sesame"}, "REDDIT_USERNAME"),
        ({"REDDIT_USERNAME": "some body"}, "REDDIT_USERNAME"),
        ({"REDDIT_USERNAME": "u/some_body"}, "REDDIT_USERNAME"),
        ({"REDDIT_USERNAME": "a\r\nX-Evil: 1"}, "REDDIT_USERNAME"),
        ({"REDDIT_USERNAME": "a", "REDDIT_FEED_TOKEN": "sesame two"}, "REDDIT_FEED_TOKEN"),
        ({"REDDIT_USERNAME": "a", "REDDIT_FEED_TOKEN": "sesam\xe9"}, "REDDIT_FEED_TOKEN"),
        ({"REDDIT_USERNAME": "a", "REDDIT_FEED_TOKEN": "sesame\udce9"}, "REDDIT_FEED_TOKEN"),
        ({"REQUESTS_CA_BUNDLE": "/nowhere/ca.pem"}, "REQUESTS_CA_BUNDLE"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused_and_not_repeated(
    main, database, environment, named
):
    done = main("--once", database, "python", **environment)
    assert says(done, 78, named)
    assert "sesame" not in done.err
    assert not database.exists()


def test_blank_variables_are_unset_ones(redpipe, fake_reddit):
    fake_reddit.create("python")
    names = ("REDDIT_CLIENT_ID", "REDDIT_CLIENT_SECRET", "REDDIT_USERNAME", "REDDIT_FEED_TOKEN")
    done = redpipe("--once", "posts.db", "python", **dict.fromkeys(names, " "))
    assert done == (0, "", "")
    assert fake_reddit.log[0].path == "/r/python/new/.json"


def test_the_user_agent_names_platform_version_and_user(redpipe, fake_reddit, program):
    add_posts(fake_reddit, range(1))
    redpipe("--once", "posts.db", "python")
    redpipe("--once", "posts.db", "python", REDDIT_USERNAME="some_body")
    base = f"{sys.platform}:redpipe:{program.VERSION}"
    agents = [seen.headers["user-agent"] for seen in fake_reddit.log]
    assert agents[0] == base
    assert agents[-1] == f"{base} (by /u/some_body)"


# The database


@pytest.mark.parametrize(
    "name", [":memory:", "file:posts.db?mode=memory", os.fsdecode(b"caf\xe9 ?#%.db")]
)
def test_a_database_is_always_a_file_whatever_its_name(redpipe, fake_reddit, tmp_path, name):
    ids = add_posts(fake_reddit, range(3))
    assert redpipe("--once", name, "python") == (0, "", "")
    assert stored(tmp_path / name) == sorted(ids)


# Exit statuses: Reddit


def test_no_network_is_said_once_while_following_and_so_is_its_return(redpipe, fake_reddit):
    fake_reddit.create("python")
    fake_reddit.stop()
    process = redpipe.start("--interval=1", "posts.db", "python", **APP)
    said = process.stderr.readline()
    assert said == "redpipe: r/python: Connection refused; will keep trying\n"
    fake_reddit.start()
    wait_for(lambda: len(fake_reddit.requests()) > 2)
    done = redpipe.stop(process)
    assert done == (-signal.SIGTERM, "", "redpipe: r/python can be read again\n")


def test_quiet_says_errors(redpipe):
    assert says(redpipe("--quiet", "--once", "posts.db", "missing_place"), 69)


# Exit statuses: the database


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


FOREIGN = "PRAGMA journal_mode = WAL; CREATE TABLE posts (id); INSERT INTO posts VALUES (7)"
OTHER = "PRAGMA application_id = 1; VACUUM"
NEWER = f"PRAGMA application_id = {pipeline.APPLICATION_ID}; PRAGMA user_version = 3; VACUUM"
REFUSED_DATABASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (Path.mkdir, "not a regular file"),
    "a text": (lambda path: path.write_text("Dear diary,\n" * 100), "not a SQLite database"),
    "a single byte": (lambda path: path.write_bytes(b"\0"), "not a SQLite database"),
    "foreign SQLite": (lambda path: change(path, FOREIGN), "another program"),
    "another id": (lambda path: change(path, OTHER), "another program"),
    "a newer version": (lambda path: change(path, NEWER), "a newer redpipe"),
    "a pipe": (os.mkfifo, "not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/null"), "not a regular file"),
}


@pytest.mark.parametrize("kind", REFUSED_DATABASES)
def test_what_is_not_ours_is_refused_untouched(redpipe, fake_reddit, tmp_path, kind):
    make, words = REFUSED_DATABASES[kind]
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder / "posts.db")
    before = bytes_of(folder)
    for option in ("--once", "--status"):
        done = redpipe(option, "data/posts.db", "python", timeout=10)
        assert says(done, 73, folder / "posts.db", words)
        assert bytes_of(folder) == before
    assert fake_reddit.log == []


def test_a_restored_dump_is_told_the_line_that_brings_it_back(redpipe, fake_reddit, database):
    ids = add_posts(fake_reddit, range(5))
    assert redpipe("--field=score", "--once", database, "python") == (0, "", "")
    with closing(sqlite3.connect(database)) as connection:
        dump = "\n".join(connection.iterdump())
    database.unlink()
    change(database, dump)
    line = "PRAGMA application_id = 1919185001"
    for options in (["--once"], ["--status"]):
        assert says(redpipe(*options, database, "python"), 73, f"sqlite3 FILE '{line}'")
    change(database, line)
    ids += add_posts(fake_reddit, range(5, 8))
    assert redpipe("--once", database, "python") == (0, "", "")
    assert stored(database) == sorted(ids)
    assert query(database, "PRAGMA user_version") != [(0,)]
    assert query(database, "SELECT gaps FROM coverage") == [(0,)]


def test_a_new_database_is_not_left_behind_if_its_only_name_does_not_exist(redpipe, tmp_path):
    assert redpipe("--once", "posts.db", "pyhton").status == 69
    assert redpipe("posts.db", "pyhton", "ruts").status == 69
    assert list(tmp_path.glob("posts.db*")) == []


@pytest.mark.parametrize("before", ["a file", "a database", "a name", "a post"])
def test_a_database_that_was_there_or_holds_anything_stays(redpipe, fake_reddit, database, before):
    names = ["pyhton"]
    if before == "a file":
        database.touch()
    elif before == "a database":
        pipeline.Database(str(database)).__exit__()
    else:
        names.append("python")
        fake_reddit.create("python")
        add_posts(fake_reddit, range(1 if before == "a post" else 0))
    assert redpipe("--once", database, *names).status == 69
    assert query(database, "SELECT count(*) FROM cursors") == [(len(names) - 1,)]


def test_a_database_that_others_have_open_stays(database):
    ours = pipeline.Database(str(database))
    with closing(sqlite3.connect(database)) as other:
        other.execute("SELECT * FROM posts").fetchall()
        ours.__exit__(pipeline.Gone)
        other.execute("INSERT INTO posts (id) VALUES ('a1')")
        other.commit()
    assert stored(database) == ["a1"]


@pytest.mark.parametrize("folder", ["nowhere", "größe"])
def test_a_missing_folder_is_named_even_where_only_ascii_can_be_said(redpipe, tmp_path, folder):
    done = redpipe("--once", f"{folder}/posts.db", "python", PYTHONIOENCODING="ascii")
    assert says(done, 73, tmp_path / folder)
    assert not (tmp_path / folder).exists()


# What is said where


def test_verbose_tells_of_every_poll(redpipe, fake_reddit):
    add_posts(fake_reddit, range(3))
    process = redpipe.start("-v", "--interval=1", "posts.db", "python", **APP)
    wait_for(lambda: len(fake_reddit.requests()) >= 3)
    done = redpipe.stop(process)
    told = [line for line in done.err.splitlines() if "/r/python/new" in line]
    assert len(told) >= 3
    assert all(line.startswith("redpipe: ") for line in done.err.splitlines())
    assert "\r" not in done.err
    assert done.out == ""


class Terminal:
    """A pseudo-terminal; what has been written to it is kept."""

    def __init__(self) -> None:
        self.master, self.slave = open_terminal()
        self.shown = b""

    def resize(self, width: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    def screen(self) -> list[str]:
        """Give the lines as they stand on the screen, when all has been written."""
        lines, column = [""], 0
        for character in self.read().decode():
            if character == "\r":
                column = 0
            elif character == "\n":
                lines.append("")
            else:
                lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]

    def read(self, seconds: float = 0.05) -> bytes:
        """Take in what has come, and give all of it."""
        while select.select([self.master], [], [], seconds)[0]:
            try:
                self.shown += os.read(self.master, 65536)
            except OSError:  # nobody has the other end open any more
                break
        return self.shown

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(app: None) -> Iterator[Terminal]:
    with closing(Terminal()) as terminal:
        yield terminal


def start_on(
    terminal: Terminal, redpipe: Redpipe, *arguments: object, **more: Any
) -> subprocess.Popen[str]:
    """Start redpipe with a terminal for its standard error."""
    streams = {"stdout": subprocess.DEVNULL, "stderr": terminal.slave}
    return redpipe.start_through(*redpipe.command, *arguments, **streams, **more)


def follow_on(terminal: Terminal, redpipe: Redpipe, *options: object) -> subprocess.Popen[str]:
    return start_on(terminal, redpipe, *options, "--interval=1", "posts.db", "python")


FIRST = "redpipe: following r/python from 127.0.0.1 with an app into posts.db; Ctrl-C stops it"


def shown_lines(terminal: Terminal) -> list[str]:
    """Give every state of the line that was drawn."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", terminal.read().decode()) if line]


def test_the_line_lives_while_a_request_hangs(redpipe, fake_reddit, terminal):
    now = int(time.time())
    for n in range(3):
        fake_reddit.add(make_post(n, now - 3 + n))
    process = follow_on(terminal, redpipe)
    wait_for(lambda: b"3 posts stored" in terminal.read())
    fake_reddit.script(*[HANG] * 3)
    wait_for(lambda: f"newest {int(time.time()) - now + 1} s ago" in terminal.read().decode())
    began = len(shown_lines(terminal))
    wait_for(lambda: len(shown_lines(terminal)) >= began + 4, 6)
    redpipe.stop(process)
    ages = [int(age) for age in re.findall(r"newest (\d+) s ago", terminal.read().decode())]
    assert ages == sorted(ages)
    assert ages[-1] - ages[0] >= 3


def test_the_line_lives_while_a_pipe_gives_nothing(redpipe, terminal):
    process = start_on(terminal, redpipe, "--from=-", "posts.db", stdin=subprocess.PIPE)
    wait_for(lambda: len(shown_lines(terminal)) >= 4, 6)
    redpipe.stop(process)
    first, line, last, after = terminal.screen()
    assert first == "redpipe: reading - into posts.db; Ctrl-C stops it"
    assert line == "redpipe: 0 posts stored, 0 MB read, 0 MB/s"
    assert (last, after) == ("redpipe: 0 posts stored, 0 gaps", "")


def test_a_catch_up_is_no_rate_of_posting(redpipe, fake_reddit, terminal):
    now = int(time.time())
    for n in range(600):
        fake_reddit.add(make_post(n, now - 3000 + 5 * n))
    process = follow_on(terminal, redpipe)
    wait_for(lambda: b"600 posts stored" in terminal.read())
    redpipe.stop(process)
    rate = re.search(r"600 posts stored, ([\d.]+)/min, newest ", terminal.screen()[1])
    assert rate
    assert 11.0 <= float(rate[1]) <= 12.0  # one in five seconds


def test_what_the_line_remembers_does_not_grow_while_nobody_looks(program):
    progress, now = program.Progress(), int(time.time())
    for n in range(1000):
        cursor = pipeline.Cursor("python", 0, now - 2000 + n, now)
        progress.add(1, [{"created_utc": cursor.newest_utc}], pipeline.Batch([], [cursor]))
    assert len(progress.recent) == 0
    progress.add(1, [{"created_utc": now - 5}], pipeline.Batch([], [cursor]))
    assert progress.line().startswith("1,001 posts stored, 0.2/min, newest 16 min ago")


def test_a_message_is_written_above_the_line_that_goes_on(redpipe, fake_reddit, terminal):
    add_posts(fake_reddit, range(3))
    process = follow_on(terminal, redpipe)
    wait_for(lambda: b"3 posts stored" in terminal.read())
    fake_reddit.refuse("python", "private")
    wait_for(lambda: b"private" in terminal.read())
    redpipe.stop(process)
    first, message, *line, last, after = terminal.screen()
    assert first == FIRST
    assert re.fullmatch(r"redpipe: r/python [^\n]*private[^\n]*", message)
    assert line[-1].startswith("redpipe: 3 posts stored, ")
    assert (last, after) == ("redpipe: 3 posts stored, 0 gaps", "")


def test_a_terminal_shows_what_is_done_a_line_as_long_as_fits_and_what_was_stored(
    redpipe, fake_reddit, terminal
):
    add_posts(fake_reddit, range(1997, 2000))
    terminal.resize(120)
    process = follow_on(terminal, redpipe)
    for width, shown in [
        # Drawn as often as it polls, it may find it reading each time.
        (120, r"redpipe: 3 posts stored, 0.6/min, newest \d+ s ago, \w.*, \d+ requests left"),
        (53, r"redpipe: 3 posts stored, 0.6/min, newest \d+ s ago, \w+"),
        (30, r"redpipe: 3 posts stored, 0.6/"),
        (12, r"redpipe: 3"),
    ]:
        terminal.resize(width)
        wait_for(lambda shown=shown: re.fullmatch(shown, [FIRST, *shown_lines(terminal)][-1]))
    redpipe.stop(process)
    first, line, last, after = terminal.screen()
    assert first == FIRST
    assert re.fullmatch(shown, line)
    assert (last, after) == ("redpipe: 3 posts stored, 0 gaps", "")


def test_a_path_with_wide_and_combining_characters_leaves_nothing_of_the_line(
    redpipe, fake_reddit, terminal, tmp_path
):
    add_posts(fake_reddit, range(3))
    odd = "\u4e2d\u6587e\u0301.db"
    process = start_on(terminal, redpipe, "--interval=1", odd, "python")
    wait_for(lambda: b"3 posts stored" in terminal.read())
    (tmp_path / odd).rename(tmp_path / "moved.db")
    assert process.wait(20) == 74
    last = terminal.screen()[-2]
    assert last == f"redpipe: {tmp_path / odd}: deleted or replaced while in use; start again"


def test_a_terminal_that_takes_nothing_is_not_waited_for(redpipe, fake_reddit, terminal, database):
    fake_reddit.create("python")
    process = follow_on(terminal, redpipe, "-v")
    wait_for(fake_reddit.requests)
    termios.tcflow(terminal.slave, termios.TCOOFF)  # as Ctrl-S does
    asked = len(fake_reddit.requests())
    wait_for(lambda: len(fake_reddit.requests()) >= asked + 2)
    assert redpipe.stop(process).status == -signal.SIGTERM
    termios.tcflow(terminal.slave, termios.TCOON)


def test_a_notice_is_for_terminals(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(3))
    fake_reddit.anonymous_json_blocked = True
    with closing(Terminal()) as terminal:
        process = start_on(terminal, redpipe, "--once", "posts.db", "python")
        assert process.wait(20) == 0
        first, notice, *_ = terminal.screen()
    assert first.startswith("redpipe: polling r/python from 127.0.0.1 with no credentials")
    assert notice.startswith("redpipe: Reddit blocks anonymous JSON (403); taking the feed")
    database.unlink()
    assert redpipe("--once", "posts.db", "python") == (0, "", "")


def test_quiet_shows_neither_progress_nor_warnings_on_a_terminal(
    redpipe, fake_reddit, terminal, database
):
    add_posts(fake_reddit, range(3))
    process = follow_on(terminal, redpipe, "-q")
    wait_for(lambda: count_posts(database))
    fake_reddit.refuse("python", "private")
    asked = len(fake_reddit.requests())
    wait_for(lambda: len(fake_reddit.requests()) > asked)
    redpipe.stop(process)
    assert terminal.read() == b""


NASTY = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnihton\x00\x7f\nsecond line"


@pytest.mark.parametrize("status", [403, 404])
def test_control_characters_of_reddit_never_reach_a_terminal(
    redpipe, fake_reddit, terminal, status
):
    said = {"reason": NASTY} if status == 403 else {}
    fake_reddit.script(json_reply(status, {"message": NASTY, "error": status, **said}))
    process = start_on(terminal, redpipe, "-v", "--once", "posts.db", "python")
    assert process.wait(20) == 69
    shown = terminal.read().decode()
    assert "redpipe: r/python cannot be read" in shown
    assert not set("\x1b\x07\x9b\u202e\x00\x7f") & set(shown)
    assert "\nsecond" not in shown
