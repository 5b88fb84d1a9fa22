"""--status: what is stored of each name, and how complete it is."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from artefact import wait_for
from pipeline import Cursor, Database, Gap, load, survey, transform

DAY = 86400
TODAY = 20_000 * DAY
"""Midnight of 2024-10-04, in UTC."""


def fill(path, posts, cursors, gaps=()):
    """Store posts of (subreddit, day, count), days counted from today's, at noon."""
    rows = [
        transform({"id": f"{n:x}{i:04}", "subreddit": name, "created_utc": day + DAY // 2})
        for n, (name, day, count) in enumerate(posts)
        for i in range(count)
    ]
    with Database(str(path)) as database:
        load(database, rows, cursors)
        for name, after, before in gaps:
            newest = database.cursor(name).newest_utc
            load(database, [], [], [Gap(name, newest - after, before, before)])


@pytest.fixture
def today():
    """Return midnight before now, in UTC."""
    return int(time.time()) // DAY * DAY


def table(program, database, names, now):
    found = survey(str(database), now // DAY - 13)
    known = {cursor.subreddit: cursor for cursor in found.cursors}
    cursors = [known.get(name, Cursor(name, 0, 0, 0)) for name in names]
    return [line.rstrip() for line in program.status_table(found, cursors, now)]


TABLE = """\
name                   since      until               poll      posts gaps     span last 14 days
python                 2024-09-14 2024-10-04 11:59    12 s         55    2   50 min █▂▁▁▁▁▁▁!▁▁▅!▃
rust                   2024-09-30 2024-10-02 00:00    36 h         17    0          ·········▁▅█▁·
all                    2024-10-04 2024-10-04 11:59     0 s         74    0          ·············▄
go                     -          -                  never          1    0          ··············
"""


def test_it_shows_each_name_in_a_table(program, database):
    now = TODAY + DAY // 2
    posts = [
        ("Python", TODAY - 40 * DAY, 30),
        ("Python", TODAY - 13 * DAY, 14),
        ("python", TODAY - 12 * DAY, 1),
        ("python", TODAY - 2 * DAY, 7),
        ("python", TODAY, 3),
        ("rust", TODAY - 10 * DAY, 5),
        ("rust", TODAY - 3 * DAY, 4),
        ("Rust", TODAY - 2 * DAY, 8),
        ("go", TODAY, 1),
        (None, TODAY, 1),
    ]
    cursors = [
        Cursor("python", TODAY - 20 * DAY, now - 30, now - 12),
        Cursor("rust", TODAY - 4 * DAY, TODAY - 2 * DAY, TODAY - DAY),
        Cursor("all", now - 60, now - 3, now),
    ]
    gaps = [("python", TODAY - 5 * DAY, TODAY - 5 * DAY + 3000), ("python", TODAY - 90, TODAY - 80)]
    fill(database, posts, cursors, gaps)
    assert table(program, database, ["python", "rust", "all", "go"], now) == TABLE.splitlines()


def test_it_is_at_most_100_columns_wide_and_cuts_names_only(program, database):
    now, name = TODAY, "a_rather_long_name_and_more_than_reddit_allows"
    gap = (name, 100, now - 300 * DAY)
    fill(database, [(name, TODAY, 1234)], [Cursor(name, 1, now, now - 5000)], [gap])
    heading, line = table(program, database, [name], now)
    assert len(line) <= 100
    assert len(heading) <= 100
    assert line == (
        "a_rather_long_name_and 1970-01-01 2024-10-04 00:00"
        "  83 min      1,234    1 19,699 d ▁▁▁▁▁▁▁▁▁▁▁▁▁█"
    )


# The command


def test_a_database_that_is_polled_is_shown_in_utf_8_and_unchanged(redpipe, database, today):
    now = int(time.time())
    fill(database, [("python", today, 2)], [Cursor("python", today, today, now - 3000)])
    before = database.read_bytes()
    done = redpipe("--status", database)
    assert (done.status, done.err) == (0, "")
    for locale in ({"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {"PYTHONIOENCODING": "ascii"}):
        assert redpipe("--status", database, **locale) == done
    assert database.read_bytes() == before
    assert [path.name for path in database.parent.glob("posts*")] == ["posts.db"]
    heading, line, total = done.out.splitlines()
    assert " ".join(heading.split()) == "name since until poll posts gaps span last 14 days"
    assert line.split()[0] == "python"
    assert line.endswith("·············█")
    assert total == f"2 posts, 0 erased, 0 gaps, {database.stat().st_size / 1e6:.1f} MB in all"


def test_names_that_were_not_polled_within_an_hour_end_it_with_75(redpipe, database, today):
    now = int(time.time())
    names = [f"name{n:03}" for n in range(200)]
    cursors = [Cursor(name, today, today, now - 3700) for name in names]
    fill(database, [], [*cursors, Cursor("rust", today, today, now)])
    done = redpipe("--status", database)
    assert done.status == 75
    assert len(done.out.splitlines()) == 203
    assert done.err == (
        "redpipe: r/name000, r/name001, r/name002, r/name003, r/name004 and 195 more:"
        " not polled within the last hour\n"
    )
    assert redpipe("--status", database, "r/Rust").status == 0
    assert redpipe("--status", database, "all").status == 75
    done = redpipe("--status", database, "rust", "name000")
    assert done.status == 75
    assert [line.split()[0] for line in done.out.splitlines()] == ["name", "rust", "name000", "0"]
    done = redpipe("--status", database, "never_seen")
    assert done.status == 75
    assert done.out.splitlines()[1].split()[:5] == ["never_seen", "-", "-", "never", "0"]


def test_a_database_of_imported_posts_alone_has_no_names(redpipe, database):
    fill(database, [("python", TODAY, 3)], [])
    done = redpipe("--status", database)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[1].startswith("3 posts, 0 erased, 0 gaps, ")


def test_where_there_is_no_database_none_is_made(redpipe, database):
    done = redpipe("--status", "posts.db")
    assert done == (73, "", f"redpipe: {database}: there is no database\n")
    assert not database.exists()
    database.touch()
    assert redpipe("--status", database) == done
    assert database.stat().st_size == 0


def test_it_works_beside_a_writer_in_the_middle_of_a_transaction(redpipe, database, today):
    fill(database, [("python", today, 5)], [])
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM posts")
        done = redpipe("--status", database)
        writer.execute("COMMIT")
    assert done.status == 0
    assert "5 posts, 0 erased, 0 gaps" in done.out


def test_a_database_that_may_not_be_written_can_be_shown(redpipe, database, today):
    fill(database, [("python", today, 5)], [])
    command = [*redpipe.command, "--status", database]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may write anything, and there is no setpriv to give that up")
        drop = "--bounding-set=-dac_override,-dac_read_search,-fowner"
        command = ["setpriv", drop, "--inh-caps=-all", *command]
    database.chmod(0o444)
    database.parent.chmod(0o555)
    try:
        process = redpipe.start_through(*command)
        out, err = process.communicate(timeout=20)
    finally:
        database.parent.chmod(0o755)
    assert (process.returncode, err) == (0, "")
    assert "5 posts, 0 erased, 0 gaps" in out


MANY = """
INSERT INTO posts (id, created_utc, subreddit, title, permalink)
WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers LIMIT ?1)
SELECT printf('%07x', n), ?2 - n * 40 * 86400 / ?1, 'Name' || n % 20,
    'Invented post number ' || n || ' with a title of a usual length',
    '/r/Name/comments/' || n || '/invented_post_number/' FROM numbers
"""


def many_posts(path, count):
    """Store posts of 20 names over 40 days, and their cursors."""
    now = int(time.time())
    with Database(str(path)) as database:
        database.execute(MANY, (count, now))
        load(database, [], [Cursor(f"name{n}", now - 40 * DAY, now, now) for n in range(20)])


def test_it_locks_nothing_and_a_signal_is_heard_while_posts_are_counted(redpipe, database):
    many_posts(database, 100_000)
    with closing(sqlite3.connect(database, timeout=0)) as writer:
        process = redpipe.start("--status", database)
        while process.poll() is None:
            with writer:
                writer.execute("UPDATE cursors SET polled_utc = polled_utc")
            time.sleep(0.005)
    assert process.returncode == 0
    assert len(process.stdout.read().splitlines()) == 22
    process = redpipe.start("--status", database)
    wait_for(lambda: Path(f"{database}-shm").exists())
    assert redpipe.stop(process) == (-signal.SIGTERM, "", "")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_million_posts_are_counted_within_two_seconds(redpipe, database):
    many_posts(database, 1_000_000)
    taken = []
    for _ in range(3):  # the best of them: others use this machine, too
        began = time.monotonic()
        assert redpipe("--status", database).status == 0
        taken.append(time.monotonic() - began)
    assert min(taken) < 2
