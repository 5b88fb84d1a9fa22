"""--field: more of a post than the built-in columns."""

from __future__ import annotations

import json

import pytest

from conftest import query
from fake_reddit import make_post
from pipeline import BadUsage, Field, parse_fields, transform

BUILT_IN = [
    "id",
    "created_utc",
    "subreddit",
    "title",
    "author",
    "author_name",
    "permalink",
    "stored_utc",
    "checked_utc",
    "erased_utc",
]


def columns(database):
    """Give the columns that follow the built-in ones."""
    names = [row[1] for row in query(database, "PRAGMA table_info(posts)")]
    assert names[: len(BUILT_IN)] == BUILT_IN
    return names[len(BUILT_IN) :]


@pytest.fixture
def import_posts(redpipe, database):
    """Import posts by the built file, with the options given."""

    def import_posts(*posts, options=()):
        lines = "".join(json.dumps(post) + "\n" for post in posts)
        done = redpipe(*options, "--from=-", database, stdin=lines)
        assert done == (0, "", "")

    return import_posts


# --- what is asked for


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ("score", Field(("score",), "score")),
        ("score:points", Field(("score",), "points")),
        ("media.oembed.type", Field(("media", "oembed", "type"), "media_oembed_type")),
        ("media.type:kind", Field(("media", "type"), "kind")),
        ("_x1", Field(("_x1",), "_x1")),
        ("größe:size", Field(("größe",), "size")),
        ("a key:a_key", Field(("a key",), "a_key")),
        ("order", Field(("order",), "order")),
        ("name", Field(("name",), "name")),
        ("id:reddit_id", Field(("id",), "reddit_id")),
    ],
)
def test_a_field_is_a_path_and_a_column(spec, field):
    assert parse_fields([spec]) == [field]


BAD_SPECS = [
    "",
    ":",
    ":column",
    "a b",
    "1st",
    "größe",
    "score:größe",
    "score:a.b",
    "score:a:b",
    "score:a b",
    "score:1st",
    "score:a\n",
    "score\n",
    'score:"',
    "score:x); DROP TABLE posts;--",
    "a..b:ab",
    ".a:a",
    "a.:a",
    ".",
    "id",
    "ID",
    "score:id",
    "score:Created_UTC",
    "subreddit",
    "title",
    "author",
    "author_name",
    "permalink",
    "stored_utc",
    "score:STORED_UTC",
    "checked_utc",
    "score:Erased_UTC",
    "author.name",
]


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_a_bad_field_is_a_usage_error(spec):
    with pytest.raises(BadUsage):
        parse_fields([spec])


@pytest.mark.parametrize(
    "specs",
    [
        ["score", "score"],
        ["score", "Score"],
        ["Score", "score"],
        ["score", "ups:SCORE"],
        ["a.b", "a_b"],
    ],
)
def test_a_column_asked_for_twice_is_a_usage_error(specs):
    with pytest.raises(BadUsage):
        parse_fields(specs)


@pytest.mark.parametrize("fields", [["id"], ["a b"], ["score", "ups:Score"], ["score:Title"], [""]])
@pytest.mark.parametrize("source", [["--from=-"], ["--once"]])
def test_a_bad_field_ends_in_64_before_anything_is_touched(
    redpipe, fake_reddit, database, fields, source
):
    fake_reddit.create("python")
    options = [f"--field={field}" for field in fields]
    done = redpipe(*options, *source, database, "python")
    assert done.status == 64
    assert len(done.err.splitlines()) == 1
    assert fields[-1] in done.err
    assert not database.exists()
    assert fake_reddit.log == []


# --- what is stored

DEEP = json.loads("[" * 900 + "]" * 900)

VALUES = [
    ("text", "text"),
    ("", ""),
    ("12", "12"),
    ("1e3", "1e3"),
    ("a \0 b \ud800 c", "a \ufffd b \ufffd c"),
    ("a &amp; b", "a &amp; b"),
    (0, 0),
    (-7, -7),
    (2**63 - 1, 2**63 - 1),
    (-(2**63), -(2**63)),
    (2**63, "9223372036854775808"),
    (-(2**63) - 1, "-9223372036854775809"),
    (10**100, "1" + "0" * 100),
    (1.0, 1.0),
    (0.95, 0.95),
    (-1e300, -1e300),
    (float("nan"), None),
    (float("inf"), None),
    (float("-inf"), None),
    (True, 1),
    (False, 0),
    (None, None),
    ({}, "{}"),
    ([], "[]"),
    ({"type": "youtube", "n": 1}, '{"type": "youtube", "n": 1}'),
    ([1, "zwei", None, True, 0.5, {"é": "ß"}], '[1, "zwei", null, true, 0.5, {"é": "ß"}]'),
    (["a \ud800 b"], '["a \ufffd b"]'),
    ([2**70], "[1180591620717411303424]"),
    (DEEP, "[" * 900 + "]" * 900),
]


