"""Asking again: what was deleted on Reddit is erased here, and what grew is refreshed."""

from __future__ import annotations

import itertools
import json
import os
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
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import Terminal, start_on

import pipeline
from artefact import wait_for
from conftest import Done
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
from virtual import Ended, SharedClock, VirtualClock, fetch_from

APP = {"REDDIT_CLIENT_ID": "app-id", "REDDIT_CLIENT_SECRET": "app-secret"}
ERASED = ("deleted", "author", "content_takedown", "copyright_takedown")
ERASED += ("anti_evil_ops", "community_ops")
KEPT = ("moderator", "automod_filtered", "reddit")
HOUR = 3600.0


def query(database, sql):
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


@pytest.fixture
def database(tmp_path) -> Path:
    return tmp_path / "posts.db"


@pytest.fixture
def seed():
    """Draw a seed, or take that of REDPIPE_SEED; a failing test shows it."""
    drawn = int(os.environ.get("REDPIPE_SEED") or random.randrange(10**9))
    print(f"REDPIPE_SEED={drawn}")
    return drawn


class World:
    """A Reddit on a virtual clock, and a database that holds some of its posts."""

    def __init__(self, path, *specs) -> None:
        self.path = str(path)
        self.clock = VirtualClock()
        self.reddit = FakeReddit(self.clock)
        self.specs = specs
        self.warned: list[str] = []

    def add(self, numbers, **fields):
        return [self.reddit.add(make_post(n, self.clock.now - 9, **fields)) for n in numbers]

    def store(self, posts, *specs) -> int:
        """Store posts as a follower or an import does; return how many gained something."""
        fields = parse_fields(specs or self.specs)
        with Database(self.path, fields, self.clock) as database:
            return load(database, [transform(dict(post), fields) for post in posts])

    def recheck(self, hours=0.0, names=(), specs=None) -> dict[str, int]:
        """Ask again; return what was counted."""
        fields = parse_fields(self.specs if specs is None else specs)
        access = Access("", "app-id", "app-secret")
        reddit = Reddit(access, fetch_from(self.reddit, self.clock), self.clock)
        asker = ModestAsker(reddit, once=True, chance=lambda: 0.5)
        counts: Counter[str] = Counter()
        with Database(self.path, fields, self.clock) as database:
            for part in pipeline.recheck(asker, database, names, fields, hours):
                counts.update(part)
        return dict(counts)

    def rows(self, what="*"):
        return query(self.path, f"SELECT {what} FROM posts ORDER BY rowid")

    def content(self, number=0):
        """Return title, author, author_name and permalink of a row."""
        return self.rows("title, author, author_name, permalink")[number]

    def asked(self) -> list[list[str]]:
        """Return the ids of each request for posts."""
        return [
            [name.removeprefix("t3_") for name in seen.query["id"].split(",")]
            for seen in self.reddit.requests("/api/info")
        ]


@pytest.fixture
def world(database):
    return World(database, "score", "selftext")


def known(post):
    return post["title"], post["author_fullname"], post["author"], post["permalink"]


NOTHING = (None, None, None, None)


# --- the command


def test_what_was_deleted_is_erased_and_the_rest_refreshed(redpipe, fake_reddit, database):
    posts = [fake_reddit.add(make_post(n, score=1)) for n in range(4)]
    assert redpipe("--once", "--field=score", database, "python", **APP) == (0, "", "")
    fake_reddit.take_down(posts[0]["id"], "deleted")
    fake_reddit.take_down(posts[1]["id"], "moderator")
    fake_reddit.forget_author(posts[2]["id"])
    posts[3]["score"] = 99
    asked = len(fake_reddit.requests("/api/info"))
    assert redpipe("--recheck=0", "--field=score", database, **APP) == (0, "", "")
    assert len(fake_reddit.requests("/api/info")) == asked + 1
    what = "title, author, author_name, permalink IS NULL, score, erased_utc > 0"
    assert query(database, f"SELECT {what} FROM posts ORDER BY rowid") == [
        (None, None, None, 1, None, 1),
        ("Invented post number 1", posts[1]["author_fullname"], "invented_1", 0, 1, None),
        ("Invented post number 2", None, None, 0, 1, None),
        ("Invented post number 3", posts[3]["author_fullname"], "invented_3", 0, 99, None),
    ]
    assert b"Invented post number 0" not in database.read_bytes()


def test_it_needs_an_app(redpipe, database):
    done = redpipe("--recheck=1", database)
    assert done == Done(78, "", "redpipe: --recheck needs an app; see README, Credentials\n")


# --- still there


def test_the_fields_of_this_command_line_take_todays_values_and_nothing_else(world):
    (post,) = world.add([1], score=1, ups=1)
    world.store([post], "score", "ups", "selftext")
    (before,) = world.rows(", ".join((*COLUMNS, "stored_utc", "ups", "selftext")))
    post |= {"score": 250, "ups": 251, "title": "Another", "author": "somebody", "created_utc": 5.0}
    post |= {"author_fullname": "t2_other", "subreddit": "rust", "permalink": "/x"}
    world.clock.advance(100)
    assert world.recheck(specs=["score"]) == {"due": 1, "asked": 1, "refreshed": 1, "erased": 0}
    assert world.rows(", ".join((*COLUMNS, "stored_utc", "ups", "selftext"))) == [before]
    now = int(world.clock.time() - 0.175)  # half of the request's time ago
    assert world.rows("score, checked_utc, erased_utc") == [(250, now, None)]


def test_without_fields_only_the_time_is_noted(world):
    posts = world.add(range(3), score=1)
    world.store(posts)
    what = ", ".join((*COLUMNS, "stored_utc", "score", "selftext", "erased_utc"))
    before = world.rows(what)
    world.clock.advance(HOUR)
    assert world.recheck(specs=[]) == {"due": 3, "asked": 3, "refreshed": 0, "erased": 0}
    assert world.rows(what) == before
    assert world.rows("checked_utc > stored_utc") == [(1,)] * 3


@pytest.mark.parametrize(
    ("now", "stored"),
    [
        ({"selftext": "Another text."}, "Another text."),
        ({"selftext": ""}, ""),
        ({"selftext": None}, None),
        ({"selftext": ...}, "Old text."),
        ({"selftext": "[removed]"}, "Old text."),
        ({"selftext": "[deleted]"}, "Old text."),
        ({"selftext": ["[removed]"]}, '["[removed]"]'),
        ({"selftext": False}, 0),
        ({"selftext": float("nan")}, None),
    ],
)
def test_null_is_a_value_and_what_is_hidden_or_left_out_is_none(world, now, stored):
    (post,) = world.add([1], selftext="Old text.")
    world.store([post])
    world.reddit.posts[post["id"]] = make_post(1, **now)
    world.recheck()
    assert world.rows("selftext") == [(stored,)]


