"""Lines of other subreddits are passed over unparsed, and no row depends on it."""

from __future__ import annotations

import json
import lzma
import os
import random
from itertools import islice

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline import BODY_LIMIT, BadLines, open_file, read_file


def read(path, names=()):
    """Return the posts that names select of a file, and how many lines were bad."""
    posts, bad = [], 0
    with open_file(str(path)) as file:
        try:
            for batch in read_file(file, names):
                posts += batch.posts
        except BadLines as exc:
            bad = int(str(exc).split()[1])
    return posts, bad


def ids(path, names):
    posts, bad = read(path, names)
    return [post["id"] for post in posts], bad


def expecting(cases, expected):
    return [pytest.param(case, expected, id=name) for name, case in cases.items()]


def post(body):
    return b'{"name": "t3_a1", ' + body + b"}"


SELECTED = {
    "plain": b'"subreddit": "python"',
    "capitals": b'"subreddit": "PyThOn"',
    "no space": b'"subreddit":"python"',
    "all kinds of space": b'"subreddit"\t \r:\r\t  "python"',
    "an escaped key": b'"\\u0073ubreddit": "python"',
    "a key escaped in another case": b'"subredd\\u0069\\u0074": "python"',
    "an escaped value": b'"subreddit": "\\u0070ython"',
    "an escaped value in capitals": b'"subreddit": "PYTH\\u004FN"',
    "key and value escaped beside another": b'"over": {"subreddit": "rust"}, '
    b'"\\u0073ubreddit": "p\\u0079thon"',
    "an inner one of another": b'"subreddit": "python", "over": [{"subreddit": "rust"}]',
    "an inner one of another before": b'"over": [{"subreddit": "rust"}], "subreddit": "python"',
    "twice, the last one counts": b'"subreddit": "rust", "subreddit": "python"',
    "an ampersand escaped": b'"url": "a?b\\u0026c", "subreddit": "python"',
}


OTHERS = {
    "another": b'"subreddit": "rust"',
    "one that begins alike": b'"subreddit": "pythons"',
    "one that ends alike": b'"subreddit": "cpython"',
    "a wanted one inside": b'"subreddit": "rust", "over": {"subreddit": "python"}',
    "a wanted one in a text": b'"subreddit": "rust", "text": "\\"subreddit\\": \\"python\\""',
    "a wanted one before the one that counts": b'"subreddit": "python", "subreddit": "rust"',
    "none": b'"subreddit": null',
    "none at all": b'"title": "python"',
    "a number": b'"subreddit": 17',
    "an array": b'"subreddit": ["python"]',
    "letters that are not ASCII": '"subreddit": "\u212aotlin"'.encode(),
    "the same, escaped": b'"subreddit": "\\u212aotlin"',
    "blanks around": b'"subreddit": " python "',
    "a wanted one in another key's place": b'"subreddit_name": "python"',
}


@pytest.mark.parametrize(("body", "found"), expecting(SELECTED, ["a1"]) + expecting(OTHERS, []))
def test_a_post_is_selected_by_the_name_that_counts_however_it_is_written(file, body, found):
    file.write_bytes(post(body))
    assert ids(file, ["python", "kotlin", "c", "17"]) == (found, 0)


PASSED_OVER = {
    "cut off": b'{"name": "t3_a1", "subreddit": "rust", "title": "cut o',
    "too many brackets": b'{"name": "t3_a1", "subreddit": "rust"}}}',
    "not UTF-8": b'{"name": "t3_a1", "subreddit": "rust", "title": "caf\xe9"}',
    "a comment": b'{"name": "t1_a1", "subreddit": "rust", "body": "x"}',
    "no id": b'{"title": "a", "author": "b", "subreddit": "rust"}',
    "a harmless escape": b'{"name": "t3_a1", "subreddit": "rust", "x": "\\u00e9\\u0026\\u003c',
}


READ = {
    "nothing to tell by": b"nonsense",
    "wanted and cut off": b'{"name": "t3_x1", "subreddit": "python", "title": "cut o',
    "a wanted comment": b'{"name": "t1_x1", "subreddit": "python", "body": "x"}',
    "perhaps wanted and cut off": b'{"name": "t3_x1", "subreddit": "\\u0070ython", "title": "cut',
    "an escape that may hide one": b'{"subreddit": "rust", "\\u0073ubreddit": "python", "x": "cut',
    "no end": b'{"subreddit": "rust", "x": "' + b"x" * BODY_LIMIT + b'"}',
}


@pytest.mark.parametrize(("line", "bad"), expecting(PASSED_OVER, 0) + expecting(READ, 1))
def test_a_line_is_passed_over_only_if_it_can_be_told_to_be_of_others(file, line, bad):
    file.write_bytes(line + b"\n" + post(b'"subreddit": "python"'))
    assert ids(file, ["python"]) == (["a1"], bad)
    assert ids(file, ["all"])[1] == 1


# --- whatever a line holds

