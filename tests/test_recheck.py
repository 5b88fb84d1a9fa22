"""Asking again: what was deleted on Reddit is erased here, and what grew is refreshed."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import sqlite3
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import Terminal, change, start_on

import pipeline
from artefact import wait_for
from conftest import APP, Done, query
from fake_reddit import (
    GIANT,
    HANG,
    HTML,
    RESET,
    TRUNCATE,
    Budget,
    FakeReddit,
    block_page,
    error_reply,
    json_reply,
    listing,
    login_page,
    make_post,
    moved,
    reply,
    thing,
)
from pipeline import COLUMNS, Access, Database, ModestAsker, Reddit, load, parse_fields, transform
from virtual import Ended, SharedClock, VirtualClock, fetch_from, stream

WISHED = ("deleted", "author", "content_takedown", "copyright_takedown")
WISHED += ("anti_evil_ops", "community_ops")
FILTERED = ("moderator", "automod_filtered", "reddit")
SPECS = ("score", "selftext")
NOTHING = (None, None, None, None)
HOUR = 3600.0


class World:
    """A Reddit on a virtual clock, and a database that holds some of its posts."""

    def __init__(self, path, clock=None) -> None:
        self.path = str(path)
        self.clock = clock or VirtualClock()
        self.reddit = FakeReddit(self.clock)

    def fill(self, count, specs=SPECS, **fields):
        """List posts, and store them."""
        now = self.clock.now - 9
        posts = [self.reddit.add(make_post(n, now, **fields)) for n in range(count)]
        self.store(posts, specs)
        return posts

    def store(self, posts, specs=SPECS) -> int:
        """Store posts as a follower or an import does; return how many gained something."""
        fields = parse_fields(specs)
        with Database(self.path, fields, self.clock) as database:
            return load(database, [transform(dict(post), fields) for post in posts])

    def source(self) -> Reddit:
        access = Access("", "app-id", "app-secret")
        return Reddit(access, fetch_from(self.reddit, self.clock), self.clock)

    def recheck(self, hours=0.0, names=(), specs=SPECS) -> dict[str, int]:
        """Ask again; return what was counted."""
        fields = parse_fields(specs)
        asker = ModestAsker(self.source(), once=True, chance=lambda: 0.5)
        counts: Counter[str] = Counter()
        with Database(self.path, fields, self.clock) as database:
            for part in pipeline.recheck(asker, database, names, fields, hours):
                counts.update(part)
        return dict(counts)

    def rows(self, what):
        return query(self.path, f"SELECT {what} FROM posts ORDER BY rowid")

    def records(self):
        """Return whole rows, by column."""
        columns = [row[1] for row in query(self.path, "PRAGMA table_info(posts)")]
        return [dict(zip(columns, row, strict=True)) for row in self.rows("*")]

    def contents(self):
        """Return what can be erased of each post, as `known` gives it."""
        return self.rows("title, author, author_name, permalink")

    def asked(self) -> list[list[str]]:
        """Return the ids of each request for posts."""
        return [
            [name.removeprefix("t3_") for name in seen.query["id"].split(",")]
            for seen in self.reddit.requests("/api/info")
        ]


@pytest.fixture
def world(database):
    return World(database)


def known(post):
    return post["title"], post["author_fullname"], post["author"], post["permalink"]


def put(reddit, post, state):
    """Bring a post into a state."""
    if state == "purged":
        reddit.purge(post["id"])
    elif state == "nameless":
        reddit.forget_author(post["id"])
    elif state != "there":
        reddit.take_down(post["id"], state)


def kept_of(content, state):
    """Return what may be kept of a post that is in a state."""
    title, *_, permalink = content
    if state == "nameless":
        return title, None, None, permalink
    return content if state in ("there", *FILTERED) else NOTHING


# --- the command


def test_what_was_deleted_is_erased_and_the_rest_refreshed(redpipe, fake_reddit, database):
    posts = [fake_reddit.add(make_post(n, score=1)) for n in range(4)]
    assert redpipe("--once", "--field=score", database, "python", **APP) == (0, "", "")
    assert "4 posts, 0 erased, 0 gaps, " in redpipe("--status", database).out
    fake_reddit.take_down(posts[0]["id"], "deleted")
    fake_reddit.take_down(posts[1]["id"], "moderator")
    fake_reddit.forget_author(posts[2]["id"])
    posts[3]["score"] = 99
    assert redpipe("--recheck=0", "--field=score", database, **APP) == (0, "", "")
    assert len(fake_reddit.requests("/api/info")) == 1
    what = "title, author, author_name, permalink IS NULL, score, erased_utc > 0"
    assert query(database, f"SELECT {what} FROM posts ORDER BY rowid") == [
        (None, None, None, 1, None, 1),
        ("Invented post number 1", posts[1]["author_fullname"], "invented_1", 0, 1, None),
        ("Invented post number 2", None, None, 0, 1, None),
        ("Invented post number 3", posts[3]["author_fullname"], "invented_3", 0, 99, None),
    ]
    assert b"Invented post number 0" not in database.read_bytes()
    assert len(query(database, "SELECT * FROM recent_posts WHERE title IS NOT NULL")) == 3
    assert query(database, "SELECT count(*) FROM recent_posts") == [(3,)]
    assert query(database, "SELECT sum(posts) FROM posts_per_hour") == [(4,)]
    change(database, "UPDATE posts SET checked_utc = checked_utc - 7200")
    assert "4 posts, 1 erased, 0 gaps, last recheck 2 h ago, " in redpipe("--status", database).out


# --- what Reddit says of a post

ERASED = dict.fromkeys(("title", "author", "author_name", "permalink", "score", "selftext"))
ERASED |= dict.fromkeys(("media_type", "removed_by_category", "ups"))


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        ({}, {}),
        ({"score": 250, "ups": 251, "title": "Another", "permalink": "/x"}, {"score": 250}),
        ({"author": "other", "author_fullname": "t2_other", "subreddit": "rust"}, {}),
        ({"created_utc": 5.0}, {}),
        # NULL is a value; what is hidden or left out is none.
        ({"selftext": "Another text."}, {"selftext": "Another text."}),
        ({"selftext": ""}, {"selftext": ""}),
        ({"selftext": None}, {"selftext": None}),
        ({"selftext": ...}, {}),
        ({"selftext": "[removed]"}, {}),
        ({"selftext": "[deleted]"}, {}),
        ({"selftext": ["[removed]"]}, {"selftext": '["[removed]"]'}),
        ({"selftext": False}, {"selftext": 0}),
        ({"selftext": float("nan")}, {"selftext": None}),
        # A field inside an object is known by its own key.
        ({"media": {"type": "new", "oembed": None}}, {"media_type": "new"}),
        ({"media": {"type": None}}, {"media_type": None}),
        *[({"media": media}, {}) for media in ({"oembed": None}, {}, None, [], ...)],
        # Its account was deleted.
        ({"author": "[deleted]"}, {"author": None, "author_name": None}),
        # Its author wished it gone, or the law, or Reddit.
        *[({"removed_by_category": word}, ERASED) for word in WISHED],
        # A moderator or a filter did.
        *[({"removed_by_category": word}, {"removed_by_category": word}) for word in FILTERED],
        # Nobody knows what that is.
        ({"removed_by_category": ...}, {}),
        *[({"removed_by_category": it}, {"removed_by_category": it}) for it in ("", "else", 5)],
        ({"removed_by_category": ["deleted"]}, {"removed_by_category": '["deleted"]'}),
        ({"removed_by_category": {"deleted": 1}}, {"removed_by_category": '{"deleted": 1}'}),
    ],
    ids=str,
)
def test_a_stored_post_takes_what_reddit_says_of_it_and_nothing_else(world, now, changed):
    specs = ("score", "selftext", "media.type", "removed_by_category")
    fields = {"selftext": "Old text.", "media": {"type": "old"}}
    post, _ = world.fill(2, (*specs, "ups"), **fields)
    before, other = world.records()
    world.clock.advance(HOUR)
    world.reddit.posts[post["id"]] = make_post(0, **fields | now)
    erased = int(changed is ERASED)
    counts = {"due": 2, "asked": 2, "refreshed": 2 - erased, "erased": erased}
    assert world.recheck(specs=specs) == counts
    checked = {"checked_utc": int(world.clock.now)}
    if erased:
        changed = changed | {"erased_utc": int(world.clock.now)}
    assert world.records() == [before | changed | checked, other | checked]


def test_a_new_field_is_filled_and_a_column_of_another_case_refreshed(world):
    posts = world.fill(2, ["score"], num_comments=7)
    posts[0]["score"] = 5
    world.recheck(specs=["num_comments", "score:SCORE"])
    assert world.rows("num_comments, score") == [(7, 5), (7, 1)]


# --- left out


def without(posts, missing):
    """Answer with some posts, but for those numbers."""
    kept = [thing(post) for number, post in enumerate(posts) if number not in missing]
    return reply(200, listing(kept))


@pytest.mark.parametrize(
    ("purged", "left_out", "requests"),
    [
        pytest.param(1, [], 2, id="for good"),
        pytest.param(5, [], 2, id="half of them, for good"),
        pytest.param(0, [range(3, 6)], 2, id="once"),
        pytest.param(0, [range(1, 4), range(4, 7)], 2, id="by turns"),
        pytest.param(0, [range(6)] * 5, 6, id="more than half, which is not believed"),
    ],
)
def test_what_is_left_out_twice_is_erased(world, purged, left_out, requests):
    posts = world.fill(10)
    for post in posts[:purged]:
        world.reddit.purge(post["id"])
    world.reddit.script(*[without(posts, missing) for missing in left_out], on="/api/info")
    counts = {"due": 10, "asked": 10, "refreshed": 10 - purged, "erased": purged}
    assert world.recheck() == counts
    assert world.contents() == [NOTHING] * purged + [known(post) for post in posts[purged:]]
    assert world.asked() == [[post["id"] for post in posts]] * requests


# --- answers that are none

T1 = json.dumps({"kind": "t1", "data": {"id": "abc", "name": "t1_abc", "body": "Nobody said it."}})
T5 = json.dumps({"kind": "t5", "data": {"id": "2zzzz", "name": "t5_2zzzz"}})
NO_ID = json.dumps({"kind": "t3", "data": {"title": "Without an id"}})
DELETED = {"removed_by_category": "deleted", "author": "[deleted]"}
GONE = [thing(make_post(n, **DELETED)) for n in range(10)]
OTHERS = [thing(make_post(n)) for n in range(200, 210)]

NO_ANSWERS = {
    "a comment among them": reply(200, listing([*GONE[:9], T1])),
    "a subreddit among them": reply(200, listing([*GONE, T5])),
    "a post without an id": reply(200, listing([*GONE[:9], NO_ID])),
    "no thing": reply(200, listing([*GONE, "null"])),
    "less than half of it": reply(200, listing(GONE[:4])),
    "an empty listing": reply(200, listing([])),
    "other posts": reply(200, listing(OTHERS)),
    "another post among them": reply(200, listing([*GONE[:9], OTHERS[0]])),
    "half of it others": reply(200, listing([*GONE[:5], *OTHERS[:5]])),
    "an error object": json_reply(200, {"error": 500, "message": "Oops"}),
    "an error in words": json_reply(200, {"error": "invalid_request"}),
    "an array": reply(200, "[]"),
    "null": reply(200, "null"),
    "nothing": reply(200),
    "half a listing": reply(200, listing(GONE)[:2000]),
    "another listing": json_reply(200, {"kind": "Listing", "data": {"children": None}}),
    "a page for people": reply(200, "<!doctype html><title>Reddit</title>", HTML),
    "a login page": login_page(),
    "a block page": block_page(),
    "a redirect": moved("/login.json"),
    "the search for subreddits": moved("/subreddits/search?q=x"),
    "401": error_reply(401, "Unauthorized"),
    "403": error_reply(403, "Forbidden"),
    "403 private": error_reply(403, "Forbidden", reason="private"),
    "404": error_reply(404, "Not Found"),
    "400": error_reply(400, "Bad Request", reason="TOO_MANY_THING_IDS"),
    "404 with posts": reply(404, listing(GONE)),
    "500 with posts": reply(500, listing(GONE)),
    "429": error_reply(429, "Too Many Requests"),
    "414": reply(414, "<html>414</html>", HTML),
    "451": reply(451),
    "503": reply(503),
    "a reset": RESET,
    "a hang": HANG,
    "a truncated answer": TRUNCATE,
    "a giant answer": GIANT,
}


@pytest.mark.parametrize("answer", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_an_answer_that_is_none_changes_nothing_and_is_asked_for_again(world, answer):
    posts = world.fill(10)
    before = world.records()
    world.reddit.faults = lambda method, path, query: answer if path == "/api/info" else None
    with pytest.raises((pipeline.Failed, pipeline.Refused)):
        world.recheck()
    assert world.records() == before
    world.reddit.faults = None
    world.reddit.log.clear()
    posts += [world.reddit.add(make_post(n)) for n in range(10, 110)]
    world.store(posts)
    world.reddit.script(None, answer, answer, on="/api/info")
    assert world.recheck() == {"due": 110, "asked": 110, "refreshed": 110, "erased": 0}
    assert world.contents() == [known(post) for post in posts]
    assert [len(ids) for ids in world.asked()] == [100, 10, 10, 10]


# --- whatever comes

STATES = ("there", "there", "there", "nameless", "purged", *WISHED, *FILTERED)
# What some requests get: no answer, one that knows too little (the share, as a fixed one may be
# enough where few are asked for), or a part, then the truth:
# what is left out twice in a row counts as gone.
WEATHER = st.lists(
    st.sampled_from(sorted({*NO_ANSWERS} - {"less than half of it"})).map(lambda name: [name])
    | st.floats(0.55, 1).map(lambda share: [share])
    | st.floats(0, 0.5).map(lambda share: [share, 0.0]),
    max_size=8,
).map(lambda parts: list(itertools.chain(*parts)))


def said(reddit, answers, dice, method, path, query):
    """Answer a request for posts by the weather: no answer, or all but a share of them."""
    if path != "/api/info" or not answers:
        return None
    answer = answers.pop(0)
    if isinstance(answer, str):
        return NO_ANSWERS[answer]
    names = [name.removeprefix("t3_") for name in query["id"].split(",")]
    shown = [post for name in names if (post := reddit.posts.get(name))]
    dice.shuffle(shown)
    left_out = int(answer * len(names)) + (answer > 0.5)  # more than half, of two posts, too
    return reply(200, listing([thing(post) for post in shown[left_out:]]))


@settings(max_examples=60, deadline=None)
@given(
    states=st.lists(st.sampled_from(STATES), min_size=1, max_size=230),
    runs=st.lists(WEATHER, min_size=1, max_size=3),
    dice=st.randoms(use_true_random=False),
)
def test_nothing_that_reddit_still_shows_is_ever_erased(states, runs, dice):
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder, "posts.db"))
        posts = world.fill(len(states))
        before = [known(post) for post in posts]
        for post, state in zip(posts, states, strict=True):
            put(world.reddit, post, state)
        for answers in [*runs, [], []]:
            world.reddit.faults = partial(said, world.reddit, [*answers], dice)
            world.clock.advance(HOUR)
            whole = False
            with suppress(pipeline.Failed, pipeline.Refused):
                world.recheck(hours=0.5)
                whole = True
            for content, found, state in zip(before, world.contents(), states, strict=True):
                assert found == kept_of(content, state) or (found == content and not whole)


# --- erased is erased


@pytest.mark.parametrize("state", ["deleted", "purged", "nameless"])
def test_erased_stays_erased_whatever_comes_later(world, state):
    post = world.fill(10, score=5)[0]
    copy, content = dict(post), known(post)
    put(world.reddit, post, state)
    world.recheck()
    assert world.contents()[0] == kept_of(content, state)
    keys = ("id", "title", "author", "subreddit", "created_utc", "permalink")  # the feed's
    others = [{key: copy[key] for key in keys}, {"id": copy["id"]}]
    others += [{**copy, "author": None}, {**copy, "author_fullname": None}]
    for thing_seen in (copy, *others):
        for specs in ((), SPECS, ("url", "num_comments:n")):
            gained = world.store([thing_seen], specs)
            assert not gained or (state == "nameless" and "url" in specs)
            assert world.contents()[0] == kept_of(content, state)
    world.clock.advance(HOUR)
    world.reddit.posts[post["id"]] = copy
    due = 9 + (state == "nameless")  # what was erased is not asked for again
    assert world.recheck(specs=("url", "score"))["due"] == due
    assert world.contents()[0] == kept_of(content, state)
    row = world.records()[0]
    if state == "nameless":  # what it gains is no name
        assert (row["score"], row["url"]) == (5, copy["url"])
    else:
        lasting = {"id", "created_utc", "subreddit", "stored_utc", "checked_utc", "erased_utc"}
        assert {column for column, value in row.items() if value is not None} == lasting


def test_a_post_from_the_feed_may_still_be_given_its_account_id(world):
    post = make_post(1)
    from_feed = {key: value for key, value in post.items() if key != "author_fullname"}
    world.reddit.add(from_feed)
    world.store([from_feed])
    world.recheck()
    assert world.contents() == [(post["title"], None, post["author"], post["permalink"])]
    with Database(world.path) as database:
        assert database.unstored([post]) == [post]
    assert world.store([post]) == 1
    assert world.contents() == [known(post)]


def test_what_another_recheck_erased_meanwhile_stays_erased(world):
    posts = world.fill(2, score=5)

    def erase(method, path, asked):
        if path == "/api/info":
            with Database(world.path, (), world.clock) as other:
                other.revise({posts[0]["id"]: None})

    world.reddit.faults = erase
    world.recheck()
    assert world.contents()[0] == NOTHING
    assert world.rows("score") == [(None,), (5,)]


def test_an_open_follower_and_import_bring_nothing_back(world):
    (post,) = world.fill(1, score=5)
    copy = dict(post)
    fields = parse_fields(["score"])
    row = transform(dict(copy), fields)
    with Database(world.path, fields, world.clock) as one, Database(world.path) as two:
        world.reddit.take_down(post["id"])
        world.recheck(specs=["url"])
        assert load(one, [row]) == load(two, [row]) == 0
        assert one.unstored([copy]) == two.unstored([copy]) == []
    assert world.contents() == [NOTHING]


def test_print_passes_on_no_erased_post_again(redpipe, fake_reddit, database):
    posts = [fake_reddit.add(make_post(n)) for n in range(5)]
    copies = [dict(post) for post in posts]
    options = ("--print", "--once", database, "python")
    assert len(redpipe(*options, **APP).out.splitlines()) == 5
    fake_reddit.take_down(posts[1]["id"])
    fake_reddit.forget_author(posts[2]["id"])
    assert redpipe("--recheck=0", database, **APP) == (0, "", "")
    for copy in copies:  # an old page, from a cache
        fake_reddit.add(copy)
    new = fake_reddit.add(make_post(7, 1_790_000_005))
    lines = redpipe(*options, **APP).out.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [new["id"]]


def test_the_file_holds_nothing_of_what_was_erased(world):
    posts = [world.reddit.add(make_post(n)) for n in range(300)]
    for n, post in enumerate(posts):
        secret = f"secret-{n}-" + "x" * (n % 7 * 30)
        post |= {"title": f"T{secret}", "author": f"A{secret}", "author_fullname": f"t2_{secret}"}
        post |= {"permalink": f"/P{secret}", "selftext": f"S{secret}" * 100}
    for start in range(0, 300, 50):
        world.store(posts[start : start + 50])
    for post in posts[::3]:
        world.reddit.take_down(post["id"])
    world.recheck()
    world.clock.advance(HOUR)
    for post in posts[1::3]:
        world.reddit.purge(post["id"])
    posts[2]["score"] = 100_000
    world.recheck()
    data = Path(world.path).read_bytes()
    found = {n for n in range(300) if f"secret-{n}-".encode() in data}
    assert found == set(range(2, 300, 3))
    assert not Path(f"{world.path}-wal").exists()


def test_columns_of_the_users_own_do_not_break_it(world):
    posts = world.fill(3, ["score"])
    columns = [
        "loud AS (upper(title)) VIRTUAL",
        "kept AS (title || '!') VIRTUAL",
        "starred INTEGER NOT NULL DEFAULT 1",
        "checked TEXT NOT NULL DEFAULT ''",
        '"a note" TEXT',
    ]
    change(world.path, ";".join(f"ALTER TABLE posts ADD COLUMN {one}" for one in columns))
    change(world.path, "UPDATE posts SET [a note] = title")
    change(world.path, "CREATE UNIQUE INDEX links ON posts (permalink)")
    world.reddit.take_down(posts[0]["id"])
    world.reddit.take_down(posts[1]["id"])
    world.recheck(specs=["score", "score:kept"])
    title = posts[2]["title"]
    assert world.rows('loud, kept, starred, checked, "a note", score, erased_utc > 0') == [
        (None, None, 1, "", None, None, 1),
        (None, None, 1, "", None, None, 1),
        (title.upper(), f"{title}!", 1, "", title, 1, None),
    ]


# --- a database of version 1

VERSION_1 = """
CREATE TABLE posts (
    id TEXT PRIMARY KEY NOT NULL, created_utc INTEGER, subreddit TEXT, title TEXT,
    author TEXT, author_name TEXT, permalink TEXT, stored_utc INTEGER
);
CREATE INDEX posts_created_utc ON posts (created_utc);
CREATE TABLE cursors (
    subreddit TEXT PRIMARY KEY NOT NULL, since_utc INTEGER, newest_utc INTEGER, polled_utc INTEGER
);
CREATE TABLE gaps (
    subreddit TEXT, after_utc INTEGER, before_utc INTEGER, noticed_utc INTEGER
);
CREATE VIEW recent_posts AS
    SELECT strftime('%Y-%m-%dT%H:%M:%SZ', created_utc, 'unixepoch') AS created, subreddit,
        title, author_name, 'https://www.reddit.com' || permalink AS link
    FROM posts ORDER BY created_utc DESC;