@pytest.mark.parametrize(
    ("media", "stored"),
    [
        ({"type": "new", "oembed": None}, "new"),
        ({"type": None}, None),
        ({"oembed": None}, "old"),
        ({}, "old"),
        (None, "old"),
        ([], "old"),
        (..., "old"),
    ],
)
def test_a_field_inside_an_object_is_known_by_its_own_key(world, media, stored):
    (post,) = world.add([1], media={"type": "old"})
    world.store([post], "media.type")
    world.reddit.posts[post["id"]] = make_post(1, media=media)
    world.recheck(specs=["media.type"])
    assert world.rows("media_type") == [(stored,)]


def test_a_new_field_is_filled_by_asking_again(world):
    world.store(world.add(range(3), num_comments=7), "score")
    world.recheck(specs=["num_comments"])
    assert world.rows("num_comments, score") == [(7, 1)] * 3


def test_a_column_of_another_case_is_refreshed(world):
    posts = world.add(range(2), score=1)
    world.store(posts, "score")
    posts[0]["score"] = 5
    world.recheck(specs=["score:SCORE"])
    assert world.rows("score") == [(5,), (1,)]


# --- deleted, taken down, removed


@pytest.mark.parametrize("category", ERASED)
def test_what_was_deleted_or_taken_down_is_erased(world, category):
    posts = world.add(range(3), score=1)
    world.store(posts)
    stays = world.rows("id, created_utc, subreddit, stored_utc")
    world.reddit.posts[posts[1]["id"]]["removed_by_category"] = category
    assert world.recheck() == {"due": 3, "asked": 3, "refreshed": 2, "erased": 1}
    assert world.content(1) == NOTHING
    assert world.rows("score, selftext")[1] == (None, None)
    now = int(world.clock.time() - 0.175)
    assert world.rows("checked_utc, erased_utc") == [(now, None), (now, now), (now, None)]
    assert world.rows("id, created_utc, subreddit, stored_utc") == stays
    assert [world.content(n) for n in (0, 2)] == [known(posts[0]), known(posts[2])]


@pytest.mark.parametrize("category", KEPT)
def test_what_a_moderator_or_a_filter_removed_is_kept(world, category):
    (post,) = world.add([1])
    world.store([post], "removed_by_category", "selftext")
    before = known(post)
    world.reddit.take_down(post["id"], category)
    world.recheck(specs=["removed_by_category", "selftext"])
    assert world.content() == before
    assert world.rows("removed_by_category, selftext, erased_utc") == [
        (category, "Nobody wrote text 1.", None)
    ]


@pytest.mark.parametrize("category", [None, ..., "", "somebody", 5, ["deleted"], {"deleted": 1}])
def test_a_category_that_nobody_knows_erases_nothing(world, category):
    (post,) = world.add([1])
    world.store([post])
    world.reddit.posts[post["id"]] = make_post(1, removed_by_category=category)
    world.recheck()
    assert world.content() == known(post)


def test_every_field_ever_asked_for_is_erased(world):
    (post,) = world.add([1], score=1, ups=2, media={"type": "x"})
    world.store([post], "score")
    world.store([post], "ups:points", "media")
    world.reddit.take_down(post["id"])
    world.recheck(specs=["score"])
    assert world.rows("score, points, media") == [(None, None, None)]


def test_what_was_erased_is_not_asked_for_again(world):
    posts = world.add(range(2))
    world.store(posts)
    world.reddit.take_down(posts[0]["id"])
    world.recheck()
    first = world.rows()[0]
    world.clock.advance(HOUR)
    world.reddit.posts[posts[0]["id"]]["removed_by_category"] = None
    assert world.recheck()["due"] == 1
    assert world.rows()[0] == first
    assert world.asked()[1:] == [[posts[1]["id"]]]


# --- accounts that were deleted


def test_of_a_deleted_account_the_name_and_the_id_go_and_stay_away(world):
    (post,) = world.add([1], score=1)
    original = dict(post)
    world.store([post])
    world.reddit.forget_author(post["id"])
    assert world.recheck() == {"due": 1, "asked": 1, "refreshed": 1, "erased": 0}
    nameless = (post["title"], None, None, post["permalink"])
    assert world.content() == nameless
    for source in (original, {**original, "author_fullname": ...}, {**original, "author": ...}):
        again = {key: value for key, value in source.items() if value is not ...}
        assert world.store([again]) == 0
        assert world.content() == nameless
    assert world.store([{**original, "ups": 7}], "ups") == 1  # what it gains is no name
    assert world.rows("author, author_name, ups") == [(None, None, 7)]
    world.clock.advance(HOUR)
    world.reddit.posts[post["id"]] = original
    world.recheck()
    assert world.content() == nameless


def test_a_post_from_the_feed_may_still_be_given_its_account_id(world):
    (post,) = world.add([1])
    without = {key: value for key, value in post.items() if key != "author_fullname"}
    world.store([without])
    world.recheck()
    assert world.content() == (post["title"], None, post["author"], post["permalink"])
    assert world.store([post]) == 1
    assert world.content() == known(post)


# --- left out


def test_what_is_left_out_twice_is_erased(world):
    posts = world.add(range(10))
    world.store(posts)
    world.reddit.purge(posts[3]["id"])
    assert world.recheck() == {"due": 10, "asked": 10, "refreshed": 9, "erased": 1}
    assert [number for number in range(10) if world.content(number) == NOTHING] == [3]
    ids = [post["id"] for post in posts]
    assert world.asked() == [ids, ids]


def without(posts, *missing):
    """Answer with some posts, but for those numbers."""
    kept = [thing(post) for number, post in enumerate(posts) if number not in missing]
    return reply(200, listing(kept))


def test_what_is_left_out_once_is_kept(world):
    posts = world.add(range(10))
    world.store(posts)
    world.reddit.script(without(posts, 3, 4, 5), on="/api/info")
    assert world.recheck() == {"due": 10, "asked": 10, "refreshed": 10, "erased": 0}
    assert [world.content(number) for number in range(10)] == [known(post) for post in posts]
    assert len(world.asked()) == 2


