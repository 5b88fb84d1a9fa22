"""--print: every new post goes to standard output before it is stored."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from artefact import wait_for
from conftest import add_posts, query, stored
from fake_reddit import make_post
from pipeline import Database

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("app")]


def ids(text):
    """Return the ids of whole lines; a last one that was cut off counts as none."""
    return [json.loads(line)["id"] for line in text.splitlines(keepends=True) if line[-1] == "\n"]


# What is written


def test_a_line_is_an_object_with_the_columns_that_redpipe_fills(redpipe, fake_reddit, database):
    post = make_post(1, 1_790_000_000, title="ä \u2028 <b> 😀", score=7, over_18=True)
    post |= {"media": {"type": "x"}, "flair": "red"}
    fake_reddit.add(post)
    Database(str(database)).__exit__()
    query(database, "ALTER TABLE posts ADD COLUMN Flair AS (upper(title)) VIRTUAL")
    options = ["--field=score", "--field=over_18:adult", "--field=media", "--field=none"]
    options += ["--field=flair"]  # a generated column of that name is left alone
    done = redpipe(*options, "--print", "--once", database, "python")
    assert (done.status, done.err) == (0, "")
    (line,) = done.out.split("\n")[:-1]
    assert json.loads(line) == {
        "id": post["id"],
        "created_utc": 1_790_000_000,
        "subreddit": "python",
        "title": "ä \u2028 <b> 😀",
        "author": post["author_fullname"],
        "author_name": post["author"],
        "permalink": post["permalink"],
        "score": 7,
        "adult": 1,
        "media": '{"type": "x"}',
        "none": None,
        "flair": "red",
    }
    assert line.startswith('{"id": "')
    assert query(database, "SELECT flair = upper(title), score FROM posts") == [(1, 7)]


def test_each_new_post_comes_once_and_oldest_first(redpipe, fake_reddit, database):
    first = add_posts(fake_reddit, range(250))
    done = redpipe("--print", "--once", database, "python")
    assert (done.status, ids(done.out), done.err) == (0, first, "")
    second = add_posts(fake_reddit, range(250, 260))
    assert ids(redpipe("--print", "--once", database, "python").out) == second
    assert redpipe("--print", "--once", database, "python").out == ""
    assert stored(database) == first + second


# Whatever happens on either side


def test_it_comes_before_it_is_stored_and_again_after_a_kill(redpipe, fake_reddit, database):
    add_posts(fake_reddit, range(1))
    assert redpipe("--once", database, "python").status == 0
    new = add_posts(fake_reddit, range(1, 5))
    with closing(sqlite3.connect(database, isolation_level=None, check_same_thread=False)) as other:

        def lock(*request):
            if not other.in_transaction:
                other.execute("BEGIN IMMEDIATE")

        fake_reddit.faults = lock
        process = redpipe.start("--print", "--once", database, "python")
        lines = [process.stdout.readline() for _ in new]  # while nothing can be stored
        redpipe.stop(process, signal.SIGKILL)
        fake_reddit.faults = None
        other.execute("ROLLBACK")
    assert ids("".join(lines)) == new
    assert len(stored(database)) == 1
    assert ids(redpipe("--print", "--once", database, "python").out) == new
    assert len(stored(database)) == 5


def test_every_post_that_is_stored_was_written_whenever_it_is_killed(
    redpipe, fake_reddit, database, tmp_path
):
    expected = []
    with (tmp_path / "passed.ndjson").open("w") as passed:
        for n in range(8):
            expected += add_posts(fake_reddit, range(40 * n, 40 * n + 40))
            process = redpipe.start_through(
                *redpipe.command, "--print", "--interval=1", database, "python", stdout=passed
            )
            time.sleep(0.15 + 0.05 * n)
            redpipe.stop(process, signal.SIGKILL)
    seen = ids((tmp_path / "passed.ndjson").read_text())
    seen += ids(redpipe("--print", "--once", database, "python").out)
    assert stored(database) == expected
    assert set(seen) == set(expected)


def test_a_reader_that_is_killed_ends_it_and_what_it_was_not_given_comes_again(
    redpipe, fake_reddit, database
):
    posts = add_posts(fake_reddit, range(3))
    process = redpipe.start("--print", "--interval=1", database, "python")
    given = [process.stdout.readline() for _ in posts]
    process.stdout.close()
    process.stdout = None
    new = add_posts(fake_reddit, range(3, 5))
    assert process.wait(20) == -signal.SIGPIPE
    assert process.stderr.read() == ""
    assert ids("".join(given)) == posts == stored(database)
    assert ids(redpipe("--print", "--once", database, "python").out) == new


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_heard_while_the_reader_stalls(redpipe, fake_reddit, database, number):
    add_posts(fake_reddit, range(900))
    process = redpipe.start("--print", database, "python")  # more than a pipe takes
    wait_for(lambda: is_blocked_in_write(process))
    done = redpipe.stop(process, number)
    assert (done.status, done.err) == (-number, "")
    assert stored(database) == []
    assert list(redpipe.tmpdir.iterdir()) == []


def is_blocked_in_write(process):
    return "pipe_write" in Path(f"/proc/{process.pid}/wchan").read_text()


def test_a_reader_that_stalls_misses_what_leaves_the_listing_and_a_gap_says_so(
    redpipe, fake_reddit, database
):
    first = add_posts(fake_reddit, range(900))
    process = redpipe.start("--print", "--interval=1", database, "python")
    wait_for(lambda: is_blocked_in_write(process))
    add_posts(fake_reddit, range(900, 2100))
    asked = len(fake_reddit.requests())
    time.sleep(0.5)
    assert len(fake_reddit.requests()) == asked  # it waits, and asks for nothing
    seen = []
    while len(seen) < 1900:
        seen += ids(process.stdout.readline())
    wait_for(lambda: len(stored(database)) == len(seen))
    assert redpipe.stop(process).status == -signal.SIGTERM
    assert set(first) <= set(seen)
    assert query(database, "SELECT count(*) FROM gaps") == [(1,)]