CREATE VIEW posts_per_hour AS
    SELECT strftime('%Y-%m-%dT%H:00:00Z', created_utc, 'unixepoch') AS hour, count(*) AS posts
    FROM posts GROUP BY 1 ORDER BY 1 DESC;
CREATE VIEW coverage AS
    SELECT subreddit, strftime('%Y-%m-%dT%H:%M:%SZ', since_utc, 'unixepoch') AS since,
        strftime('%Y-%m-%dT%H:%M:%SZ', newest_utc, 'unixepoch') AS until,
        strftime('%Y-%m-%dT%H:%M:%SZ', polled_utc, 'unixepoch') AS last_poll,
        (SELECT count(*) FROM gaps WHERE gaps.subreddit = cursors.subreddit) AS gaps
    FROM cursors;
PRAGMA application_id = 0x72647069;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
ALTER TABLE posts ADD COLUMN "score";
INSERT INTO cursors VALUES ('python', 1, 1790000000, strftime('%s', 'now'));
INSERT INTO gaps VALUES ('python', 5, 6, 7);
"""
OLD = "id, created_utc, subreddit, title, author, author_name, permalink, stored_utc, score"
NEW = {"checked_utc", "erased_utc"}


def make_version_1(path, posts):
    """Write a database as version 1.0 made it."""
    change(path, VERSION_1)
    rows = [(p["id"], int(p["created_utc"]), p["subreddit"], *known(p), 1, 7) for p in posts]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany("INSERT INTO posts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


def contents(path):
    """Return all that a database of version 1 holds."""
    views = [f"SELECT * FROM {view}" for view in ("recent_posts", "posts_per_hour", "coverage")]
    tables = [f"SELECT {OLD} FROM posts ORDER BY rowid", "SELECT * FROM cursors, gaps"]
    return [query(path, sql) for sql in (*tables, *views)]


def columns_of(path):
    return [row[1] for row in query(path, "PRAGMA table_info(posts)")]


def version(path) -> int:
    """Return the version that the file's own header tells."""
    return int.from_bytes(path.read_bytes()[60:64], "big")