def test_what_is_left_out_by_turns_is_kept(world):
    posts = world.add(range(10))
    world.store(posts)
    world.reddit.script(without(posts, 1, 2, 3), without(posts, 4, 5, 6), on="/api/info")
    assert world.recheck()["erased"] == 0


def test_of_an_answer_that_leaves_out_more_than_half_nothing_is_believed(world):
    posts = world.add(range(10))
    world.store(posts)
    half = without(posts, *range(6))
    world.reddit.script(*[half] * 5, on="/api/info")
    assert world.recheck() == {"due": 10, "asked": 10, "refreshed": 10, "erased": 0}
    assert len(world.asked()) == 6


def test_half_may_be_gone(world):
    posts = world.add(range(10))
    world.store(posts)
    for post in posts[:5]:
        world.reddit.purge(post["id"])
    assert world.recheck()["erased"] == 5


def test_that_more_than_half_are_gone_for_good_is_said(world):
    posts = world.add(range(10))
    world.store(posts)
    for post in posts[:6]:
        world.reddit.purge(post["id"])
    with pytest.raises(pipeline.Failed) as caught:
        world.recheck()
    assert str(caught.value) == (
        "10 post(s) could not be asked about, and are next time:"
        " an answer that tells of 4 of 10 posts"
    )
    assert world.rows("count(title), count(checked_utc)") == [(10, 0)]


# --- answers that are none

T1 = json.dumps({"kind": "t1", "data": {"id": "abc", "name": "t1_abc", "body": "Nobody said it."}})
T5 = json.dumps({"kind": "t5", "data": {"id": "2zzzz", "name": "t5_2zzzz"}})
NO_ID = json.dumps({"kind": "t3", "data": {"title": "Without an id"}})
POSTS = [make_post(n) for n in range(10)]
ALL = [thing(post) for post in POSTS]
GONE = [thing(post | {"removed_by_category": "deleted", "author": "[deleted]"}) for post in POSTS]
OTHERS = [thing(make_post(n)) for n in range(50, 60)]

NO_ANSWERS = {
    "a comment among them": reply(200, listing([*GONE[:9], T1])),
    "a subreddit among them": reply(200, listing([*GONE, T5])),
    "a post without an id": reply(200, listing([*GONE[:9], NO_ID])),
    "no thing": reply(200, listing([*GONE, "null"])),
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
    posts = [*world.add(range(100, 200)), *world.add(range(10))]
    world.store(posts)
    world.reddit.script(None, answer, answer, on="/api/info")
    assert world.recheck() == {"due": 110, "asked": 110, "refreshed": 110, "erased": 0}
    assert [world.content(number) for number in range(110)] == [known(post) for post in posts]
    assert [len(ids) for ids in world.asked()] == [100, 10, 10, 10]


@pytest.mark.parametrize("answer", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_a_reddit_that_answers_nothing_else_erases_nothing(world, answer):
    world.store(world.add(range(10)))
    before = world.rows()
    world.reddit.faults = lambda method, path, query: answer if path == "/api/info" else None
    with pytest.raises((pipeline.Failed, pipeline.Refused)):
        world.recheck()
    assert world.rows() == before


# --- whatever comes

STATES = ("there", "there", "there", "nameless", "purged", *ERASED, *KEPT)


def put(reddit, post, state):
    """Bring a post into a state."""
    if state == "purged":
        reddit.purge(post["id"])
    elif state == "nameless":
        reddit.forget_author(post["id"])
    elif state != "there":
        reddit.take_down(post["id"], state)


@st.composite
def weather(draw):
    """Draw what some requests get: no answer, one that knows little, the truth."""
    length = draw(st.integers(0, 12))
    answers = []
    while len(answers) < length:
        kind = draw(st.sampled_from(("none", "none", "true", "a part", "less than half")))
        if kind == "none":
            answers.append(draw(st.sampled_from(sorted(NO_ANSWERS))))
        elif kind == "true":
            answers.append(0.0)
        else:
            answers.append(draw(st.floats(0.01, 0.5) if kind == "a part" else st.floats(0.55, 1)))
            answers += [0.0] * (kind == "a part")  # not twice in a row: twice counts
    return answers


def said(reddit, answer, asked, dice):
    """Answer a request for posts: as it is, but for a share of them, or with what is no answer."""
    if isinstance(answer, str):
        return NO_ANSWERS[answer]
    known = [post for name in asked if (post := reddit.posts.get(name))]
    dice.shuffle(known)
    left_out = int(answer * len(asked)) + (answer > 0.5)  # more than half, of two posts, too
    return reply(200, listing([thing(post) for post in known[left_out:]]))


@settings(max_examples=60, deadline=None)
@given(
    states=st.lists(st.sampled_from(STATES), min_size=1, max_size=230),
    runs=st.lists(weather(), min_size=1, max_size=3),
    dice=st.randoms(use_true_random=False),
)
def test_nothing_that_reddit_still_shows_is_ever_erased(states, runs, dice):
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder, "posts.db"), "score")
        posts = world.add(range(len(states)))
        world.store(posts)
        original = {post["id"]: known(post) for post in posts}
        for post, state in zip(posts, states, strict=True):
            put(world.reddit, post, state)
        for answers in [*runs, [], []]:
            left = list(answers)

            def faults(method, path, query, left=left):
                if path != "/api/info" or not left:
                    return None
                names = [name.removeprefix("t3_") for name in query["id"].split(",")]
                return said(world.reddit, left.pop(0), names, dice)

            world.reddit.faults = faults
            world.clock.advance(HOUR)
            try:
                world.recheck(hours=0.5)
            except (pipeline.Failed, pipeline.Refused):
                complete = False
            else:
                complete = True
            check(world, original, states, complete)


def check(world, original, states, complete):
    """Nothing else than what is gone is erased; after a whole run all of it is."""
    found = world.rows("id, title, author, author_name, permalink, erased_utc")
    for (identifier, *content, erased_utc), state in zip(found, states, strict=True):
        title, author, name, permalink = original[identifier]
        if erased_utc:
            assert state in ("purged", *ERASED)
            assert tuple(content) == NOTHING
        elif state == "nameless" and content[2] is None:
            assert content == [title, None, None, permalink]
        else:
            assert content == [title, author, name, permalink]
            assert not complete or state in ("there", *KEPT)


# --- erased is erased


def feed_post(post):
    """Return a post as the feed has it."""
    keys = ("id", "title", "author", "subreddit", "created_utc", "permalink")
    return {key: post[key] for key in keys}


