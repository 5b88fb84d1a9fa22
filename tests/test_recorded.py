"""What was recorded of the real Reddit goes through the pipeline unharmed."""

from __future__ import annotations

import json
import lzma
import re
from itertools import islice

import pytest

from conftest import query
from fake_reddit import Budget, FakeReddit
from pipeline import Access, Database, Reddit, http_fetch, load, transform
from virtual import VirtualClock, stream

ROWS = (
    "SELECT id, created_utc, subreddit, title, author, author_name, permalink FROM posts"
    " ORDER BY id"
)


def posts_in(body):
    """Give the posts of a listing."""
    children = json.loads(body)["data"]["children"]
    return [child["data"] for child in children if child["kind"] == "t3"]


def newest(body):
    """Give the time of a listing's newest post; recorded was it not long after that."""
    return max((post["created_utc"] for post in posts_in(body)), default=0)


@pytest.fixture(scope="module")
def recorded(samples):
    """Give the recorded listings, byte for byte, in the order in which they may have come."""
    return sorted((path.read_bytes() for path in samples.glob("listings/*.json")), key=newest)


def expected_row(post):
    """Make the row of a recorded post without any of the product's functions."""
    return (
        post["id"],
        int(float(post["created_utc"])),
        post.get("subreddit"),
        post["title"],
        post.get("author_fullname"),
        None if post.get("author") == "[deleted]" else post.get("author"),
        post["permalink"].partition("?")[0],
    )


def expected_rows(bodies):
    """Read the rows out of listings: the first value counts that is not missing."""
    rows = {}
    for row in (expected_row(post) for body in bodies for post in posts_in(body)):
        known = rows.get(row[0], row)
        filled = [new if old is None else old for old, new in zip(known, row, strict=True)]
        rows[row[0]] = tuple(filled)
    return sorted(rows.values())


def test_every_recorded_post_is_stored_once_with_the_right_columns(recorded, database):
    clock = VirtualClock()
    with FakeReddit(clock) as fake, Database(str(database), clock=clock) as opened:
        fake.budgets["json"] = Budget(total=10_000)
        fake.serve_listing_bytes(*recorded)
        reddit = Reddit(Access(url=fake.url), http_fetch(), clock)
        for batch in stream(reddit, ["all"], opened):
            load(opened, map(transform, batch.posts), batch.cursors, batch.gaps)
            if not fake.recorded:
                break
    assert len(recorded) == 188
    assert len(expected_rows(recorded)) == 3921
    assert query(database, ROWS) == expected_rows(recorded)


def test_recorded_listings_are_imported_whole(recorded, redpipe, file, database):
    file.write_bytes(b"".join(json.dumps(json.loads(body)).encode() + b"\n" for body in recorded))
    assert redpipe("--from", file, database) == (0, "", "")
    ids = [row[0] for row in expected_rows(recorded)]
    assert query(database, "SELECT id FROM posts ORDER BY id") == [(one,) for one in ids]


ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


@pytest.mark.parametrize("count", [1500, pytest.param(38_503, marks=pytest.mark.long)])
def test_posts_of_a_dump_are_stored_column_for_column(redpipe, samples, database, count):
    with lzma.open(samples / "posts.ndjson.xz", "rt", encoding="utf-8", newline="\n") as source:
        lines = list(islice(source, count))
    assert len(lines) == count
    posts = [json.loads(line) for line in lines]
    for post in posts:
        post["title"] = re.sub("&(?:lt|gt|amp);", lambda it: ENTITIES[it[0]], post["title"])
    for _ in range(2):  # the second import changes nothing
        assert redpipe("--from=-", database, stdin="".join(lines), timeout=60) == (0, "", "")
        assert query(database, ROWS) == sorted(map(expected_row, posts))