def test_a_database_of_version_1_is_shown_unchanged_and_brought_to_2(
    redpipe, fake_reddit, database
):
    posts = [fake_reddit.add(make_post(n)) for n in range(300)]
    make_version_1(database, posts)
    data, before = database.read_bytes(), contents(database)
    done = redpipe("--status", database)
    assert (done.status, done.err) == (0, "")
    assert "300 posts, 0 erased, 1 gap, " in done.out
    assert database.read_bytes() == data
    assert version(database) == 1
    assert redpipe("--from=-", database) == (0, "", "")
    assert version(database) == 2
    assert contents(database) == before
    assert columns_of(database) == [*COLUMNS, "stored_utc", "score", "checked_utc", "erased_utc"]
    fake_reddit.take_down(posts[0]["id"])
    assert redpipe("--recheck=0", "--field=score", database, **APP) == (0, "", "")
    assert query(database, "SELECT title, score FROM posts ORDER BY rowid LIMIT 2") == [
        (None, None),
        (posts[1]["title"], 1),
    ]
    assert len(query(database, "SELECT * FROM recent_posts")) == 299


def test_ten_processes_bring_it_to_2_together(redpipe, fake_reddit, database):
    fake_reddit.budgets["oauth"] = Budget(total=1_000_000)
    fake_reddit.create("rust")
    make_version_1(database, [make_post(n) for n in range(1000)])
    before = contents(database)[0]
    imports = [redpipe.start("--from=-", f"--field=f{n}", database) for n in range(8)]
    followers = [redpipe.start("--interval=1", database, "rust", **APP) for _ in range(2)]
    for process in imports:
        assert process.communicate("", timeout=60) == ("", "")
        assert process.returncode == 0
    wait_for(lambda: version(database) == 2)  # at once, beside those that go on
    for process in followers:
        assert redpipe.stop(process) == (-signal.SIGTERM, "", "")
    assert contents(database)[0] == before
    assert {*columns_of(database)} >= {*NEW, *(f"f{n}" for n in range(8))}


