"""Many processes on one database: all are right, and none fails with a lock."""

from __future__ import annotations

import contextlib
import sqlite3
import time

import pytest

from fake_reddit import Budget, make_post


@contextlib.contextmanager
def long_select(path):
    """Read the database, and do not come to the end of it."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        reading = connection.execute("SELECT id FROM posts, (SELECT 1 UNION SELECT 2)")
        assert reading.fetchone()
        yield


def run_together(redpipe, reddit, path, count: int) -> None:
    """Start runs at once, beside a follower and a reader; check what they leave."""
    reddit.budgets["json"] = Budget(total=1_000_000)
    began = time.time() - 900
    for n in range(300):
        reddit.add(make_post(n, began + n, "python"))
    assert redpipe("--once", path, "python") == (0, "", "")
    for n in range(300, 700):
        reddit.add(make_post(n, began + n, "python"))
    with long_select(path):
        follower = redpipe.start("--interval=1", path, "python")
        runs = [redpipe.start("--once", path, "python") for _ in range(count)]
        for process in runs:
            out, err = process.communicate(timeout=200)
            assert (process.returncode, out, err) == (0, "", "")
        assert redpipe.stop(follower).err == ""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        kept = [row[0] for row in connection.execute("SELECT id FROM posts")]
        assert connection.execute("SELECT count(*) FROM gaps").fetchall() == [(0,)]
    assert sorted(kept) == sorted(reddit.listing_ids("python"))


def test_twelve_runs_at_once_store_each_post_once(redpipe, fake_reddit, tmp_path):
    run_together(redpipe, fake_reddit, tmp_path / "posts.db", 12)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_fifty_runs_at_once_store_each_post_once(redpipe, fake_reddit, tmp_path):
    run_together(redpipe, fake_reddit, tmp_path / "posts.db", 50)


def test_runs_that_make_the_database_together_agree(redpipe, fake_reddit, tmp_path):
    path = tmp_path / "posts.db"
    fake_reddit.budgets["json"] = Budget(total=1_000_000)
    for n in range(50):
        fake_reddit.add(make_post(n, time.time() - 500 + n, "python"))
    for process in [redpipe.start("--once", path, "python") for _ in range(6)]:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out, err) == (0, "", "")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM posts").fetchall() == [(50,)]


def test_runs_that_find_the_same_gap_name_it_once(redpipe, fake_reddit, tmp_path):
    path = tmp_path / "posts.db"
    fake_reddit.budgets["json"] = Budget(total=1_000_000)
    began = int(time.time()) - 5000
    for n in range(1300):
        if n == 20:
            assert redpipe("--once", path, "python") == (0, "", "")
        fake_reddit.add(make_post(n, began + n, "python"))
    runs = [redpipe.start("--once", "--quiet", path, "python") for _ in range(6)]
    for process in runs:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out, err) == (0, "", "")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        gaps = connection.execute("SELECT subreddit, after_utc, before_utc FROM gaps").fetchall()
        kept = [row[0] for row in connection.execute("SELECT id FROM posts")]
    # The cursor less 30 s of lateness; the newest of the last ten of 1000 posts.
    assert gaps == [("python", began + 19 - 30, began + 300 + 9)]
    assert not set(fake_reddit.listing_ids("python")) - set(kept)
    assert len(kept) == len(set(kept)) == 1020
