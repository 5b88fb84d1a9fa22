"""Many processes on one database: all are right, and none fails with a lock."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import time

import pytest

from conftest import APP, add_posts, query, stored
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
    assert query(path, "SELECT count(*) FROM gaps") == [(0,)]
    assert stored(path) == reddit.listing_ids("python")[::-1]


def test_twelve_runs_at_once_store_each_post_once(redpipe, fake_reddit, tmp_path):
    run_together(redpipe, fake_reddit, tmp_path / "posts.db", 12)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_fifty_runs_at_once_store_each_post_once(redpipe, fake_reddit, tmp_path):
    run_together(redpipe, fake_reddit, tmp_path / "posts.db", 50)


def test_runs_that_make_the_database_together_agree(redpipe, fake_reddit, tmp_path):
    path = tmp_path / "posts.db"
    fake_reddit.budgets["json"] = Budget(total=1_000_000)
    add_posts(fake_reddit, range(50))
    for process in [redpipe.start("--once", path, "python") for _ in range(6)]:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out, err) == (0, "", "")
    assert len(stored(path)) == 50


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
    gaps, kept = query(path, "SELECT subreddit, after_utc, before_utc FROM gaps"), stored(path)
    # The cursor less 30 s of lateness; the newest of the last ten of 1000 posts.
    assert gaps == [("python", began + 19 - 30, began + 300 + 9)]
    assert not set(fake_reddit.listing_ids("python")) - set(kept)
    assert len(kept) == len(set(kept)) == 1020


NAMES = ("python", "rust")


class Household:
    """A follower, cron's runs, rechecks, imports and readers on one database, and their Reddit.

    What each command last did is told by its exit status: 0, or the signal it was sent.
    """

    def __init__(self, redpipe, reddit, path, seed: int) -> None:
        self.redpipe, self.reddit, self.path = redpipe, reddit, path
        self.dice = random.Random(seed)
        self.added: list[dict] = []
        self.deleted: set[str] = set()
        self.turns = {
            "--once": lambda: [self.start("--once"), self.start("--once")],
            "--recheck": lambda: [self.start("--recheck=0", "--field=score")],
            "--from": lambda: [self.start(f"--from={self.dump()}")],
            "--status": lambda: [self.start("--status")],
            "kill": self.kill_the_follower,
        }
        self.follower = self.start("--interval=1")

    def start(self, *options):
        names = () if options[0].startswith("--from") else NAMES
        return self.redpipe.start(*options, self.path, *names, **APP)

    def kill_the_follower(self):
        self.follower.kill()
        self.follower.communicate()
        self.follower = self.start("--interval=1")
        return []

    def dump(self):
        """Write a dump of posts as they were when they were new, deleted ones and others."""
        file = self.path.with_suffix(".ndjson")
        chosen = self.dice.sample(self.added, min(200, len(self.added)))
        file.write_text("".join(json.dumps(post) + "\n" for post in chosen))
        return file

    def post(self, count: int) -> None:
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

    def live(self, turns: int) -> None:
        """Let so many turns pass, and look at what each process leaves."""
        for turn in range(turns):
            self.post(40)
            with long_select(self.path) if turn else contextlib.nullcontext():
                for process in self.turns[[*self.turns][turn % len(self.turns)]]():
                    _, err = process.communicate(timeout=60)
                    assert (process.returncode, err) == (0, "")
        assert self.redpipe.stop(self.follower).err == ""
        for option in ("--once", "--recheck=0"):
            assert self.start(option).communicate(timeout=60) == ("", "")

    def check(self) -> None:
        """Compare the database with what Reddit had and has."""
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("SELECT * FROM gaps").fetchall() == []
            rows = connection.execute("SELECT id, title, erased_utc IS NULL FROM posts").fetchall()
        kept = {identifier for identifier, _, _ in rows}
        assert len(kept) == len(rows)
        there = {post["id"]: post["title"] for post in self.added if post["id"] not in self.deleted}
        assert kept - self.deleted == there.keys()  # what was deleted at once, nobody saw
        assert {known: title for known, title, whole in rows if whole} == there
        assert {title for _, title, whole in rows if not whole} == {None}


def live_together(redpipe, reddit, path, turns: int) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    reddit.budgets["oauth"] = None
    household = Household(redpipe, reddit, path, seed)
    household.live(turns)
    household.check()


def test_a_follower_cron_rechecks_imports_and_readers_agree(redpipe, fake_reddit, tmp_path):
    live_together(redpipe, fake_reddit, tmp_path / "posts.db", 6)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_they_agree_for_minutes(redpipe, fake_reddit, tmp_path):
    live_together(redpipe, fake_reddit, tmp_path / "posts.db", 150)