def has_open(process, path):
    """Tell whether a process that runs has a file open."""
    with suppress(FileNotFoundError):  # closed meanwhile
        return any(file.samefile(path) for file in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


def test_it_is_whole_whenever_it_is_killed_while_brought_to_2(redpipe, database, tmp_path, seed):
    dice = random.Random(seed)
    make_version_1(database, [make_post(n) for n in range(1000)])
    old, before = database.read_bytes(), contents(database)
    for _ in range(5):
        for kept in tmp_path.glob("posts.db*"):
            kept.unlink()
        database.write_bytes(old)
        process = redpipe.start("--from=-", "--field=ups", database)
        while not has_open(process, database):
            pass
        time.sleep(dice.uniform(0.0, 0.025))
        process.kill()
        process.communicate()
        assert query(database, "PRAGMA integrity_check") == [("ok",)]
        ((told,),) = query(database, "PRAGMA user_version")
        assert NEW & {*columns_of(database)} == (NEW if told == 2 else set())
        assert contents(database) == before
        assert redpipe("--from=-", database) == (0, "", "")
        assert version(database) == 2
        assert contents(database) == before


# --- which posts, in which order


def test_oldest_stored_first_a_hundred_a_request_each_answer_a_transaction(world):
    created = list(range(250))
    random.Random(5).shuffle(created)
    posts = [world.reddit.add(make_post(n, 1_700_000_000 + n)) for n in created]
    for start in range(0, 250, 50):
        world.store(posts[start : start + 50])
        world.clock.advance(5)
    committed = []

    def faults(method, path, asked):
        if path == "/api/info":
            committed.extend(world.rows("count(checked_utc)"))

    world.reddit.faults = faults
    assert world.recheck() == {"due": 250, "asked": 250, "refreshed": 250, "erased": 0}
    ids = [post["id"] for post in posts]
    assert world.asked() == [ids[:100], ids[100:200], ids[200:]]
    assert committed == [(0,), (100,), (200,)]
    assert world.reddit.requests("/api/info")[0].query.keys() == {"id", "raw_json"}


def test_hours_may_be_a_fraction_and_count_from_the_last_answer(world):
    (first,) = world.fill(1)
    second = world.reddit.add(make_post(1))
    one, two = [first["id"]], [second["id"]]
    world.clock.advance(1790)
    world.store([second])
    for seconds, hours, due in [
        (0, 0.5, []),
        (10, 0.5, one),  # stored 1800 s ago
        (1780, 0.5, []),
        (10, 0.5, two),  # stored 1800 s ago; the first was asked for since
        (20, 0.5, one),
        (0, 0, one + two),
    ]:
        world.clock.advance(seconds)
        asked = len(world.asked())
        assert world.recheck(hours)["due"] == len(due)
        assert world.asked()[asked:] == ([due] if due else [])


def test_a_post_of_an_unknown_time_is_due(world):
    world.fill(2)
    change(world.path, "UPDATE posts SET stored_utc = NULL WHERE rowid = 1")
    assert world.recheck(1000)["due"] == 1


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ([], {0, 1, 2, 3, 4}),
        (["python", "all"], {0, 1, 2, 3, 4}),
        (["python"], {0, 1}),
        (["rust", "go"], {2, 3}),
        (["nobody"], set()),
    ],
)
def test_names_select_without_regard_to_case(world, names, numbers):
    subreddits = ("Python", "pYTHON", "RUST", "go", None)
    posts = [make_post(n) | {"subreddit": name} for n, name in enumerate(subreddits)]
    world.store(map(world.reddit.add, posts))
    world.recheck(names=names)
    assert {*itertools.chain(*world.asked())} == {posts[number]["id"] for number in numbers}


