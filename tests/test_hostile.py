"""Whatever a post holds, it becomes a row, and the row comes back equal.

Properties over invented posts of any shape. REDPIPE_EXAMPLES: how many of each to try
(default 50; the long way is thousands).
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conftest import query
from pipeline import (
    COLUMNS,
    BadLines,
    Database,
    Field,
    FileUnreadable,
    load,
    open_file,
    read_file,
    transform,
)
from virtual import VirtualClock

INJECTION = "'); DROP TABLE posts;--"
MEGABYTE = "é\0\ud800x" * 250_000
KEYS = ("created_utc", "subreddit", "title", "author", "author_fullname", "permalink", "name")
FIELDS = [Field(("x",), "x"), Field(("x", "y"), "x_y"), Field(("order",), "order")]
ROW = [*COLUMNS, "x", "x_y", "order"]
TEXTS = ("subreddit", "title", "author", "author_name", "permalink")
INJECTED = {"id": "a", **dict.fromkeys(KEYS, INJECTION), "x": {INJECTION: 1}, "order": INJECTION}

settings.register_profile(
    "hostile",
    max_examples=int(os.environ.get("REDPIPE_EXAMPLES", "50")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
hostile = settings.get_profile("hostile")


class Nested(list):
    """Hold lists or objects in each other; hypothesis cannot print deep ones."""

    def __init__(self, depth, kind):
        value = None
        for _ in range(depth - 1):
            value = [value] if kind == "list" else {"y": value}
        super().__init__([value])
        self.name = f"Nested({depth}, {kind!r})"

    def __repr__(self):
        return self.name


SPECIAL_TEXTS = [INJECTION, '"); DROP TABLE posts;--', "[deleted]", "NULL", "nan", "1e999"]
SPECIAL_TEXTS += [
    "\x1b[31m\x1b]0;title\x07",
    "9" * 5000,
    "x" * 2**12,
    "\ud800" * 2**10,
    "\0" * 2**10,
]
SPECIAL_INTEGERS = [2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**4299, -(10**4299)]
text = st.one_of(
    st.text(st.characters()),  # NUL and surrogates are among them
    st.text(st.sampled_from("\0\ud800\udfff\U0001f600\x1b\r\n\u202e&<>;'\"?%"), max_size=20),
    st.sampled_from(SPECIAL_TEXTS),
)
integers = st.integers() | st.sampled_from(SPECIAL_INTEGERS)
times = st.one_of(
    st.sampled_from([0, -1, 1, 4_102_444_799.0, 4_102_444_799, 1e18, 1e19, -1e300, "0", "-1.5"]),
    integers,
    st.floats(),
    text,
)
scalars = st.one_of(st.none(), st.booleans(), integers, st.floats(), text)
kinds = st.sampled_from(["list", "object"])
values = st.one_of(
    scalars,
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
        max_leaves=12,
    ),
    st.builds(Nested, st.integers(1, 200), kinds),
    st.builds(Nested, st.just(5000), kinds),
)
ids = st.text("0123456789abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=100)
posts = st.builds(
    lambda identifier, known, other: {**other, **known, "id": identifier},
    ids,
    st.fixed_dictionaries(
        {}, optional={**dict.fromkeys(KEYS, values), "created_utc": times | values}
    ),
    st.dictionaries(st.sampled_from(["x", "order", "kind", "data", INJECTION]), values, max_size=3),
)


several = {"min_size": 1, "max_size": 5, "unique_by": lambda post: post["id"]}


@pytest.fixture
def empty(database):
    """Give what opens a database, and what empties it before each example."""
    with Database(str(database), FIELDS, VirtualClock()) as opened:

        def emptied():
            opened.execute("DELETE FROM posts")
            return opened

        yield emptied


def rows_of(path):
    """Read rows back by plain SQL, as `transform` writes them."""
    names = ", ".join(f'"{name}"' for name in ROW)
    found = query(path, f"SELECT {names} FROM posts")
    return {row[0]: dict(zip(ROW, row, strict=True)) for row in found}


def is_storable(value):
    """Tell whether SQLite gives a value back as it got it."""
    if isinstance(value, str):
        return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or (isinstance(value, float) and math.isfinite(value))


@hostile
@given(st.lists(posts, **several))
@example([INJECTED])
@example([{"id": "a", "title": MEGABYTE, "x": [MEGABYTE]}])
@example([{"id": "z" * 100, "x": Nested(100_000, "list")}, {"id": "A"}])
@example([{"id": "0", "x": [float("nan"), 10**5000, "\ud800", True]}])
def test_any_post_becomes_a_row_that_comes_back_equal(empty, database, posts):
    rows = {post["id"]: transform(post, FIELDS) for post in posts}
    for row in rows.values():
        assert list(row) == ROW
        assert all(map(is_storable, row.values()))
        assert type(row["created_utc"]) in (int, type(None))
        assert {type(row[column]) for column in TEXTS} <= {str, type(None)}
    opened = empty()
    assert load(opened, rows.values()) == len(rows)
    assert rows_of(database) == rows
    assert load(opened, rows.values()) == 0
    assert rows_of(database) == rows


@hostile
@given(posts, posts)
def test_a_post_that_comes_again_never_loses_what_is_known(empty, database, first, second):
    opened = empty()
    one, other = transform(first, FIELDS), transform({**second, "id": first["id"]}, FIELDS)
    load(opened, [one])
    load(opened, [other])
    filled = {key: other[key] if value is None else value for key, value in one.items()}
    assert rows_of(database) == {first["id"]: filled}


@pytest.mark.parametrize("seconds", [0, -1, -(10**9), 4_102_444_799, 2**62, -(2**62)])
def test_times_far_away_do_not_break_the_views(empty, database, seconds):
    load(empty(), [transform({"id": "a1", "created_utc": seconds}, FIELDS)])
    for view in ("recent_posts", "posts_per_hour", "coverage"):
        query(database, f"SELECT * FROM {view}")


# As lines of a file


def as_line(post):
    """Write a post as JSON, NaN and surrogates included; None for what JSON cannot say."""
    try:
        return json.dumps(post).encode()
    except (ValueError, RecursionError):
        return None


def is_plain(post, line):
    """Tell whether a post can be mistaken for nothing else, and is not too deep to be read."""
    shallow = line is not None and line.count(b"[") + line.count(b"{") < 500
    return shallow and {"title", "author"} <= post.keys() and "name" not in post


@hostile
@given(st.lists(posts.filter(lambda post: not isinstance(post.get("data"), list)), **several))
def test_any_post_of_a_file_is_stored_or_said(empty, database, tmp_path, posts):
    opened = empty()
    lines = {post["id"]: line for post in posts if (line := as_line(post))}
    (tmp_path / "posts.ndjson").write_bytes(b"\n".join(lines.values()))
    bad = 0
    with open_file(str(tmp_path / "posts.ndjson")) as file:
        try:
            for batch in read_file(file):
                load(opened, [transform(post, FIELDS) for post in batch.posts])
        except BadLines as exc:
            bad = int(str(exc).split()[1])
    ids = rows_of(database).keys()
    assert len(ids) == len(lines) - bad
    assert ids >= {post["id"] for post in posts if is_plain(post, lines.get(post["id"]))}


@hostile
@given(st.binary(max_size=300) | st.text().map(str.encode) | values.map(as_line).filter(bool))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"[" + b"9" * 5000 + b"," + b"[" * 100_000)
@example(b"-" + b"9" * 5000)
@example(b'"\\ud800\xed\xa0\x80"')
@example(b"")
@example(b"\xef\xbb\xbf{}")
def test_a_file_of_anything_raises_only_what_a_user_can_be_told(tmp_path, content):
    (tmp_path / "posts.ndjson").write_bytes(content)
    with (
        suppress(BadLines, FileUnreadable),
        open_file(str(tmp_path / "posts.ndjson")) as file,
    ):
        for batch in read_file(file):
            assert all(transform(post) for post in batch.posts)