WAYS = {
    "listing": lambda world, post: world.store([post]),
    "feed": lambda world, post: world.store([feed_post(post)], "score"),
    "dump": lambda world, post: world.store([{**post, "ups": 9}], "ups", "selftext"),
    "new field": lambda world, post: world.store([post], "num_comments:n", "url"),
    "nothing": lambda world, post: world.store([{"id": post["id"]}], "score"),
    "recheck": lambda world, post: world.recheck(specs=["url", "score"]) and 0,
}


@settings(max_examples=60, deadline=None)
@given(
    before=st.lists(st.sampled_from(sorted(WAYS)), max_size=4),
    category=st.sampled_from((*ERASED, "nameless")),
    after=st.lists(st.sampled_from(sorted(WAYS)), max_size=8),
)
def test_erased_stays_erased_whatever_comes_later(before, category, after):
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder, "posts.db"), "score")
        post, other = world.add(range(2), score=5, num_comments=3)
        copy = dict(post)
        world.store([post, other], "score")
        for way in before:
            WAYS[way](world, copy)
        put(world.reddit, post, category)
        world.recheck()
        nameless = (copy["title"], None, None, copy["permalink"])
        stays = nameless if category == "nameless" else NOTHING
        for way in after:
            gained = WAYS[way](world, copy)
            assert category == "nameless" or gained == 0
            assert world.content() == stays
        assert world.content(1) == known(other)
        with closing(sqlite3.connect(world.path)) as connection:
            connection.row_factory = sqlite3.Row
            row = dict(connection.execute("SELECT * FROM posts").fetchone())
        lasting = {"id", "created_utc", "subreddit", "stored_utc", "checked_utc", "erased_utc"}
        if category != "nameless":
            assert {key for key, value in row.items() if value is not None} == lasting


def test_what_another_recheck_erased_meanwhile_stays_erased(world):
    posts = world.add(range(2), score=5)
    world.store(posts)

    def erase(method, path, asked):
        if path == "/api/info":
            with Database(world.path, (), world.clock) as other:
                other.revise({posts[0]["id"]: None})

    world.reddit.faults = erase
    world.recheck(specs=["score"])
    assert world.content() == NOTHING
    assert world.rows("score") == [(None,), (5,)]


def test_an_open_follower_and_import_bring_nothing_back(world):
    (post,) = world.add([1], score=5)
    copy = dict(post)
    fields = parse_fields(["score"])
    row = transform(dict(copy), fields)
    with Database(world.path, fields, world.clock) as one, Database(world.path) as two:
        load(one, [row])
        world.reddit.take_down(post["id"])
        world.recheck(specs=["url"])
        assert load(one, [row]) == load(two, [row]) == 0
        assert one.unstored([copy]) == two.unstored([copy]) == []
    assert world.content() == NOTHING


def test_a_post_that_was_erased_or_lost_its_author_is_not_new_to_a_follower(world):
    posts = world.add(range(4))
    copies = [dict(post) for post in posts]
    world.store(posts)
    from_feed = world.reddit.add(make_post(9))  # its account id may still come
    world.store([feed_post(from_feed)])
    world.reddit.take_down(posts[0]["id"])
    world.reddit.forget_author(posts[1]["id"])
    world.recheck()
    with Database(world.path) as database:
        assert database.unstored([*copies, from_feed]) == [from_feed]


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
    assert redpipe(*options, **APP) == (0, "", "")


def test_the_file_holds_nothing_of_what_was_erased(world):
    posts = world.add(range(300), score=1)
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
    posts = world.add(range(3), score=1)
    world.store(posts, "score")
    with closing(sqlite3.connect(world.path)) as connection:
        for column in (
            "loud AS (upper(title)) VIRTUAL",
            "kept AS (title || '!') VIRTUAL",
            "starred INTEGER NOT NULL DEFAULT 0",
            "checked TEXT NOT NULL DEFAULT ''",
            '"a note" TEXT',
        ):
            connection.execute(f"ALTER TABLE posts ADD COLUMN {column}")
        connection.execute("UPDATE posts SET starred = 1, [a note] = title")
        connection.execute("CREATE UNIQUE INDEX links ON posts (permalink)")
        connection.commit()
    world.reddit.take_down(posts[0]["id"])
    world.reddit.take_down(posts[1]["id"])
    world.recheck(specs=["score", "score:kept"])
    title = posts[2]["title"]
    assert world.rows('loud, kept, starred, checked, "a note", score, erased_utc > 0') == [
        (None, None, 1, "", None, None, 1),
        (None, None, 1, "", None, None, 1),
        (title.upper(), f"{title}!", 1, "", title, 1, None),
    ]


def test_views_show_no_erased_post_and_count_it(world):
    posts = world.add(range(3))
    world.store(posts)
    world.reddit.take_down(posts[1]["id"])
    world.recheck()
    assert query(world.path, "SELECT title FROM recent_posts ORDER BY title") == [
        (posts[0]["title"],),
        (posts[2]["title"],),
    ]
    assert query(world.path, "SELECT sum(posts) FROM posts_per_hour") == [(3,)]


def test_status_tells_how_many_were_erased_and_when_the_last_recheck_was(
    redpipe, fake_reddit, database
):
    posts = [fake_reddit.add(make_post(n)) for n in range(5)]
    assert redpipe("--once", database, "python", **APP).status == 0
    assert "5 posts, 0 erased, 0 gaps, " in redpipe("--status", database).out
    fake_reddit.take_down(posts[1]["id"])
    assert redpipe("--recheck=0", database, **APP).status == 0
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE posts SET checked_utc = checked_utc - 7200")
        connection.commit()
    assert "5 posts, 1 erased, 0 gaps, last recheck 2 h ago, " in redpipe("--status", database).out


# --- many processes at once

CONTENT = "coalesce(title, author, author_name, permalink, score, ups) IS NOT NULL"


def run_together(redpipe, fake_reddit, database, dump, dice, rounds):
    """Follow, import and ask again at once, kill now one, now another, and take posts down."""
    starts = {
        "follower": ("--interval=1", "--field=score", database, "python"),
        "once": ("--once", database, "python"),
        "import": (f"--from={dump}", "--field=ups", database),
        "recheck": ("--recheck=0", "--field=score", database),
    }
    running = {}
    taken = []
    standing = list(fake_reddit.posts)
    for _ in range(rounds):
        for what, arguments in starts.items():
            if what not in running or running[what].poll() is not None:
                running[what] = redpipe.start(*arguments, **APP)
        for _ in range(dice.randrange(5)):
            taken.append(standing.pop(dice.randrange(len(standing))))
            fake_reddit.take_down(taken[-1], dice.choice(ERASED))
        time.sleep(dice.uniform(0.0, 0.5))
        assert query(database, f"SELECT id FROM posts WHERE erased_utc > 0 AND {CONTENT}") == []
        if dice.random() < 0.5:
            victim = running.pop(dice.choice(sorted(running)))
            victim.kill()
            assert victim.communicate()[1] == ""
    for process in running.values():
        process.terminate()
        assert process.communicate(timeout=20)[1] == ""
    return taken