NAMES = ["python", "rust", "u_some-name", "reddit.com", "kotlin"]
VALUES = [
    *NAMES,
    *map(str.upper, NAMES),
    *("Python", "pythons", "\u212aotlin", "p\u0443thon", "python ", "", 'a "subreddit": "rust" b'),
    *(None, 17, True, ["python"], {"subreddit": "python"}),
]
KEYS = ["subreddit", "Subreddit", "subreddit_id", "title", "over", '"subreddit', "subreddit "]

inner = st.recursive(
    st.sampled_from(VALUES) | st.text(max_size=8),
    lambda values: (
        st.lists(st.tuples(st.sampled_from(KEYS), values), max_size=3).map(tuple)
        | st.lists(values, max_size=3)
    ),
    max_leaves=4,
)
bare_posts = st.builds(
    lambda identifier, pairs: (("name", f"t3_{identifier}"), *pairs),
    st.text("0123456789abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=3),
    st.lists(
        st.tuples(st.just("subreddit"), st.sampled_from(VALUES))
        | st.tuples(st.sampled_from(KEYS), inner),
        max_size=4,
    ),
)
things = bare_posts.map(lambda post: (("kind", "t3"), ("data", post)))
listings = st.lists(things, max_size=3).map(
    lambda children: (("kind", "Listing"), ("data", (("children", children),)))
)
one = bare_posts | things | listings
line_values = (
    one | st.lists(one, max_size=3) | st.lists(one).map(lambda values: (("data", values),))
)


def write_string(value, dice, often):
    """Write a string as JSON; `often` says how many characters are escaped needlessly."""

    def written(character):
        if dice.random() < often and ord(character) < 0x10000:
            return f"\\u{ord(character):04{dice.choice('xX')}}"
        return json.dumps(character, ensure_ascii=False)[1:-1]

    return '"' + "".join(map(written, value)) + '"'


def write(value, dice, often):
    """Write JSON in any of its ways; an object is a tuple of pairs, keys may come twice."""

    def space():
        return dice.choice(["", "", "", " ", "\t", "  ", "\r"])

    if isinstance(value, str):
        return write_string(value, dice, often)
    if isinstance(value, list):
        return "[" + ",".join(space() + write(it, dice, often) + space() for it in value) + "]"
    if isinstance(value, tuple):
        pairs = (
            f"{space()}{write_string(key, dice, often)}{space()}:{space()}{write(it, dice, often)}"
            for key, it in value
        )
        return "{" + ",".join(pairs) + space() + "}"
    return json.dumps(value)


def damaged(line, dice):
    """Return a line as a bad disk or a broken program may leave it."""
    at, to = sorted((dice.randrange(len(line) + 1), dice.randrange(len(line) + 1)))
    stray = dice.choice([b'"', b"\\", b"{", b"}", b"]", b":", b",", b"\xff", b"\n", b"\0", b" "])
    cut = [line[:at], line[at:], line[:at] + line[to:]]
    strewn = [line[:at] + stray + line[at:], line[:at] + stray + line[at + 1 :]]
    return dice.choice([*cut, *strewn, line + line, line.swapcase(), line[::-1]])


def lines_of(values, dice):
    for value in values:
        often = dice.choice([0, 0, 0.02, 0.3])
        line = write(value, dice, often).encode("utf-8", "surrogatepass")
        yield damaged(line, dice) if dice.random() < 0.3 else line


def selected_by_parsing(path, names):
    """Return what names select when every line is parsed."""
    wanted = {name.encode() for name in names}
    return [
        post
        for post in read(path)[0]
        if isinstance(post.get("subreddit"), str)
        and post["subreddit"].encode("utf-8", "surrogatepass").lower() in wanted
    ]


@settings(
    max_examples=int(os.environ.get("REDPIPE_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(line_values, min_size=1, max_size=5),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=2),
    st.integers(0, 2**32),
)
@example([(("name", "t3_a"), ("subreddit", "\u212aotlin"))], ["kotlin"], 0)
def test_the_rows_are_those_that_parsing_every_line_gives(file, values, names, seed):
    file.write_bytes(b"\n".join(lines_of(values, random.Random(seed))))
    assert read(file, names)[0] == selected_by_parsing(file, names)


@pytest.mark.parametrize("count", [3000, pytest.param(38_503, marks=pytest.mark.long)])
def test_of_recorded_posts_the_same_are_selected(samples, file, count):
    with lzma.open(samples / "posts.ndjson.xz") as source:
        lines = list(islice(source, count))
    file.write_bytes(b"".join(lines))
    posts = [json.loads(line) for line in lines]
    for names in ["askreddit"], ["changelog", "pics"], ["reddit.com"]:
        wanted = [post["id"] for post in posts if str(post.get("subreddit")).lower() in names]
        assert wanted
        assert ids(file, names) == (wanted, 0)
    assert ids(file, ["nobody_at_all"]) == ([], 0)