@pytest.mark.parametrize(("value", "stored"), VALUES, ids=[repr(v)[:30] for v, _ in VALUES])
def test_a_value_of_any_type_is_stored(value, stored):
    row = transform({"id": "a1", "name": "t3_a1", "x": value}, [Field(("x",), "x")])
    assert row["x"] == stored


def test_values_of_all_types_reach_the_database(import_posts, database):
    import_posts(
        *[{"name": f"t3_a{n:02}", "x": value} for n, (value, _) in enumerate(VALUES)],
        options=["--field=x"],
    )
    stored = query(database, "SELECT x, typeof(x) FROM posts ORDER BY id")
    types = {str: "text", int: "integer", float: "real", type(None): "null"}
    assert stored == [(value, types[type(value)]) for _, value in VALUES]


def test_numbers_that_json_cannot_say_are_null_inside_of_objects_too(redpipe, database):
    lines = (
        '{"id": "a1", "name": "t3_a1", "x": [1e999, NaN, -Infinity, {"y": -1e999}], "z": 1e999}\n'
    )
    assert redpipe("--field=x", "--field=z", "--from=-", database, stdin=lines) == (0, "", "")
    assert query(database, "SELECT x, z FROM posts") == [('[null, null, null, {"y": null}]', None)]


def test_integers_beyond_64_bits_are_stored_as_text(redpipe, database):
    digits = "7" * 4300
    lines = f'{{"id": "a1", "name": "t3_a1", "x": {digits}, "y": [-{digits}]}}\n'
    assert redpipe("--field=x", "--field=y", "--from=-", database, stdin=lines) == (0, "", "")
    assert query(database, "SELECT x, y FROM posts") == [(digits, f"[-{digits}]")]


@pytest.mark.parametrize(
    ("post", "stored"),
    [
        ({"media": {"oembed": {"type": "video"}}}, "video"),
        ({"media": {"oembed": {"type": None}}}, None),
        ({"media": {"oembed": {}}}, None),
        ({"media": {"oembed": "none"}}, None),
        ({"media": {"oembed": [{"type": "video"}]}}, None),
        ({"media": None}, None),
        ({}, None),
        ({"media.oembed.type": "video"}, None),
    ],
)
def test_dots_reach_into_objects_only(post, stored):
    fields = parse_fields(["media.oembed.type"])
    assert transform({"id": "a1", "name": "t3_a1", **post}, fields)["media_oembed_type"] == stored


# --- new and existing databases


def test_fields_of_a_stream_are_stored(redpipe, fake_reddit, database):
    fake_reddit.add(make_post(1, score=17, is_self=False, media={"type": "x"}, over_18=True))
    options = ["--field=score", "--field", "media.type:media", "--field=is_self", "--field=over_18"]
    assert redpipe(*options, "--once", database, "python") == (0, "", "")
    assert columns(database) == ["score", "media", "is_self", "over_18"]
    assert query(database, "SELECT title, score, media, is_self, over_18 FROM posts") == [
        ("Invented post number 1", 17, "x", 0, 1)
    ]


def test_a_feed_leaves_other_fields_null(redpipe, fake_reddit, database):
    fake_reddit.anonymous_json_blocked = True
    fake_reddit.add(make_post(1, score=17))
    assert redpipe("--field=score", "--once", database, "python") == (0, "", "")
    assert query(database, "SELECT title, score FROM posts") == [("Invented post number 1", None)]


def test_a_field_is_added_to_an_existing_database(import_posts, database):
    import_posts({"id": "a1", "name": "t3_a1", "title": "Old", "score": 1})
    assert columns(database) == []
    import_posts(
        {"id": "a2", "name": "t3_a2", "title": "New", "score": 2}, options=["--field=score"]
    )
    assert columns(database) == ["score"]
    assert query(database, "SELECT id, title, score FROM posts ORDER BY id") == [
        ("a1", "Old", None),
        ("a2", "New", 2),
    ]