def test_a_recheck_beside_others_that_are_killed_brings_nothing_back(
    redpipe, fake_reddit, database, tmp_path, seed
):
    fake_reddit.budgets["oauth"] = Budget(total=1_000_000)
    posts = [fake_reddit.add(make_post(n, time.time() - 900 + n, ups=3)) for n in range(400)]
    originals = {post["id"]: dict(post) for post in posts}
    dump = tmp_path / "dump.ndjson"
    dump.write_text("".join(json.dumps(post) + "\n" for post in posts))
    assert redpipe(f"--from={dump}", "--field=ups", "--field=score", database).status == 0
    taken = run_together(redpipe, fake_reddit, database, dump, random.Random(seed), 14)
    assert redpipe("--recheck=0", database, **APP) == (0, "", "")
    assert redpipe(f"--from={dump}", "--field=ups", database) == (0, "", "")
    assert redpipe("--once", database, "python", **APP) == (0, "", "")
    assert query(database, "PRAGMA integrity_check") == [("ok",)]
    erased = query(database, "SELECT id FROM posts WHERE erased_utc > 0")
    assert sorted(erased) == sorted((identifier,) for identifier in taken)
    assert query(database, f"SELECT id FROM posts WHERE erased_utc > 0 AND {CONTENT}") == []
    kept = query(database, "SELECT id, title, author, author_name, permalink FROM posts")
    assert len(kept) == 400
    assert {row for row in kept if row[0] not in taken} == {
        (identifier, *known(post))
        for identifier, post in originals.items()
        if identifier not in taken
    }


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
"""
OLD = "id, created_utc, subreddit, title, author, author_name, permalink, stored_utc, score"
EVERYTHING = (
    f"SELECT {OLD} FROM posts ORDER BY rowid",
    "SELECT * FROM cursors",
    "SELECT * FROM gaps",
    "SELECT * FROM recent_posts",
    "SELECT * FROM posts_per_hour",
    "SELECT * FROM coverage",
)


def make_version_1(path, posts):
    """Write a database as version 1.0 made it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_1)
        connection.executemany(
            "INSERT INTO posts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (p["id"], int(p["created_utc"]), p["subreddit"], *known(p), 1_790_000_100, 7)
                for p in posts
            ],
        )
        now = int(time.time())
        connection.execute("INSERT INTO cursors VALUES ('python', 1, 1790000000, ?)", (now,))
        connection.execute("INSERT INTO gaps VALUES ('python', 5, 6, 7)")
        connection.commit()


def contents(path):
    return [query(path, sql) for sql in EVERYTHING]


def version(path) -> int:
    """Return the version that the file's own header tells."""
    return int.from_bytes(Path(path).read_bytes()[60:64], "big")


def test_a_database_of_version_1_is_brought_to_2(redpipe, fake_reddit, database):
    posts = [fake_reddit.add(make_post(n)) for n in range(300)]
    make_version_1(database, posts)
    before = contents(database)
    assert version(database) == 1
    assert redpipe("--from=-", database) == (0, "", "")
    assert version(database) == 2
    assert contents(database) == before
    columns = [row[1] for row in query(database, "PRAGMA table_info(posts)")]
    assert columns == [*COLUMNS, "stored_utc", "score", "checked_utc", "erased_utc"]
    fake_reddit.take_down(posts[0]["id"])
    assert redpipe("--recheck=0", "--field=score", database, **APP) == (0, "", "")
    assert query(database, "SELECT title, score FROM posts ORDER BY rowid LIMIT 2") == [
        (None, None),
        (posts[1]["title"], 1),
    ]
    assert len(query(database, "SELECT * FROM recent_posts")) == 299


def test_the_header_tells_it_at_once_beside_a_follower_that_goes_on(redpipe, fake_reddit, database):
    make_version_1(database, [fake_reddit.add(make_post(n)) for n in range(10)])
    process = redpipe.start("--interval=1", database, "python", **APP)
    wait_for(lambda: version(database) == 2)
    assert process.poll() is None
    assert redpipe.stop(process).err == ""


def test_status_of_a_database_of_version_1_changes_nothing(redpipe, database):
    make_version_1(database, [make_post(n) for n in range(10)])
    before = database.read_bytes()
    done = redpipe("--status", database)
    assert (done.status, done.err) == (0, "")
    assert "10 posts, 0 erased, 1 gap, " in done.out
    assert database.read_bytes() == before


def test_ten_processes_bring_it_to_2_together(redpipe, fake_reddit, database):
    fake_reddit.budgets["oauth"] = Budget(total=1_000_000)
    make_version_1(database, [make_post(n) for n in range(1000)])
    before = contents(database)[:4]
    runs = [redpipe.start("--from=-", f"--field=f{n}", database) for n in range(8)]
    runs += [redpipe.start("--interval=1", database, "rust", **APP) for _ in range(2)]
    fake_reddit.create("rust")
    for process in runs[:8]:
        assert process.communicate("", timeout=60) == ("", "")
        assert process.returncode == 0
    for process in runs[8:]:
        assert redpipe.stop(process).err == ""
    assert contents(database)[:1] == before[:1]
    assert version(database) == 2
    columns = {row[1] for row in query(database, "PRAGMA table_info(posts)")}
    assert columns >= {"checked_utc", "erased_utc", *(f"f{n}" for n in range(8))}


