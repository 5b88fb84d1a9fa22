"""Many processes on one database: all are right, and none fails with a lock."""

from __future__ import annotations

import json
import random
import sqlite3
import time
from contextlib import closing, contextmanager, nullcontext

import pytest

from conftest import APP, add_posts, query, stored
from fake_reddit import Budget, make_post

NAMES = ("python", "rust")


@contextmanager
def long_select(path):
    """Read the database, and do not come to the end of it."""
    with closing(sqlite3.connect(path)) as connection:
        reading = connection.execute("SELECT id FROM posts, (SELECT 1 UNION SELECT 2)")
        assert reading.fetchone()
        yield


@pytest.fixture
def run_together(redpipe, fake_reddit, database):
    """Give what starts runs at once, and sees each end well."""
    fake_reddit.budgets["json"] = Budget(total=1_000_000)

    def run(count, *options):
        command = ["--once", *options, database, "python"]
        processes = [redpipe.start(*command) for _ in range(count)]
        for process in processes:
            assert process.communicate(timeout=200) == ("", "")
            assert process.returncode == 0

    return run


@pytest.mark.parametrize(
    "count",
    [8, pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(600)])],
)
def test_runs_beside_a_follower_and_a_reader_store_each_post_once(
    count, redpipe, run_together, fake_reddit, database
):
    add_posts(fake_reddit, range(300))
    run_together(1)
    add_posts(fake_reddit, range(300, 700))
    with long_select(database):
        follower = redpipe.start("--interval=1", database, "python")
        run_together(count)
        assert redpipe.stop(follower).err == ""
    assert query(database, "SELECT count(*) FROM gaps") == [(0,)]
    assert stored(database) == fake_reddit.listing_ids("python")[::-1]


def test_runs_that_make_the_database_together_agree(run_together, fake_reddit, database):
    add_posts(fake_reddit, range(50))
    run_together(6)
    assert len(stored(database)) == 50


def test_runs_that_find_the_same_gap_name_it_once(run_together, fake_reddit, database):
    began = int(time.time()) - 5000
    for n in range(1300):
        if n == 20:
            run_together(1)
        fake_reddit.add(make_post(n, began + n, "python"))
    run_together(5, "--quiet")  # or each would warn of it
    # The cursor less 30 s of lateness; the newest of the last ten of 1000 posts.
    gaps = query(database, "SELECT subreddit, after_utc, before_utc FROM gaps")
    assert gaps == [("python", began + 19 - 30, began + 300 + 9)]
    assert not set(fake_reddit.listing_ids("python")) - set(stored(database))
    assert len(stored(database)) == 1020


class Household:
    """A follower, cron's runs, rechecks, imports and readers on one database, and their Reddit.

    What each command last did is told by its exit status: 0, or the signal it was sent.
    """

    def __init__(self, redpipe, reddit, path, seed):
        self.redpipe, self.reddit, self.path = redpipe, reddit, path
        self.dice = random.Random(seed)
        self.added = []
        self.deleted = set()
        self.follower = self.start("--interval=1")

    def start(self, *options):
        return self.redpipe.start(*options, self.path, *NAMES, **APP)

    def take_turn(self, turn):
        """Start what the turn is for."""
        if turn % 5 == 4:
            self.follower.kill()
            self.follower.communicate()
            self.follower = self.start("--interval=1")
            return []
        options = [
            (["--once"], ["--once"]),
            (["--recheck=0", "--field=score"],),
            ([f"--from={self.dump()}"],),
            (["--status"],),
        ]
        return [self.start(*words) for words in options[turn % 5]]

    def dump(self):
        """Write a dump of posts as they were when they were new, deleted ones and others."""
        file = self.path.with_suffix(".ndjson")
        chosen = self.dice.sample(self.added, min(200, len(self.added)))
        file.write_text("".join(json.dumps(post) + "\n" for post in chosen))
        return file

    def post(self, count):
        """Add posts, and let a fifth as many of the older ones be deleted."""
        for _ in range(count):
            n = len(self.added)
            post = make_post(n, int(time.time()), NAMES[n % 2])
            self.added.append(dict(post))
            self.reddit.add(post)
            if self.dice.random() < 0.2:
                gone = self.dice.choice(self.added)["id"]
                self.deleted.add(gone)
                self.reddit.take_down(gone)

    def live(self, turns):
        """Let so many turns pass, and look at what each process leaves."""
        for turn in range(turns):
            self.post(40)
            with long_select(self.path) if turn else nullcontext():
                for process in self.take_turn(turn):
                    _, err = process.communicate(timeout=60)
                    assert (process.returncode, err) == (0, "")
        assert self.redpipe.stop(self.follower).err == ""
        for option in ("--once", "--recheck=0"):
            assert self.start(option).communicate(timeout=60) == ("", "")

    def check(self):
        """Compare the database with what Reddit had and has."""
        kept = set(stored(self.path))
        assert query(self.path, "SELECT * FROM gaps") == []
        there = {post["id"]: post["title"] for post in self.added if post["id"] not in self.deleted}
        assert kept - self.deleted == there.keys()  # what was deleted at once, nobody saw
        whole = "SELECT id, title FROM posts WHERE erased_utc IS NULL"
        assert dict(query(self.path, whole)) == there
        erased = "SELECT DISTINCT title FROM posts WHERE erased_utc IS NOT NULL"
        assert query(self.path, erased) == [(None,)]


@pytest.mark.parametrize(
    "turns",
    [6, pytest.param(150, marks=[pytest.mark.long, pytest.mark.timeout(600)])],
)
def test_a_follower_cron_rechecks_imports_and_readers_agree(
    turns, redpipe, fake_reddit, database, seed
):
    fake_reddit.budgets["oauth"] = None
    household = Household(redpipe, fake_reddit, database, seed)
    household.live(turns)
    household.check()