def test_a_column_named_rowid_does_not_hide_the_order(world):
    world.fill(3, ["rowid"], rowid=-1)
    assert world.recheck(specs=["rowid"]) == {"due": 3, "asked": 3, "refreshed": 3, "erased": 0}


def fill(redpipe, fake_reddit, database, count, names=("python",)):
    """List posts of names by turns, and let them have been stored two hours ago."""
    subreddits = itertools.cycle(names)
    posts = [fake_reddit.add(make_post(n, subreddit=next(subreddits))) for n in range(count)]
    lines = "".join(json.dumps(post) + "\n" for post in posts)
    assert redpipe("--from=-", database, stdin=lines) == (0, "", "")
    change(database, "UPDATE posts SET stored_utc = stored_utc - 7200")
    return posts


def test_killed_in_the_middle_it_goes_on_where_it_was(redpipe, fake_reddit, database, seed):
    dice = random.Random(seed)
    posts = fill(redpipe, fake_reddit, database, 2000)
    fake_reddit.budgets["oauth"] = Budget(total=1_000_000)
    fake_reddit.faults = lambda method, path, query: time.sleep(0.05)
    for _ in range(3):
        process = redpipe.start("--recheck=1", database, **APP)
        ends = len(fake_reddit.requests("/api/info")) + dice.randrange(2, 5)
        wait_for(lambda ends=ends: len(fake_reddit.requests("/api/info")) >= ends)
        time.sleep(dice.uniform(0.0, 0.1))
        assert process.poll() is None
        redpipe.stop(process, signal.SIGKILL)
    assert redpipe("--recheck=1", database, **APP) == (0, "", "")
    asked = [seen.query["id"] for seen in fake_reddit.requests("/api/info")]
    assert len(asked) <= 23
    assert len({*asked}) == 20
    assert ",".join(dict.fromkeys(asked)) == ",".join(f"t3_{post['id']}" for post in posts)
    assert redpipe("--recheck=1", database, **APP) == (0, "", "")
    assert len(fake_reddit.requests("/api/info")) == len(asked)