def has_open(process, path):
    """Tell whether a process that runs has a file open."""
    with suppress(FileNotFoundError):  # closed meanwhile
        return any(file.samefile(path) for file in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


def test_it_is_whole_whenever_it_is_killed_while_brought_to_2(redpipe, database, tmp_path, seed):
    dice = random.Random(seed)
    make_version_1(database, [make_post(n) for n in range(1000)])
    before = contents(database)
    old = {kept.name: kept.read_bytes() for kept in tmp_path.glob("posts.db*")}
    found = Counter()
    for _ in range(8):
        for kept in tmp_path.glob("posts.db*"):
            kept.unlink()
        for name, data in old.items():
            (tmp_path / name).write_bytes(data)
        process = redpipe.start("--from=-", "--field=ups", database)
        while not has_open(process, database):
            pass
        time.sleep(dice.uniform(0.0, 0.025))
        process.kill()
        process.communicate()
        assert query(database, "PRAGMA integrity_check") == [("ok",)]
        ((told,),) = query(database, "PRAGMA user_version")
        columns = {row[1] for row in query(database, "PRAGMA table_info(posts)")}
        assert ({"checked_utc", "erased_utc"} <= columns) == (told == 2)
        assert not {"checked_utc", "erased_utc"} & columns or told == 2
        assert contents(database) == before
        found[told] += 1
        assert redpipe("--from=-", database) == (0, "", "")
        assert version(database) == 2
        assert contents(database) == before
    print(found)


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
            committed.extend(query(world.path, "SELECT count(checked_utc) FROM posts"))

    world.reddit.faults = faults
    assert world.recheck() == {"due": 250, "asked": 250, "refreshed": 250, "erased": 0}
    ids = [post["id"] for post in posts]
    assert world.asked() == [ids[:100], ids[100:200], ids[200:]]
    assert committed == [(0,), (100,), (200,)]
    (seen, *_) = world.reddit.requests("/api/info")
    assert seen.query.keys() == {"id", "raw_json"}


def test_hours_may_be_a_fraction_and_count_from_the_last_answer(world):
    ((first,), (second,)) = (world.add([n]) for n in range(2))
    world.store([first])
    world.clock.advance(1790)
    assert world.recheck(0.5)["due"] == 0
    world.store([second])
    world.clock.advance(10)
    assert world.recheck(0.5)["due"] == 1  # stored 1800 s ago
    world.clock.advance(1780)
    assert world.recheck(0.5)["due"] == 0
    world.clock.advance(10)
    assert world.recheck(0.5)["due"] == 1  # stored 1800 s ago; the first was asked for since
    world.clock.advance(20)
    assert world.recheck(0.5)["due"] == 1
    assert world.recheck(0)["due"] == 2
    one, two = [first["id"]], [second["id"]]
    assert world.asked() == [one, two, one, one + two]


def test_a_post_of_an_unknown_time_is_due(world):
    world.store(world.add(range(2)))
    with closing(sqlite3.connect(world.path)) as connection:
        connection.execute("UPDATE posts SET stored_utc = NULL WHERE rowid = 1")
        connection.commit()
    assert world.recheck(1000)["due"] == 1


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ([], {0, 1, 2, 3, 4}),
        (["all"], {0, 1, 2, 3, 4}),
        (["python", "all"], {0, 1, 2, 3, 4}),
        (["python"], {0, 1}),
        (["rust", "go"], {2, 3}),
        (["nobody"], set()),
    ],
)
def test_names_select_without_regard_to_case(world, names, numbers):
    names_of = ("Python", "pYTHON", "RUST", "go", None)
    posts = [world.reddit.add(make_post(n)) for n in range(5)]
    for post, name in zip(posts, names_of, strict=True):
        post["subreddit"] = name
    world.store(posts)
    world.recheck(names=names)
    asked = {identifier for ids in world.asked() for identifier in ids}
    assert asked == {posts[number]["id"] for number in numbers}


def test_names_of_the_command_line_select(redpipe, fake_reddit, database):
    for n, name in enumerate(("Python", "rust", "go")):
        fake_reddit.add(make_post(n, subreddit=name))
    assert redpipe("--once", database, "all", **APP).status == 0
    assert redpipe("--recheck=0", database, "r/PYTHON", "/r/Go/", **APP) == (0, "", "")
    assert query(database, "SELECT subreddit FROM posts WHERE checked_utc > 0 ORDER BY 1") == [
        ("Python",),
        ("go",),
    ]


def test_a_column_named_rowid_does_not_hide_the_order(world):
    posts = world.add(range(3), rowid=0)
    world.store(posts, "rowid")
    assert world.recheck(specs=["rowid"]) == {"due": 3, "asked": 3, "refreshed": 3, "erased": 0}