def test_a_second_import_fills_a_new_field_and_overwrites_nothing(import_posts, database):
    import_posts(
        {"id": "a1", "name": "t3_a1", "score": 1},
        {"id": "a2", "name": "t3_a2"},
        {"id": "a3", "name": "t3_a3"},
        options=["--field=score"],
    )
    import_posts(
        {"id": "a1", "name": "t3_a1", "score": 100, "ups": 10},
        {"id": "a2", "name": "t3_a2", "score": 0},
        {"id": "a3", "name": "t3_a3", "score": None, "ups": False},
        options=["--field=ups", "--field=score"],
    )
    assert columns(database) == ["score", "ups"]
    assert query(database, "SELECT id, score, ups FROM posts ORDER BY id") == [
        ("a1", 1, 10),
        ("a2", 0, None),
        ("a3", None, 0),
    ]


def test_a_field_no_longer_asked_for_keeps_its_column_and_its_values(import_posts, database):
    import_posts({"id": "a1", "name": "t3_a1", "score": 1}, options=["--field=score"])
    import_posts(
        {"id": "a1", "name": "t3_a1", "score": 5, "ups": 5},
        {"id": "a2", "name": "t3_a2", "score": 2},
    )
    assert columns(database) == ["score"]
    assert query(database, "SELECT id, score FROM posts ORDER BY id") == [("a1", 1), ("a2", None)]


def test_a_column_that_is_there_in_another_case_is_used(import_posts, database):
    import_posts({"id": "a1", "name": "t3_a1", "score": 1}, options=["--field=score:Score"])
    import_posts(
        {"id": "a1", "name": "t3_a1", "score": 9},
        {"id": "a2", "name": "t3_a2", "score": 2},
        options=["--field=SCORE:SCORE"],
    )
    import_posts({"id": "a3", "name": "t3_a3", "score": 3}, options=["--field=score"])
    assert columns(database) == ["Score"]
    assert query(database, "SELECT id, score FROM posts ORDER BY id") == [
        ("a1", 1),
        ("a2", None),
        ("a3", 3),
    ]


def test_words_of_sql_are_columns_like_others(import_posts, database):
    words = ["order", "select", "group", "index", "rowid", "oid", "excluded", "posts", "null"]
    options = [f"--field={word}" for word in words]
    post = {word: n for n, word in enumerate(words)}
    import_posts({"id": "a1", "name": "t3_a1"}, options=options)
    import_posts(
        {"id": "a1", "name": "t3_a1", **post},
        {"id": "a2", "name": "t3_a2", **post},
        options=options,
    )
    assert columns(database) == words
    quoted = ", ".join(f'"{word}"' for word in words)
    assert query(database, f"SELECT id, {quoted} FROM posts ORDER BY id") == [
        ("a1", *range(len(words))),
        ("a2", *range(len(words))),
    ]


def test_views_do_not_mind_more_columns(import_posts, database):
    import_posts(
        {"id": "a1", "name": "t3_a1", "created_utc": 1700000000, "permalink": "/a1", "score": 1},
        {"id": "a2", "name": "t3_a2", "created_utc": 1700000001, "permalink": "/a2", "score": 2},
        options=[f"--field=score:{column}" for column in ("created", "link", "hour", "posts")],
    )
    assert query(database, "SELECT * FROM recent_posts") == [
        ("2023-11-14T22:13:21Z", None, None, None, "https://www.reddit.com/a2"),
        ("2023-11-14T22:13:20Z", None, None, None, "https://www.reddit.com/a1"),
    ]
    assert query(database, "SELECT * FROM posts_per_hour") == [("2023-11-14T22:00:00Z", 2)]


def test_two_processes_add_their_fields_to_one_database(redpipe, database):
    for field in ("score", "ups"):
        process = redpipe.start(f"--field={field}", "--from=-", database)
        process.stdin.write(json.dumps({"name": f"t3_{field}", field: 7}) + "\n")
        process.stdin.flush()
    for process in redpipe.started:
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, "", "")
    assert sorted(columns(database)) == ["score", "ups"]
    assert query(database, "SELECT id, score, ups FROM posts ORDER BY id") == [
        ("score", 7, None),
        ("ups", None, 7),
    ]