# --- failures


def test_what_fails_for_ever_lets_the_others_go_on_and_is_told(world):
    first = world.fill(350)[100]["id"]
    world.reddit.faults = lambda method, path, asked: (
        reply(503) if f"t3_{first}" in asked.get("id", "") else None
    )
    with pytest.raises(pipeline.Failed) as caught:
        world.recheck()
    assert str(caught.value) == (
        "100 post(s) could not be asked about, and are next time:"
        " HTTP 503 (empty) instead of a listing"
    )
    assert caught.value.exit_status == 75
    checked = [bool(utc) for (utc,) in world.rows("checked_utc")]
    assert checked == [True] * 100 + [False] * 100 + [True] * 150
    assert [len(ids) for ids in world.asked()[:6]] == [100, 100, 100, 100, 100, 50]
    assert 120 <= world.clock.elapsed <= 135
    assert len(world.asked()) < 20


def test_an_outage_that_ends_costs_nothing_but_time(world):
    world.fill(350)
    world.clock.advance(HOUR)
    down = world.clock.time() + 1, world.clock.time() + 60
    world.reddit.faults = lambda method, path, asked: (
        reply(503) if down[0] < world.clock.time() < down[1] else None
    )
    assert world.recheck(0.9)["asked"] == 350
    assert world.rows("count(checked_utc)") == [(350,)]


