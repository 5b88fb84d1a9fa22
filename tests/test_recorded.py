"""What was recorded of the real Reddit goes through the pipeline unharmed."""

from __future__ import annotations

import json
import signal
import sqlite3

import pytest

from artefact import wait_for
from conftest import count_posts
from fake_reddit import Budget, FakeReddit
from pipeline import Access, Database, Reddit, http_fetch, load, stream, transform
from virtual import VirtualClock

COLUMNS = "id, created_utc, subreddit, title, author, author_name, permalink"


def newest(body):
    """Give the time of a listing's newest post; recorded was it not long after that."""
    children = json.loads(body)["data"]["children"]
    return max((it["data"]["created_utc"] for it in children if it["kind"] == "t3"), default=0)


@pytest.fixture(scope="module")
def recorded(samples):
    """Give the recorded listings, byte for byte, in the order in which they may have come."""
    return sorted((path.read_bytes() for path in samples.glob("listings/*.json")), key=newest)


def expected_rows(bodies):
    """Read the rows out of listings: the first value counts that is not missing."""
    rows = {}
    for body in bodies:
        for child in json.loads(body)["data"]["children"]:
            if child["kind"] == "t3":
                post = child["data"]
                row = (
                    post["id"],
                    int(post["created_utc"]),
                    post.get("subreddit"),
                    post["title"],
                    post.get("author_fullname"),
                    None if post.get("author") == "[deleted]" else post.get("author"),
                    post["permalink"].partition("?")[0],
                )
                known = rows.get(post["id"], row)
                rows[post["id"]] = tuple(
                    new if old is None else old for old, new in zip(known, row, strict=True)
                )
    return sorted(rows.values())


def stored_rows(path):
    """Read the rows of a database by plain SQL."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute(f"SELECT {COLUMNS} FROM posts ORDER BY id").fetchall()
    connection.close()
    return rows


def test_every_recorded_post_is_stored_once_with_the_right_columns(recorded, tmp_path):
    clock = VirtualClock()
    path = tmp_path / "posts.db"
    with FakeReddit(clock) as fake, Database(str(path), clock=clock) as database:
        fake.budgets["json"] = Budget(total=10_000)
        fake.serve_listing_bytes(*recorded)
        reddit = Reddit(Access(url=fake.url), http_fetch(), clock)
        for batch in stream(reddit, ["all"], database):
            load(database, map(transform, batch.posts), batch.cursors, batch.gaps)
            if not fake.recorded:
                break
    assert len(recorded) == 188
    assert len(expected_rows(recorded)) == 3921
    assert stored_rows(path) == expected_rows(recorded)


def test_a_stopped_follower_goes_on_without_losing_or_repeating_a_post(
    recorded, redpipe, fake_reddit, tmp_path
):
    path = tmp_path / "posts.db"
    fake_reddit.budgets["json"] = Budget(total=10_000)
    for half, until_then in ((recorded[-5:-2], recorded[-5:-2]), (recorded[-3:], recorded[-5:])):
        fake_reddit.serve_listing_bytes(*half)
        process = redpipe.start("--interval=1", path)
        expected = len(expected_rows(until_then))
        wait_for(lambda count=expected: count_posts(path) >= count)
        assert redpipe.stop(process) == (-signal.SIGTERM, "", "")
    assert stored_rows(path) == expected_rows(recorded[-5:])
