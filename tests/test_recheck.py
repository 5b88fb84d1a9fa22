"""Asking again: what was deleted on Reddit is erased here, and what grew is refreshed."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline
from conftest import Done
from fake_reddit import (
    GIANT,
    HANG,
    HTML,
    RESET,
    TRUNCATE,
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
from pipeline import COLUMNS, Access, Asker, Database, Reddit, load, parse_fields, transform
from virtual import VirtualClock, fetch_from

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
        asker = Asker(reddit, once=True, chance=lambda: 0.5, modest=True)
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
        "10 posts could not be asked about, and are next time:"
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
    return reply(200, listing([thing(post) for post in known[int(answer * len(asked)) :]]))


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