def test_each_answer_begins_the_patience_anew(world):
    world.fill(900)

    def faults(method, path, asked):
        world.clock.advance(30)
        return reply(503) if len(world.asked()) == 7 else None

    world.reddit.faults = faults
    assert world.recheck()["asked"] == 900
    assert world.clock.elapsed > 240


@pytest.mark.parametrize("posts", [5, 350, 5000])
@pytest.mark.parametrize("answer", [reply(503), RESET, HANG])
def test_a_reddit_that_is_away_is_given_up_after_two_minutes(world, posts, answer):
    world.fill(posts)
    world.reddit.faults = lambda method, path, query: answer
    with pytest.raises(pipeline.Failed, match=f"^{posts:,} post.s. could not be") as caught:
        world.recheck()
    assert 120 <= world.clock.elapsed <= 120 + 11
    assert caught.value.exit_status == 75


def test_one_that_answers_nothing_but_429_is_given_up_after_an_hour(world):
    world.fill(5)
    world.reddit.script(*[error_reply(429, "Too Many Requests")] * 999, on="/api/info")
    with pytest.raises(pipeline.Failed, match="nothing but 429"):
        world.recheck()
    assert world.clock.elapsed <= 3700


def test_without_an_app_or_with_a_wrong_one_nothing_changes(redpipe, fake_reddit, database):
    token = {"REDDIT_FEED_TOKEN": "x" * 40, "REDDIT_USERNAME": "somebody"}
    for environment in ({}, token):
        done = redpipe("--recheck=1", database, **environment)
        assert done == Done(78, "", "redpipe: --recheck needs an app; see README, Credentials\n")
        assert not database.exists()
    fill(redpipe, fake_reddit, database, 3)
    done = redpipe("--recheck=0", database, REDDIT_CLIENT_ID="app-id", REDDIT_CLIENT_SECRET="wrong")
    assert (done.status, done.out) == (77, "")
    assert done.err == "redpipe: Reddit refuses the credentials (401); see README, Credentials\n"
    fake_reddit.script(block_page(), on="/api/info")
    assert redpipe("--recheck=0", database, **APP).status == 77
    assert query(database, "SELECT count(title), count(checked_utc) FROM posts") == [(3, 0)]


def test_without_a_database_it_ends_with_73_and_makes_none(redpipe, fake_reddit, database):
    done = redpipe("--recheck=1", database, **APP)
    assert done == (73, "", f"redpipe: {database}: there is no database\n")
    assert not database.exists()
    for text in ("", "Dear diary"):
        database.write_text(text)
        assert redpipe("--recheck=1", database, **APP).status == 73
        assert database.read_text() == text
    assert fake_reddit.log == []


def test_a_database_that_may_not_be_changed_ends_it_with_74(redpipe, fake_reddit, database):
    fill(redpipe, fake_reddit, database, 3)
    fails = "SELECT raise(FAIL, 'database or disk is full')"
    change(database, f"CREATE TRIGGER full BEFORE UPDATE ON posts BEGIN {fails}; END")
    done = redpipe("--recheck=0", database, **APP)
    assert done == (74, "", f"redpipe: {database}: database or disk is full\n")


# --- the process


@pytest.mark.parametrize(("fault", "total", "checked"), [(HANG, 1000, 100), (None, 4, 200)])
def test_a_signal_ends_it_while_a_request_hangs_and_while_it_waits_for_the_budget(
    redpipe, app, fake_reddit, database, fault, total, checked
):
    fill(redpipe, fake_reddit, database, 350)
    fake_reddit.budgets["oauth"] = Budget(total=total)
    fake_reddit.script(None, fault, on="/api/info")
    process = redpipe.start("--recheck=1", database)
    wait_for(lambda: len(fake_reddit.requests("/api/info")) == 2)
    count = "SELECT count(checked_utc) FROM posts"
    wait_for(lambda: query(database, count) == [(checked,)])
    assert redpipe.stop(process, signal.SIGINT) == (-signal.SIGINT, "", "")
    assert query(database, count) == [(checked,)]
    assert list(redpipe.tmpdir.iterdir()) == []
    assert not Path(f"{database}-wal").exists()


def test_it_is_quiet_and_tells_all_with_v(redpipe, fake_reddit, database):
    fill(redpipe, fake_reddit, database, 150)
    assert redpipe("--recheck=0", "-q", database, **APP) == (0, "", "")
    done = redpipe("--recheck=0", "-v", database, **APP)
    assert (done.status, done.out) == (0, "")
    lines = done.err.splitlines()
    assert all(line.startswith("redpipe: ") for line in lines)
    assert lines[0] == (
        f"redpipe: rechecking all posts from 127.0.0.1 with an app into {database}; Ctrl-C stops it"
    )
    assert "redpipe: 100 posts asked for, 0 erased" in lines
    assert lines[-1] == "redpipe: 150 asked, 0 refreshed, 0 erased"
    assert "app-secret" not in done.err


