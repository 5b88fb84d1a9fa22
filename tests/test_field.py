"""--field: more of a post than the built-in columns."""

from __future__ import annotations

import json

import pytest

from conftest import query, says
from fake_reddit import make_post
from pipeline import BUILT_IN, BadUsage, Field, parse_fields, transform


def columns(database):
    """Give the columns that follow the built-in ones."""
    names = [row[1] for row in query(database, "PRAGMA table_info(posts)")]
    assert names[: len(BUILT_IN)] == [*BUILT_IN]
    return names[len(BUILT_IN) :]


@pytest.fixture
def import_posts(redpipe, database):
    """Import posts by the built file with some fields; their ids are the keys."""

    def import_posts(*specs, **posts):
        lines = [json.dumps({"name": f"t3_{name}", **post}) for name, post in posts.items()]
        options = [f"--field={spec}" for spec in specs]
        assert redpipe(*options, "--from=-", database, stdin="\n".join(lines)) == (0, "", "")

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


NO_COLUMN = ["", ":", ".", ":column", "a b", "1st", "größe", "score\n", "a..b:ab", ".a:a", "a.:a"]
NO_COLUMN += [f"score:{c}" for c in ("größe", "a.b", "a:b", "a b", "1st", "a\n", '"', "x); DROP")]
TAKEN = [*BUILT_IN, *(f"score:{column.title()}" for column in BUILT_IN), "author.name"]
TWICE = ["score score", "score Score", "Score score", "score ups:SCORE", "a.b a_b"]


BAD_SPECS = [[spec] for spec in NO_COLUMN + TAKEN] + [pair.split() for pair in TWICE]


@pytest.mark.parametrize("specs", BAD_SPECS, ids=repr)
def test_what_can_be_no_column_or_is_one_already_is_a_usage_error(specs):
    with pytest.raises(BadUsage):
        parse_fields(specs)


@pytest.mark.parametrize("fields", [["score:Title"], ["score", "ups:Score"]])
@pytest.mark.parametrize("source", ["--from=-", "--once"])
def test_a_bad_field_ends_in_64_before_anything_is_touched(
    redpipe, fake_reddit, database, fields, source
):
    fake_reddit.create("python")
    options = [f"--field={field}" for field in fields]
    assert says(redpipe(*options, source, database, "python"), 64, fields[-1])
    assert not database.exists()
    assert fake_reddit.log == []


# --- what is stored

LONG, DEEP = "7" * 4300, "[" * 900 + "]" * 900

VALUES = [
    ('"text"', "text"),
    ('""', ""),
    ('"12"', "12"),
    ('"1e3"', "1e3"),
    (r'"a \u0000 b \ud800 c"', "a \ufffd b \ufffd c"),
    ('"a &amp; b"', "a &amp; b"),
    ("0", 0),
    (f"{2**63 - 1}", 2**63 - 1),
    (f"{-(2**63)}", -(2**63)),
    (f"{2**63}", "9223372036854775808"),
    (f"{-(2**63) - 1}", "-9223372036854775809"),
    (LONG, LONG),
    ("1.0", 1.0),
    ("-1e300", -1e300),
    ("NaN", None),
    ("Infinity", None),
    ("-1e999", None),
    ("true", 1),
    ("false", 0),
    ("null", None),
    ("{}", "{}"),
    ("[]", "[]"),
    ('{"type": "youtube",   "n": 1}', '{"type": "youtube", "n": 1}'),
    (r'[1,"zwei",null,true,0.5,{"\u00e9":"ß"}]', '[1, "zwei", null, true, 0.5, {"é": "ß"}]'),
    (r'["a \ud800 b"]', '["a \ufffd b"]'),
    (f"[-{LONG}]", f"[-{LONG}]"),
    ('[1e999, NaN, -Infinity, {"y": -1e999}]', '[null, null, null, {"y": null}]'),
    (DEEP, DEEP),
]


def test_a_value_of_any_type_is_stored(redpipe, database):
    lines = [f'{{"name": "t3_{n:02}", "x": {value}}}\n' for n, (value, _) in enumerate(VALUES)]
    assert redpipe("--field=x", "--from=-", database, stdin="".join(lines)) == (0, "", "")
    types = {str: "text", int: "integer", float: "real", type(None): "null"}
    assert query(database, "SELECT x, typeof(x) FROM posts ORDER BY id") == [
        (value, types[type(value)]) for _, value in VALUES
    ]


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
    assert transform({"id": "a1", **post}, fields)["media_oembed_type"] == stored


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


def test_a_field_is_added_filled_and_kept_and_its_values_are_not_overwritten(
    import_posts, database
):
    import_posts(a1={"score": 1}, a2={}, a3={})
    assert columns(database) == []
    import_posts("score", a1={"score": 1}, a2={}, a3={})
    import_posts(
        "ups",
        "score",
        a1={"score": 100, "ups": 10},
        a2={"score": 0},
        a3={"score": None, "ups": False},
    )
    import_posts(a1={"score": 5, "ups": 5}, a4={"score": 5})
    assert columns(database) == ["score", "ups"]
    assert query(database, "SELECT id, score, ups FROM posts ORDER BY id") == [
        ("a1", 1, 10),
        ("a2", 0, None),
        ("a3", None, 0),
        ("a4", None, None),
    ]


def test_a_column_that_is_there_in_another_case_is_used(import_posts, database):
    import_posts("score:Score", a1={"score": 1})
    import_posts("SCORE:SCORE", a1={"SCORE": 9}, a2={"SCORE": 2, "score": 3})
    import_posts("score", a3={"score": 3})
    assert columns(database) == ["Score"]
    assert query(database, "SELECT id, score FROM posts ORDER BY id") == [
        ("a1", 1),
        ("a2", 2),
        ("a3", 3),
    ]


def test_words_of_sql_are_columns_like_others(import_posts, database):
    words = ["order", "select", "group", "index", "rowid", "oid", "excluded", "posts", "null"]
    post = {word: n for n, word in enumerate(words)}
    import_posts(*words, a1={})
    import_posts(*words, a1=post, a2=post)
    assert columns(database) == words
    quoted = ", ".join(f'"{word}"' for word in words)
    assert query(database, f"SELECT {quoted} FROM posts") == [tuple(range(len(words)))] * 2


def test_views_do_not_mind_more_columns(import_posts, database):
    import_posts(
        *[f"score:{column}" for column in ("created", "link", "hour", "posts")],
        a1={"created_utc": 1700000000, "permalink": "/a1", "score": 1},
        a2={"created_utc": 1700000001, "permalink": "/a2", "score": 2},
    )
    assert query(database, "SELECT * FROM recent_posts") == [
        ("2023-11-14T22:13:21Z", None, None, None, "https://www.reddit.com/a2"),
        ("2023-11-14T22:13:20Z", None, None, None, "https://www.reddit.com/a1"),
    ]
    assert query(database, "SELECT * FROM posts_per_hour") == [("2023-11-14T22:00:00Z", 2)]
