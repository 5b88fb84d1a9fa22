"""transform: what a post becomes, without a database."""

from __future__ import annotations

import copy

import pytest

from fake_reddit import make_post
from pipeline import Field, transform

COLUMNS = ("id", "created_utc", "subreddit", "title", "author", "author_name", "permalink")
NOTHING = {**dict.fromkeys(COLUMNS), "id": "a1"}


def test_a_post_is_trimmed_and_renamed():
    assert transform(make_post(7, created_utc=1_790_000_123, subreddit="Python")) == {
        "id": "1tq0007",
        "created_utc": 1_790_000_123,
        "subreddit": "Python",
        "title": "Invented post number 7",
        "author": "t2_uvb",
        "author_name": "invented_7",
        "permalink": "/r/Python/comments/1tq0007/invented_post_number_7/",
    }


def test_columns_come_in_the_order_of_the_table_and_then_of_the_fields():
    fields = [Field(("score",), "b"), Field(("ups",), "a"), Field(("score",), "c")]
    row = transform({"id": "a1", "score": 3, "created": 1_790_000_000}, fields)
    assert row == {**NOTHING, "b": 3, "a": None, "c": 3}
    assert list(row) == [*COLUMNS, "b", "a", "c"]


@pytest.mark.parametrize("value", [None, 17, 1.5, True, ["x"], {"x": "y"}])
def test_what_is_no_string_is_null(value):
    keys = ["subreddit", "title", "author", "author_fullname", "permalink"]
    assert transform({"id": "a1", **dict.fromkeys(keys, value)}) == NOTHING


@pytest.mark.parametrize(
    ("created_utc", "stored"),
    [
        (1_790_000_000.0, 1_790_000_000),
        (1_790_000_000, 1_790_000_000),
        ("1790000000", 1_790_000_000),
        ("1790000000.0", 1_790_000_000),
        (1_790_000_000.999, 1_790_000_000),
        (0, 0),
        (-1, -1),
        (4_080_000_000, 4_080_000_000),
        (2**63 - 1, 2**63 - 1),
        (2**63, None),
        (-(2**63) - 1, None),
        (1e300, None),
        (float("nan"), None),
        (float("inf"), None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        (None, None),
        (True, None),
        ([1], None),
    ],
)
def test_created_utc_is_a_64_bit_integer_or_null(created_utc, stored):
    row = transform({"id": "a1", "created_utc": created_utc, "created": 5})
    assert row == {**NOTHING, "created_utc": stored}
    assert type(row["created_utc"]) in (int, type(None))


@pytest.mark.parametrize(
    ("post", "author", "author_name"),
    [
        ({"author": "a", "author_fullname": "t2_a"}, "t2_a", "a"),
        ({"author": "[deleted]"}, None, None),
        ({"author": "[deleted]", "author_fullname": "t2_a"}, "t2_a", None),
        ({"author": "a"}, None, "a"),
        ({"author": None, "author_fullname": None}, None, None),
        ({"author": "[Deleted]"}, None, "[Deleted]"),
    ],
)
def test_a_deleted_author_has_no_name(post, author, author_name):
    row = transform({"id": "a1", **post})
    assert (row["author"], row["author_name"]) == (author, author_name)


@pytest.mark.parametrize(
    ("column", "value", "stored"),
    [
        ("permalink", "/r/a/comments/a1/b/", "/r/a/comments/a1/b/"),
        ("permalink", "/r/a/comments/a1/b/?ref=search_posts", "/r/a/comments/a1/b/"),
        ("permalink", "/r/a/comments/a1/b/?a=1?b=2", "/r/a/comments/a1/b/"),
        ("permalink", "/r/a/comments/a1/größe/", "/r/a/comments/a1/größe/"),
        ("permalink", "?", ""),
        ("permalink", "", ""),
        ("title", "a\0b", "a\ufffdb"),
        ("title", "\ud83d", "\ufffd"),
        ("title", "\udc00 and \ud800", "\ufffd and \ufffd"),
        ("title", "\U0001f600 é \u202e \u200b", "\U0001f600 é \u202e \u200b"),
        ("title", " \r\n\x10 \x1b[31m\x7f\x85 ", " \r\n\x10 \x1b[31m\x7f\x85 "),
        ("title", "\ufffe\uffff", "\ufffe\uffff"),
        ("title", "a &amp; b &lt;?", "a &amp; b &lt;?"),
        ("title", "", ""),
    ],
)
def test_only_what_sqlite_cannot_hold_is_replaced_and_a_permalink_loses_its_query(
    column, value, stored
):
    assert transform({"id": "a1", column: value}) == {**NOTHING, column: stored}


def test_a_post_is_not_changed():
    post = make_post(1, permalink="/x?y", author="[deleted]", media={"x": ["\0"]})
    before = copy.deepcopy(post)
    transform(post, [Field(("media",), "media"), Field(("media", "x"), "x")])
    assert post == before