def test_a_terminal_shows_how_many_of_how_many_and_in_the_end_what_was_done(
    redpipe, app, fake_reddit, database
):
    posts = fill(redpipe, fake_reddit, database, 700, ("go", "Python"))
    fake_reddit.take_down(posts[5]["id"])
    fake_reddit.budgets["oauth"] = Budget(total=4, window=4)
    options = ("--recheck=1", "--field=score", "posts.db", "r/PYTHON", "rust")
    with closing(Terminal()) as terminal:
        terminal.resize(120)
        process = start_on(terminal, redpipe, *options)
        assert process.wait(30) == 0
        first, line, last, after = terminal.screen()
    assert first == (
        "redpipe: rechecking r/python, r/rust from 127.0.0.1 with an app into posts.db;"
        " Ctrl-C stops it"
    )
    assert re.fullmatch(r"redpipe: (200|350) of 350 asked, 1 erased, \w.*, \d requests left", line)
    assert (last, after) == ("redpipe: 350 asked, 349 refreshed, 1 erased", "")
    waits = r"redpipe: 200 of 350 asked, 1 erased, Reddit's budget: \d s, 2 requests"
    assert re.search(waits, terminal.shown.decode())


# --- the budget


@pytest.mark.parametrize(("total", "windows"), [(2, 9), (3, 5), (20, 4)])
def test_it_leaves_half_of_every_window_to_others(world, total, windows):
    world.fill(100 * windows * (total // 2))
    world.reddit.budgets["oauth"] = Budget(total=total, window=600)
    world.recheck()
    taken = Counter(int(seen.time // 600) for seen in world.reddit.requests("/api/info"))
    assert [*taken.values()] == [total // 2] * windows
    assert world.clock.elapsed <= windows * 610
    assert {seen.status for seen in world.reddit.log} == {200}


def test_what_others_take_counts(world):
    world.fill(6000)
    world.reddit.budgets["oauth"] = Budget(total=60, window=600, others=0.04)  # 24 in a window
    world.recheck()
    times = [seen.time for seen in world.reddit.requests("/api/info")]
    for window, taken in itertools.groupby(times, key=lambda at: at // 600 * 600):
        *others, last = taken
        assert len(others) + 1 + 0.04 * (last - window) <= 60 / 2 + 1
    assert {seen.status for seen in world.reddit.log} == {200}


def test_without_a_window_told_it_takes_half_of_what_is_assumed(world):
    world.fill(6500)
    world.reddit.budgets["oauth"] = None
    world.recheck()
    times = [seen.time for seen in world.reddit.requests("/api/info")]
    assert max(sum(start <= at < start + 59.9 for at in times) for start in times) == 30
    assert len(times) == 65


# --- many posts


def test_a_pass_over_many_posts_is_quick_and_holds_few_of_them(world):
    for start in range(0, 40_000, 10_000):
        world.store((make_post(n) for n in range(start, start + 10_000)), ())
    seconds = []
    for _ in range(3):  # of the processor: others use this machine, too
        began = time.process_time()
        assert world.recheck(24) == {"due": 0}
        seconds.append(time.process_time() - began)
    assert min(seconds) < 2 * 40_000 / 1_000_000  # a million in two seconds
    with Database(world.path) as opened:
        tracemalloc.start()
        try:
            assert sum(1 for _ in opened.due(2**40, [])) == 40_000
            assert tracemalloc.get_traced_memory()[1] < 3_000_000
        finally:
            tracemalloc.stop()


# --- beside a follower


class Neighbours(World):
    """A follower, and a recheck beside it; a fifth of what is stored is deleted between two."""

    def follow(self):
        with Database(self.path, clock=self.clock) as database:
            chance = random.Random(1).random
            for batch in stream(self.source(), ["python"], database, chance=chance):
                load(database, map(transform, batch.posts), batch.cursors, batch.gaps)

    def ask_again(self, every):
        dice, deleted = random.Random(20), set()
        for run in itertools.count(1):
            self.clock.sleep(every)
            there = [one for (one,) in query(self.path, "SELECT id FROM posts WHERE title > ''")]
            for one in dice.sample(there, len(there) // 5):
                self.reddit.take_down(one)
                deleted.add(one)
            self.recheck(specs=())
            erased = query(self.path, "SELECT id FROM posts WHERE title IS NULL")
            assert {one for (one,) in erased} == deleted
            self.runs = run

    def live(self, work):
        """Do something in a thread until the time is over."""
        try:
            with suppress(Ended):
                self.clock.sleep(0)
                work()
        finally:  # an error in a thread is one of the test, too
            self.clock.leave()


def test_a_recheck_beside_a_follower_leaves_nothing_that_was_deleted_before_it(database):
    both = Neighbours(database, SharedClock(2, 2 * HOUR))
    both.reddit.budgets["oauth"] = Budget(total=40)
    both.reddit.grow(1, jitter=1.0)
    works = (both.follow, partial(both.ask_again, 0.45 * HOUR))
    threads = [threading.Thread(target=both.live, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert both.runs >= 3
    assert {seen.status for seen in both.reddit.log} == {200}
    soon = both.clock.end - 60
    stored = {one for (one,) in query(database, "SELECT id FROM posts")}
    assert {one for one, utc in both.reddit.listed.items() if utc < soon} <= stored
    assert query(database, "SELECT count(*) FROM gaps") == [(0,)]