def make_old(database):
    """Let all posts have been stored two hours ago."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE posts SET stored_utc = stored_utc - 7200")
        connection.commit()


def fill(redpipe, fake_reddit, database, count):
    posts = [fake_reddit.add(make_post(n)) for n in range(count)]
    lines = "".join(json.dumps(post) + "\n" for post in posts)
    assert redpipe("--from=-", database, stdin=lines) == (0, "", "")
    make_old(database)
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


def failing(world, number, answer):
    """Let the requests for the chunk of so many hundreds get that answer."""
    first = list(world.reddit.posts)[number * 100]

    def faults(method, path, asked):
        return answer if f"t3_{first}" in asked.get("id", "") else None

    world.reddit.faults = faults


def test_what_fails_for_ever_lets_the_others_go_on_and_is_told(world):
    world.store(world.add(range(350)))
    failing(world, 1, reply(503))
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
    world.store(world.add(range(350)))
    world.clock.advance(HOUR)
    down = world.clock.time() + 1, world.clock.time() + 60

    def faults(method, path, asked):
        return reply(503) if down[0] < world.clock.time() < down[1] else None

    world.reddit.faults = faults
    assert world.recheck(0.9)["asked"] == 350
    assert world.rows("count(checked_utc)") == [(350,)]


def test_each_answer_begins_the_patience_anew(world):
    world.store(world.add(range(900)))

    def faults(method, path, asked):
        world.clock.advance(30)
        return reply(503) if len(world.asked()) == 7 else None

    world.reddit.faults = faults
    assert world.recheck()["asked"] == 900
    assert world.clock.elapsed > 240


@pytest.mark.parametrize("posts", [5, 350, 9000])
@pytest.mark.parametrize("answer", [reply(503), RESET, HANG])
def test_a_reddit_that_is_away_is_given_up_after_two_minutes(world, posts, answer):
    world.store(world.add(range(posts)))
    world.reddit.faults = lambda method, path, query: answer
    with pytest.raises(pipeline.Failed) as caught:
        world.recheck()
    assert str(caught.value).startswith(f"{posts:,} post(s) could not be asked about, and are next")
    assert 120 <= world.clock.elapsed <= 120 + 11
    assert caught.value.exit_status == 75


def test_one_that_answers_nothing_but_429_is_given_up_after_an_hour(world):
    world.store(world.add(range(5)))
    world.reddit.faults = lambda method, path, query: (
        error_reply(429, "Too Many Requests") if path == "/api/info" else None
    )
    with pytest.raises(pipeline.Failed, match="nothing but 429"):
        world.recheck()
    assert world.clock.elapsed <= 3700


def test_refused_credentials_end_it_with_77(redpipe, fake_reddit, database):
    fill(redpipe, fake_reddit, database, 3)
    done = redpipe("--recheck=0", database, REDDIT_CLIENT_ID="app-id", REDDIT_CLIENT_SECRET="wrong")
    assert (done.status, done.out) == (77, "")
    assert done.err == "redpipe: Reddit refuses the credentials (401); see README, Credentials\n"
    fake_reddit.script(block_page(), on="/api/info")
    done = redpipe("--recheck=0", database, **APP)
    assert done.status == 77
    assert query(database, "SELECT count(title), count(checked_utc) FROM posts") == [(3, 0)]


def test_a_feed_token_is_no_app(redpipe, database):
    token = {"REDDIT_FEED_TOKEN": "x" * 40, "REDDIT_USERNAME": "somebody"}
    assert redpipe("--recheck=1", database, **token).status == 78
    assert not database.exists()


def test_without_a_database_it_ends_with_73_and_makes_none(redpipe, fake_reddit, database):
    done = redpipe("--recheck=1", database, **APP)
    assert done == (73, "", f"redpipe: {database}: there is no database\n")
    assert not database.exists()
    database.touch()
    assert redpipe("--recheck=1", database, **APP).status == 73
    assert database.stat().st_size == 0
    database.write_text("Dear diary")
    assert redpipe("--recheck=1", database, **APP).status == 73
    assert database.read_text() == "Dear diary"
    assert fake_reddit.log == []


def test_a_database_that_may_not_be_changed_ends_it_with_74(redpipe, fake_reddit, database):
    fill(redpipe, fake_reddit, database, 3)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE UPDATE ON posts"
            " BEGIN SELECT raise(FAIL, 'database or disk is full'); END"
        )
        connection.commit()
    done = redpipe("--recheck=0", database, **APP)
    assert done == (74, "", f"redpipe: {database}: database or disk is full\n")


@pytest.mark.parametrize("hours", ["x", "-1", "nan", "inf", "", "1e9", "1,5", "0x1"])
def test_what_is_no_number_of_hours_ends_it_with_64(redpipe, database, hours):
    done = redpipe(f"--recheck={hours}", database, **APP)
    assert (done.status, done.out) == (64, "")
    assert done.err == f"redpipe: --recheck={hours}: not a number from 0 to 1000000\n"
    assert not database.exists()


@pytest.mark.parametrize(
    "other", ["--once", "--from=x", "--status", "--interval=5", "--print", "--from=-"]
)
def test_what_does_not_go_with_it_ends_with_64(redpipe, database, other):
    done = redpipe("--recheck=1", other, database)
    assert (done.status, done.out) == (64, "")
    name = other.partition("=")[0]
    assert "do not go together" in done.err
    assert "--recheck" in done.err
    assert name in done.err
    assert redpipe("--recheck=1", other).err == done.err  # whatever else is missing


# --- the process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_while_a_request_hangs(redpipe, fake_reddit, database, number):
    fill(redpipe, fake_reddit, database, 150)
    fake_reddit.script(None, HANG, on="/api/info")
    process = redpipe.start("--recheck=1", database, **APP)
    wait_for(lambda: len(fake_reddit.requests("/api/info")) == 2)
    began = time.monotonic()
    assert redpipe.stop(process, number) == (-number, "", "")
    assert time.monotonic() - began < 2
    assert query(database, "SELECT count(checked_utc) FROM posts") == [(100,)]
    assert list(redpipe.tmpdir.iterdir()) == []
    assert not Path(f"{database}-wal").exists()


def test_a_signal_ends_it_while_it_waits_for_the_budget(redpipe, fake_reddit, database):
    fill(redpipe, fake_reddit, database, 350)
    fake_reddit.budgets["oauth"] = Budget(total=4)
    process = redpipe.start("--recheck=1", database, "-v", **APP)
    said = iter(process.stderr.readline, "")
    assert any("waiting" in line for line in said)
    began = time.monotonic()
    assert redpipe.stop(process).status == -signal.SIGTERM
    assert time.monotonic() - began < 2
    assert query(database, "SELECT count(checked_utc) FROM posts") == [(200,)]


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


@pytest.fixture
def terminal():
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_a_terminal_shows_how_many_of_how_many_and_in_the_end_what_was_done(
    redpipe, fake_reddit, database, terminal
):
    posts = fill(redpipe, fake_reddit, database, 350)
    fake_reddit.take_down(posts[5]["id"])
    fake_reddit.budgets["oauth"] = Budget(total=4, window=4)
    terminal.resize(120)
    options = ("--recheck=1", "--field=score", "posts.db", "python", "rust")
    process = start_on(terminal, redpipe, *options, **APP)
    assert process.wait(30) == 0
    first, line, last, after = terminal.screen()
    assert first == (
        "redpipe: rechecking r/python, r/rust from 127.0.0.1 with an app into posts.db;"
        " Ctrl-C stops it"
    )
    assert re.fullmatch(r"redpipe: (200|350) of 350 asked, 1 erased, \w.*, \d requests left", line)
    assert (last, after) == ("redpipe: 350 asked, 349 refreshed, 1 erased", "")
    shown = terminal.shown.decode()
    assert re.search(
        r"redpipe: 200 of 350 asked, 1 erased, Reddit's budget: \d s, 2 requests", shown
    )


# --- the budget


def most_in(seconds, times):
    """Return the most requests that went out in so many seconds."""
    return max(sum(start <= at < start + seconds for at in times) for start in times)


@pytest.mark.parametrize("total", [2, 3, 10, 60])
def test_it_leaves_half_of_every_window_to_others(world, total):
    world.store(world.add(range(100 * total * 2)))
    world.reddit.budgets["oauth"] = Budget(total=total, window=600)
    assert world.recheck()["asked"] == 200 * total
    times = [seen.time for seen in world.reddit.requests("/api/info")]
    windows = Counter(int(at // 600) for at in times)
    assert max(windows.values()) <= total // 2
    assert len(windows) >= 4
    assert {seen.status for seen in world.reddit.log} == {200}


def test_it_waits_for_as_many_windows_as_it_takes(world):
    world.store(world.add(range(900)))
    world.reddit.budgets["oauth"] = Budget(total=2, window=600)
    assert world.recheck()["asked"] == 900
    assert 7 * 600 <= world.clock.elapsed <= 9 * 610


def test_what_others_take_counts(world):
    world.store(world.add(range(6000)))
    world.reddit.budgets["oauth"] = Budget(total=60, window=600, others=0.04)  # 24 in a window
    world.recheck()
    budget = 60
    for window, times in itertools.groupby(
        [seen.time for seen in world.reddit.requests("/api/info")], key=lambda at: int(at // 600)
    ):
        last = list(times)
        taken = len(last) + 0.04 * (last[-1] - window * 600)
        assert taken <= budget / 2 + 1
    assert {seen.status for seen in world.reddit.log} == {200}


def test_without_a_window_told_it_takes_half_of_what_is_assumed(world):
    world.store(world.add(range(9500)))
    world.reddit.budgets["oauth"] = None
    world.recheck()
    times = [seen.time for seen in world.reddit.requests("/api/info")]
    assert len(times) == 95
    assert most_in(59.9, times) == 30


def test_a_follower_beside_it_on_the_same_app_never_gets_a_429(redpipe, fake_reddit, database):
    fill(redpipe, fake_reddit, database, 9000)
    fake_reddit.grow(2, ["python"])
    fake_reddit.budgets["oauth"] = Budget(total=40, window=10)
    follower = redpipe.start("--interval=1", database, "python", **APP)
    recheck = redpipe.start("--recheck=1", database, **APP)
    time.sleep(15)
    assert redpipe.stop(recheck).err == ""
    assert redpipe.stop(follower).err == ""
    assert {seen.status for seen in fake_reddit.log} == {200}
    assert len(fake_reddit.requests("/api/info")) > 20
    assert len(fake_reddit.requests("/new")) > 5


# --- many posts


def many_posts(path, count):
    with Database(str(path)) as database:
        for start in range(0, count, 10_000):
            posts = (make_post(n, 1_790_000_000 + n) for n in range(start, start + 10_000))
            load(database, map(transform, posts))


def test_a_pass_over_many_posts_is_quick_and_holds_few_of_them(world):
    many_posts(world.path, 60_000)
    seconds = []
    for _ in range(3):  # of the processor: others use this machine, too
        began = time.process_time()
        world.clock.set(time.time())
        assert world.recheck(24) == {"due": 0}
        seconds.append(time.process_time() - began)
    assert min(seconds) < 2 * 60_000 / 1_000_000  # a million in two seconds
    with Database(world.path) as opened:
        tracemalloc.start()
        try:
            assert sum(1 for _ in opened.due(2**40, [])) == 60_000
            assert tracemalloc.get_traced_memory()[1] < 3_000_000
        finally:
            tracemalloc.stop()


# --- a day


class Day:
    """A post a second, of which a fifth is deleted later; a follower, and a recheck beside it."""

    def __init__(self, path, hours, every) -> None:
        self.path, self.every = str(path), every
        self.clock = SharedClock(2, hours * HOUR)
        self.reddit = FakeReddit(self.clock)
        self.reddit.budgets["oauth"] = Budget(total=600)
        self.dice = random.Random(20)
        self.deleted: dict[str, float] = {}
        self.runs: list[tuple[float, float]] = []
        self.late: list[str] = []
        self.reddit.create("python")
        self.arrive(1, self.clock.now)

    def arrive(self, n, utc):
        """List the n-th post, let chance delete it later, and put the next on the agenda."""
        post = make_post(n, utc)
        keys = ("id", "name", "title", "author", "author_fullname", "permalink", "subreddit")
        post = {key: post[key] for key in keys} | {"created_utc": float(int(utc))}
        self.reddit.add(post, visible_utc=utc + self.dice.expovariate(1))
        if self.dice.random() < 0.2:
            gone = utc + self.dice.expovariate(1 / (2 * self.every))
            self.reddit._later(gone, lambda _: self.delete(post["id"], gone))
        then = utc + self.dice.expovariate(1)
        self.reddit._later(then, lambda _: self.arrive(n + 1, then))

    def delete(self, identifier, utc):
        self.reddit.take_down(identifier)
        self.deleted[identifier] = utc

    def source(self):
        access = Access("", "app-id", "app-secret")
        return Reddit(access, fetch_from(self.reddit, self.clock), self.clock)

    def follow(self):
        with Database(self.path, clock=self.clock) as database:
            chance = random.Random(1).random
            for batch in pipeline.stream(self.source(), ["python"], database, chance=chance):
                load(database, map(transform, batch.posts), batch.cursors, batch.gaps)

    def recheck(self):
        while True:
            self.clock.sleep(self.every)
            began = self.clock.now
            asker = ModestAsker(self.source(), once=True, chance=lambda: 0.5)
            with Database(self.path, clock=self.clock) as database:
                for _ in pipeline.recheck(asker, database, [], [], 0.0):
                    pass
            self.runs.append((began, self.clock.now))
            self.look(began)

    def look(self, began):
        """Note what was deleted before a run began, and is there after it."""
        there = {found for (found,) in query(self.path, "SELECT id FROM posts WHERE title > ''")}
        self.late += [one for one in there if self.deleted.get(one, began) < began]

    def live(self):
        def thread(work):
            try:
                with suppress(Ended):
                    self.clock.sleep(0)
                    work()
            finally:  # an error in a thread is one of the test, too
                self.clock.leave()

        threads = [threading.Thread(target=thread, args=(w,)) for w in (self.follow, self.recheck)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()


@pytest.mark.parametrize(
    ("hours", "every"),
    [(2, 0.45), pytest.param(24.9, 6, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
)
def test_a_recheck_beside_a_follower_leaves_nothing_that_was_deleted_before_it(
    database, hours, every
):
    day = Day(database, hours, every * HOUR)
    day.live()
    assert len(day.runs) >= 3
    assert day.late == []
    assert {seen.status for seen in day.reddit.log} == {200}
    stored = {found for (found,) in query(database, "SELECT id FROM posts")}
    soon = day.clock.end - 60
    lost = [
        identifier
        for identifier, utc in day.reddit.listed.items()
        if utc < soon and identifier not in stored and identifier not in day.deleted
    ]
    assert lost == []
    assert query(database, "SELECT count(*) FROM gaps") == [(0,)]
    erased = query(database, "SELECT count(*) FROM posts WHERE erased_utc > 0")[0][0]
    minutes = [round((ended - began) / 60, 1) for began, ended in day.runs]
    asked = len(day.reddit.requests("/api/info"))
    print(f"{len(stored)} stored, {erased} erased, {asked} requests, runs of {minutes} min")
