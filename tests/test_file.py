"""--from: posts out of files and pipes, good lines and bad ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from artefact import wait_for
from conftest import count_posts, open_terminal
from fake_reddit import make_post
from pipeline import BadLines, Database, load, open_file, read_file, transform
from virtual import VirtualClock

COLUMNS = "id, created_utc, subreddit, title, author, author_name, permalink"
MEBIBYTE = 2**20

# A process's peak counts that of the process it was forked from, so an interpreter as
# small as can be starts what is measured; it gives the peak in KiB.
PEAK = """
import posix, sys
process = posix.posix_spawn(sys.argv[1], sys.argv[1:], posix.environ)
_, status, usage = posix.wait4(process, 0)
print(usage.ru_maxrss, status)
"""


def write_lines(path, *lines):
    """Write a file of lines; what is no bytes is written as JSON."""
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def numbered(numbers):
    """Invent posts by their numbers, as bytes of a file."""
    return b"".join(json.dumps(make_post(n)).encode() + b"\n" for n in numbers)


def thing(kind, **data):
    return {"kind": kind, "data": data}


def listing(*children):
    return thing("Listing", after=None, children=list(children))


def rows(database, columns="id", table="posts"):
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1").fetchall()


def ids(database):
    return [row[0] for row in rows(database)]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "posts.ndjson"


@pytest.fixture
def import_file(file, database):
    """Import lines within this process, and give the posts stored or filled."""

    def import_file(*lines, names=(), clock=None):
        write_lines(file, *lines)
        with (
            Database(str(database), clock=clock or VirtualClock()) as opened,
            open_file(str(file)) as source,
        ):
            return sum(
                load(opened, [transform(post) for post in batch.posts], batch.cursors, batch.gaps)
                for batch in read_file(source, names)
            )

    return import_file


# --- what a line may be


def test_posts_things_and_listings_are_mixed_at_will(redpipe, fake_reddit, file, database):
    write_lines(
        file,
        {
            "id": "a1",
            "created_utc": 1700000001,
            "subreddit": "Python",
            "title": "One",
            "author": "somebody",
            "author_fullname": "t2_1",
            "permalink": "/r/Python/comments/a1/one/?ref=x",
        },
        thing("t3", name="t3_a2", created_utc=1700000002.0, author="[deleted]"),
        listing(thing("t3", id="a3", title="Three"), thing("t3", id="a4"), thing("t5", id="x")),
        {"name": "t3_a5"},
        listing(),
    )
    assert redpipe("--from", file, database) == (0, "", "")
    assert rows(database, COLUMNS) == [
        ("a1", 1700000001, "Python", "One", "t2_1", "somebody", "/r/Python/comments/a1/one/"),
        ("a2", 1700000002, None, None, None, None, None),
        ("a3", None, None, "Three", None, None, None),
        ("a4", None, None, None, None, None, None),
        ("a5", None, None, None, None, None, None),
    ]
    assert rows(database, "*", "cursors") == []
    assert fake_reddit.log == []


POST = {"created_utc": 1700000001, "title": "Titled", "author": "somebody"}

POSTS = {
    "its name": {"name": "t3_a1"},
    "its name beside its id": {"id": "a1", "name": "t3_a1", "selftext": "text"},
    "title and author": {"id": "a1", **POST},
    "a deleted author": {"id": "a1", "title": "Titled", "author": "[deleted]"},
    "an author who is null": {"id": "a1", "title": "Titled", "author": None},
    "a name that is null": {"id": "a1", "name": None, **POST},
    "an empty name": {"id": "a1", "name": "", **POST},
    "columns of comments, too": {
        "id": "a1",
        **POST,
        "body": None,
        "parent_id": None,
        "link_id": None,
    },
    "an ad": {"id": "a1", "name": "t3_a1", "promoted": True, "title": "Buy"},
    "a field that is called data": {"name": "t3_a1", "data": [1]},
    "fields of the wrong type": {"id": "a1", "title": 17, "author": ["x"]},
    "a thing": thing("t3", id="a1"),
    "a thing that has its kind inside": {"kind": "t3", "name": "t3_a1"},
    "a listing": listing(thing("t3", id="a1"), thing("t1", id="b1"), thing("more")),
    "an array of posts": [{"id": "a1", **POST}],
    "an array of things": [thing("t3", id="a1")],
    "a permalink": [listing(thing("t3", id="a1")), listing(thing("t1", id="b1", body="text"))],
    "an archive's answer": {"data": [{"id": "a1", **POST}]},
    "an archive's answer with more": {
        "data": [{"id": "a1", **POST}],
        "error": None,
        "metadata": {},
    },
}


@pytest.mark.parametrize("value", POSTS.values(), ids=POSTS.keys())
def test_a_post_is_stored_if_it_says_so(import_file, database, caplog, value):
    assert import_file(value) == 1
    assert ids(database) == ["a1"]
    assert caplog.messages == []


@pytest.mark.parametrize("value", [[], {"data": []}, [listing()], listing(thing("t1", id="b1"))])
def test_a_value_may_hold_no_posts_at_all(import_file, caplog, value):
    assert import_file(value) == 0
    assert caplog.messages == []


def test_an_array_on_one_line_may_hold_all_kinds(import_file, database, caplog):
    values = [
        {"id": "a1", **POST},
        thing("t3", id="a2"),
        listing(thing("t3", id="a3"), thing("t5", id="x1")),
        {"id": "x2", "body": "a comment"},
        {"id": "a4", **POST},
        None,
    ]
    with pytest.raises(BadLines, match=r"^skipped 1 line"):
        import_file({"name": "t3_a0"}, values)
    assert ids(database) == ["a0", "a1", "a2", "a3", "a4"]
    assert caplog.messages == ["line 2: not a post, or one without a usable id"]


def test_a_dash_is_standard_input(redpipe, database):
    assert redpipe(
        "--from=-", database, stdin='{"id": "a1", "name": "t3_a1"}\n{"id": "a2", "name": "t3_a2"}'
    ) == (0, "", "")
    assert ids(database) == ["a1", "a2"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(
            b"\xef\xbb\xbf" + b'{"id": "a1", "name": "t3_a1"}\n{"id": "a2", "name": "t3_a2"}\n',
            id="byte-order mark",
        ),
        pytest.param(
            b'{"id": "a1", "name": "t3_a1"}\r\n{"id": "a2", "name": "t3_a2"}\r\n', id="CRLF"
        ),
        pytest.param(
            b'\n  \n{"id": "a1", "name": "t3_a1"}\n\r\n\t\n{"id": "a2", "name": "t3_a2"}\n\n',
            id="blank lines",
        ),
        pytest.param(
            b'  {"id": "a1", "name": "t3_a1"}  \n\t{"id": "a2", "name": "t3_a2"}',
            id="space around, no last newline",
        ),
    ],
)
def test_what_surrounds_the_values_does_no_harm(redpipe, file, database, content):
    file.write_bytes(content)
    assert redpipe("--from", file, database) == (0, "", "")
    assert ids(database) == ["a1", "a2"]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf"])
def test_a_file_without_posts_makes_an_empty_database(redpipe, file, database, content):
    file.write_bytes(content)
    assert redpipe("--from", file, database) == (0, "", "")
    assert ids(database) == []


@pytest.mark.parametrize(
    ("names", "selected"),
    [
        ([], ["a1", "a2", "a3", "a4", "a5"]),
        (["all"], ["a1", "a2", "a3", "a4", "a5"]),
        (["python", "ALL"], ["a1", "a2", "a3", "a4", "a5"]),
        (["PYTHON"], ["a1", "a2"]),
        (["r/python", "u_Some-Name"], ["a1", "a2", "a3"]),
        (["python+reddit.com"], ["a1", "a2", "a4"]),
    ],
)
def test_names_select_without_regard_to_case(redpipe, file, database, names, selected):
    write_lines(
        file,
        {"id": "a1", "name": "t3_a1", "subreddit": "Python"},
        thing("t3", id="a2", subreddit="pYTHON"),
        listing(thing("t3", id="a3", subreddit="u_some-name")),
        {"id": "a4", "name": "t3_a4", "subreddit": "reddit.com"},
        {"id": "a5", "name": "t3_a5", "subreddit": None},
    )
    assert redpipe("--from", file, database, *names) == (0, "", "")
    assert ids(database) == selected


NOTHING_SELECTED = "redpipe: nothing selected of {} posts read; check the names\n"


@pytest.mark.parametrize("name", ["none", "nobody"])
def test_names_that_select_nothing_are_said_once(redpipe, file, database, name):
    write_lines(
        file,
        {"name": "t3_a1", "subreddit": "Python"},
        thing("t3", id="a2", subreddit="rust"),
        listing(thing("t3", id="a3", subreddit=None), thing("t3", id="a4")),
        thing("t3", id="a5", subreddit="pyth\u00f6n"),
    )
    assert redpipe("--from", file, database, name, "another") == (
        0,
        "",
        NOTHING_SELECTED.format(5),
    )
    assert ids(database) == []


def test_nothing_selected_is_said_of_an_empty_file_and_beside_bad_lines(redpipe, file, database):
    assert redpipe("--from=-", database, "python").err == (NOTHING_SELECTED.format(0))
    write_lines(file, b"nonsense", {"name": "t3_a1", "subreddit": "Rust"})
    done = redpipe("--from", file, database, "python")
    assert done.status == 65
    assert [line.partition(":")[2][:17] for line in done.err.splitlines()] == [
        " line 1: not JSON",
        " nothing selected",
        " skipped 1 line(s",
    ]


def test_quiet_says_nothing_of_nothing_selected(redpipe, database):
    assert redpipe("-q", "--from=-", database, "python") == (0, "", "")


@pytest.mark.parametrize("names", [[], ["all"], ["python", "all"]])
def test_an_empty_file_without_names_is_not_worth_a_word(redpipe, database, names):
    assert redpipe("--from=-", database, *names) == (0, "", "")


def test_a_bad_line_is_bad_whatever_is_selected(redpipe, file, database):
    write_lines(file, {"id": "a1", "name": "t3_a1", "subreddit": "rust"}, b"nonsense")
    assert redpipe("--from", file, database, "python").status == 65
    assert ids(database) == []


# --- bad lines

LONG_INTEGER = b"9" * 5000
DEEP = b"[" * 200_000 + b"]" * 200_000

NOT_A_POST = "not a post, or one without a usable id"
TITLED = {"title": "Titled", "author": "somebody"}

BAD_LINES = {
    "cut off": (b'{"id": "x1", "title": "cut o', "not JSON (Invalid control character"),
    "not JSON": (b"id,title", "not JSON (Expecting value)"),
    "two values": (b'{"name": "t3_x1"} {"name": "t3_x2"}', "not JSON (Extra data)"),
    "a comment": (thing("t1", id="x1", name="t1_x1"), NOT_A_POST),
    "an account": (thing("t2", id="x1", name="x1"), NOT_A_POST),
    "a subreddit": (thing("t5", id="x1", name="t5_x1"), NOT_A_POST),
    "a more": (thing("more", id="x1", name="t1_x1", children=[]), NOT_A_POST),
    "no listing": (thing("Listing", children=None), NOT_A_POST),
    "a bare comment": ({"id": "x1", "name": "t1_x1", **TITLED}, NOT_A_POST),
    "a comment of a dump": ({"id": "x1", "link_id": "t3_a1", **TITLED}, NOT_A_POST),
    "a comment without a link": ({"id": "x1", "body": "", **TITLED}, NOT_A_POST),
    "an answer to a comment": ({"id": "x1", "parent_id": "t1_x0", **TITLED}, NOT_A_POST),
    "a comment with a post's name": ({"name": "t3_x1", "body": "text"}, NOT_A_POST),
    "a bare subreddit": ({"id": "x1", "name": "t5_x1", **TITLED}, NOT_A_POST),
    "a bare account": ({"id": "x1", "name": "somebody", "created_utc": 1}, NOT_A_POST),
    "an event": ({"id": "x1", "name": "LiveUpdateEvent_x1", **TITLED}, NOT_A_POST),
    "a line of an archive of talks": ({"id": "x1", "user": "a", "text": "Hello"}, NOT_A_POST),
    "an id and no more": ({"id": "x1"}, NOT_A_POST),
    "a title without an author": ({"id": "x1", "title": "Titled"}, NOT_A_POST),
    "an author without a title": ({"id": "x1", "author": "somebody"}, NOT_A_POST),
    "capitals": ({"id": "X1", **TITLED}, NOT_A_POST),
    "a fullname for an id": ({"id": "t3_x1", **TITLED}, NOT_A_POST),
    "no base 36": (thing("t3", id="x-1", name="t3_x-1"), NOT_A_POST),
    "an empty id": ({"id": "", "name": "t3_"}, NOT_A_POST),
    "a line break in the id": ({"id": "x1\n", **TITLED}, NOT_A_POST),
    "a number for an id": ({"id": 11, **TITLED}, NOT_A_POST),
    "no id": (TITLED, NOT_A_POST),
    "a thing without data": ({"kind": "t3", "data": None}, NOT_A_POST),
    "no id in a listing": (listing(thing("t3", title="Nameless")), NOT_A_POST),
    "no id in an array": ([TITLED], NOT_A_POST),
    "an error of Reddit": ({"message": "Forbidden", "error": 403}, NOT_A_POST),
    "an archive's error": ({"data": None, "error": "Timeout"}, NOT_A_POST),
    "an archive's comments": ({"data": [{"id": "x1", "body": "text"}]}, NOT_A_POST),
    "a number": (b"17", NOT_A_POST),
    "a string": (b'"x1"', NOT_A_POST),
    "an array of ids": (["x1", "x2"], NOT_A_POST),
    "an array of arrays": ([[{"name": "t3_x1"}]], NOT_A_POST),
    "null": (b"null", NOT_A_POST),
    "true": (b"true", NOT_A_POST),
    "NaN": (b"NaN", NOT_A_POST),
    "not UTF-8": (b'{"id": "x1", "title": "caf\xe9"}', "not JSON ('utf-8' codec"),
    "UTF-16": ('{"id": "x1"}'.encode("utf-16"), "not JSON ('utf-8' codec"),
    "nested too deeply": (b'{"id": "x1", "x": ' + DEEP + b"}", "not JSON (nested too deeply)"),
    "an integer without end": (
        b'{"name": "t3_x1", "x": ' + LONG_INTEGER + b"}",
        "not JSON (Exceeds the limit",
    ),
    "too long": (b'{"id": "x1", "x": "' + b"x" * (16 * MEBIBYTE) + b'"}', "longer than 16 MiB"),
    "too long with a byte-order mark": (
        b'\xef\xbb\xbf"' + b"x" * (16 * MEBIBYTE - 1) + b'"',
        "longer than 16 MiB",
    ),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_said_and_stops_no_other(import_file, database, caplog, line, reason):
    with pytest.raises(
        BadLines, match=r"^skipped 1 line\(s\) that are not posts; stored the rest$"
    ):
        import_file({"id": "a1", "name": "t3_a1"}, line, {"id": "a2", "name": "t3_a2"})
    assert ids(database) == ["a1", "a2"]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"line 2: {reason}")


def test_bad_lines_end_in_65_with_the_good_ones_stored(redpipe, file, database):
    lines = [line for line, _ in BAD_LINES.values()]
    write_lines(file, {"id": "a1", "name": "t3_a1"}, *lines, {"id": "a2", "name": "t3_a2"})
    done = redpipe("--from", file, database)
    assert ids(database) == ["a1", "a2"]
    assert done.status == 65
    assert done.out == ""
    told = done.err.splitlines()
    assert [line[: line.index(":", 9)] for line in told[:-1]] == [
        f"redpipe: line {number}" for number in range(2, 12)
    ]
    assert told[-1] == f"redpipe: skipped {len(lines)} line(s) that are not posts; stored the rest"


def test_quiet_says_only_how_many_lines_were_bad(redpipe, file, database):
    write_lines(file, b"nonsense", {"id": "a1", "name": "t3_a1"}, b"nonsense")
    assert redpipe("-q", "--from", file, database) == (
        65,
        "",
        "redpipe: skipped 2 line(s) that are not posts; stored the rest\n",
    )


def test_the_good_posts_of_a_listing_with_a_bad_one_are_stored(redpipe, file, database):
    write_lines(file, listing(thing("t3", id="a1"), thing("t3", id="-"), thing("t3", id="a2")))
    done = redpipe("--from", file, database)
    assert done.status == 65
    assert "line 1: not a post, or one without a usable id" in done.err
    assert ids(database) == ["a1", "a2"]


@pytest.mark.parametrize(
    ("value", "command"),
    [
        (listing(thing("t3", id="a1")), "jq -c ."),
        ({"data": [{"name": "t3_a1"}]}, "jq -c ."),
        ([{"name": "t3_a1"}, thing("t3", id="a2")], "jq -c '.[]'"),
        ([listing(thing("t3", id="a1")), listing(thing("t1", id="b1"))], "jq -c '.[]'"),
    ],
)
@pytest.mark.parametrize("names", [[], ["python"]])
def test_a_pretty_printed_file_leads_to_jq(redpipe, file, database, value, command, names):
    file.write_text(json.dumps(value, indent=4))
    done = redpipe("--from", file, database, *names)
    assert done.status == 65
    first, *others = done.err.splitlines()
    assert first.endswith(f"; if it is one value on many lines: {command} FILE | ... --from=-")
    assert "jq" not in "".join(others)


@pytest.mark.skipif(not shutil.which("jq"), reason="no jq here")
@pytest.mark.parametrize("value", [listing(thing("t3", id="a1")), [{"name": "t3_a1"}]])
def test_what_the_advice_on_jq_says_works(redpipe, file, database, value):
    file.write_text(json.dumps(value, indent=4))
    advice = redpipe("--from", file, database).err.splitlines()[0].partition("many lines: ")[2]
    command = advice.replace("FILE", '"$0"').replace("...", '"$@"') + ' "$DATABASE"'
    done = subprocess.run(
        ["/bin/sh", "-c", command, str(file), *redpipe.command],
        env={**os.environ, "DATABASE": str(database)},
    )
    assert done.returncode == 0
    assert ids(database) == ["a1"]


def test_a_value_that_does_not_fit_is_no_reason_for_jq_but_in_the_first_line(import_file, caplog):
    with pytest.raises(BadLines):
        import_file({"name": "t3_a1"}, b"{", b"[", b"nonsense")
    assert "jq" not in caplog.text


def test_lines_are_counted_after_an_overlong_one_with_a_byte_order_mark(import_file, caplog):
    overlong = b"\xef\xbb\xbf" + b'{"id": "x1", "x": "' + b"x" * (16 * MEBIBYTE) + b'"}'
    with pytest.raises(BadLines, match=r"^skipped 2 line"):
        import_file(overlong, {"id": "a1", "name": "t3_a1"}, b"nonsense")
    assert [message[:7] for message in caplog.messages] == ["line 1:", "line 3:"]


def test_a_line_of_16_mebibytes_is_not_too_long(import_file, database):
    start, end = b'{"id": "a1", "name": "t3_a1", "x": "', b'"}'
    size = 16 * MEBIBYTE - len(start) - len(end) - 1
    import_file(start + b"x" * size + end)
    assert ids(database) == ["a1"]


def test_control_characters_of_a_bad_line_are_not_repeated(redpipe, file, database):
    write_lines(file, {"kind": "\x1b[31m"}, {"id": "\x1b[31m"}, b'{"\x1b[31m": }', b"\x1b[31m")
    done = redpipe("--from", file, database)
    assert done.status == 65
    assert len(done.err.splitlines()) == 5
    assert done.err.replace("\n", "").isprintable()


# --- files that cannot be read


@pytest.mark.parametrize("path", ["nowhere.ndjson", ".", "nowhere/posts.ndjson"])
def test_a_file_that_is_not_there_ends_in_66(redpipe, fake_reddit, database, path):
    done = redpipe(f"--from={path}", database, timeout=20)
    assert done.status == 66
    assert done.err.startswith(f"redpipe: {path}: ")
    assert len(done.err.splitlines()) == 1
    assert not database.exists()
    assert fake_reddit.log == []


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc/self/mem here")
def test_a_file_that_breaks_while_it_is_read_ends_in_66(redpipe, database):
    done = redpipe("--from=/proc/self/mem", database)
    assert done.status == 66
    assert done.err == "redpipe: FILE cannot be read: Input/output error\n"


def test_a_standard_input_that_cannot_be_read_ends_in_66(redpipe, file, database):
    with file.open("wb") as write_only:
        command = [*redpipe.command, "--from=-", str(database)]
        done = subprocess.run(command, stdin=write_only, capture_output=True, text=True, timeout=20)
    assert done.returncode == 66
    assert len(done.stderr.splitlines()) == 1


def zstd(data):
    """Give the start of a .zst file; the standard library writes none."""
    return b"\x28\xb5\x2f\xfd\x24" + bytes([len(data)]) + b"\x00" + data


@pytest.mark.parametrize(
    ("compress", "command"),
    [(zstd, "zstdcat"), (gzip.compress, "zcat"), (lzma.compress, "xzcat"), (bz2.compress, "bzcat")],
)
@pytest.mark.parametrize("by_pipe", [False, True])
def test_a_compressed_file_leads_to_the_command_that_reads_it(
    redpipe, file, database, compress, command, by_pipe
):
    file.write_bytes(compress(b'{"id": "a1", "name": "t3_a1"}\n'))
    arguments = ["--from=-" if by_pipe else f"--from={file}", str(database)]
    with file.open("rb") as source:
        done = subprocess.run(
            [*redpipe.command, *arguments],
            stdin=source,
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert done.returncode == 66
    assert command in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- the same posts again


def test_a_second_import_changes_nothing(import_file, database):
    lines = [make_post(n) for n in range(1234)]
    assert import_file(*lines) == 1234
    first = rows(database, "*")
    assert {row[-3] for row in first} == {1_790_000_000}
    assert import_file(*lines, clock=VirtualClock(1_800_000_000)) == 0
    assert rows(database, "*") == first


def test_a_post_that_comes_twice_in_a_file_is_stored_once(import_file, database):
    assert (
        import_file(
            {"id": "a1", "name": "t3_a1", "title": "First"},
            {"id": "a1", "name": "t3_a1", "title": "Second"},
        )
        == 1
    )
    assert rows(database, "id, title") == [("a1", "First")]


def test_a_post_that_comes_again_fills_what_was_null_and_overwrites_nothing(import_file, database):
    import_file(
        {"id": "a1", "name": "t3_a1", "title": "Known", "author_fullname": "t2_1"},
        {"id": "a2", "name": "t3_a2"},
    )
    again = {
        "id": "a1",
        "created_utc": 1700000001,
        "subreddit": "python",
        "title": "Another",
        "author": "[deleted]",
        "permalink": "/r/python/comments/a1/known/",
    }
    assert import_file(again, {"id": "a2", "name": "t3_a2"}, clock=VirtualClock(1_800_000_000)) == 1
    known = ("a1", 1700000001, "python", "Known", "t2_1", None, "/r/python/comments/a1/known/")
    assert rows(database, COLUMNS) == [known, ("a2", *[None] * 6)]
    assert rows(database, "id, stored_utc") == [("a1", 1_790_000_000), ("a2", 1_790_000_000)]
    assert import_file({"id": "a1", "name": "t3_a1", "author": "found_again"}) == 1
    assert import_file({"id": "a1", "name": "t3_a1", "author": "renamed", "title": None}) == 0
    assert rows(database, COLUMNS)[0] == (*known[:5], "found_again", known[6])


def test_a_deleted_author_is_not_lost(import_file, database):
    import_file({"id": "a1", "name": "t3_a1", "author": "somebody", "author_fullname": "t2_1"})
    assert import_file({"id": "a1", "name": "t3_a1", "author": "[deleted]"}) == 0
    assert rows(database, "author, author_name") == [("t2_1", "somebody")]


def test_posts_of_a_file_join_those_of_the_stream(redpipe, fake_reddit, file, database):
    for n in range(3):
        fake_reddit.add(make_post(n, created_utc=1_790_000_000 + n))
    assert redpipe("--once", database, "python").status == 0
    cursors = rows(database, "*", "cursors")
    file.write_bytes(numbered(range(1, 5)))
    assert redpipe("--from", file, database, "python").status == 0
    assert ids(database) == [make_post(n)["id"] for n in range(5)]
    assert rows(database, "*", "cursors") == cursors


# --- the process


def test_a_stopped_import_keeps_what_it_committed_and_a_second_one_finishes(
    redpipe, file, database
):
    process = redpipe.start("--from=-", database)
    process.stdin.buffer.write(numbered(range(1100)))
    process.stdin.flush()
    wait_for(lambda: count_posts(database) >= 1000)
    done = redpipe.stop(process, signal.SIGTERM)
    assert (done.status, done.err) == (-signal.SIGTERM, "")
    assert ids(database) == [make_post(n)["id"] for n in range(1000)]
    assert sorted(path.name for path in database.parent.glob("posts.db*")) == ["posts.db"]
    file.write_bytes(numbered(range(1100)))
    assert redpipe("--from", file, database).status == 0
    assert ids(database) == [make_post(n)["id"] for n in range(1100)]


def test_a_killed_import_keeps_what_it_committed_and_a_second_one_finishes(redpipe, file, database):
    process = redpipe.start("--from=-", database)
    process.stdin.buffer.write(numbered(range(700)))
    process.stdin.flush()
    wait_for(lambda: count_posts(database) >= 500)
    redpipe.stop(process, signal.SIGKILL)
    assert ids(database) == [make_post(n)["id"] for n in range(500)]
    file.write_bytes(numbered(range(700)))
    assert redpipe("--from", file, database).status == 0
    assert count_posts(database) == 700


def peak_memory(redpipe, database, posts):
    """Give the peak of resident memory, in bytes, of an import of many posts."""
    measured = [sys.executable, "-I", "-S", "-c", PEAK, *redpipe.command, "--from=-", str(database)]
    line = json.dumps(make_post(0, selftext="long " * 500)).encode() + b"\n"
    identifier = make_post(0)["id"].encode()
    with subprocess.Popen(measured, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for n in range(posts):
            process.stdin.write(line.replace(identifier, b"%07d" % n))
        out, _ = process.communicate(timeout=60)
    kibibytes, status = out.split()
    assert status == b"0"
    assert count_posts(database) == posts
    return int(kibibytes) * 1024


def test_memory_does_not_grow_with_the_file(redpipe, tmp_path):
    few = peak_memory(redpipe, tmp_path / "few.db", 1000)
    many = peak_memory(redpipe, tmp_path / "many.db", 10_000)
    assert many - few < 5_000_000


def test_memory_does_not_grow_with_lines_that_select_nothing(redpipe, file, database):
    """Hold one listing of 12 MB, four and twelve times."""
    one = json.dumps(listing(*[thing("t3", id=f"a{n}", x="x" * 12_000) for n in range(1000)]))
    peaks = []
    for times in (4, 12):
        file.write_text(f"{one}\n" * times)
        command = [*redpipe.command, f"--from={file}", str(database), "python"]
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", PEAK, *command],
            stdout=subprocess.PIPE,
            timeout=60,
        )
        peaks.append(int(done.stdout.split()[0]) * 1024)
    assert peaks[1] - peaks[0] < 15_000_000


def imported(redpipe, *arguments):
    """Run with -X importtime, and give the names of the modules that were imported."""
    python, pyz = redpipe.command
    done = subprocess.run(
        [python, "-X", "importtime", pyz, *map(str, arguments)],
        env=redpipe.environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0
    return set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))


def test_requests_is_imported_for_reddit_only(redpipe, fake_reddit, file, database):
    write_lines(file, {"id": "a1", "name": "t3_a1"})
    network = {"requests", "urllib3", "ssl", "certifi"}
    assert not network & imported(redpipe, "--from", file, database)
    fake_reddit.create("python")
    assert network <= imported(redpipe, "--once", database, "python")


def test_a_file_needs_no_sensible_environment(redpipe, file, database):
    write_lines(file, {"id": "a1", "name": "t3_a1"})
    done = redpipe("--from", file, database, REDPIPE_URL="nonsense", REDDIT_CLIENT_SECRET="alone")
    assert done == (0, "", "")


@pytest.mark.parametrize(
    ("size", "taken", "seconds", "said"),
    [
        (0, 0, 0.0, "0 MB read, 0 MB/s"),
        (0, 123_456_789, 10.0, "123 MB read, 12 MB/s"),
        (0, 140_000_000_000, 600.0, "140,000 MB read, 233 MB/s"),
        (1_000_000_000, 0, 0.0, "0 MB read, 0 MB/s"),
        (1_000_000_000, 250_000_000, 1.0, "25 % of 1,000 MB read, 250 MB/s, 3 s left"),
        (140_000_000_000, 14_000_000_000, 20.0, "10 % of 140,000 MB read, 700 MB/s, 3 min left"),
        (140_000_000_000, 139_999_999_999, 200.0, "99 % of 140,000 MB read, 700 MB/s, 0 s left"),
        (1_000_000, 1_000_000, 0.0, "100 % of 1 MB read, 10 MB/s, 0 s left"),
        (1_000_000, 2_000_000, 1.0, "2 MB read, 2 MB/s"),
    ],
)
def test_progress_tells_what_was_read_and_of_a_file_share_and_time_left(
    program, size, taken, seconds, said
):
    file = SimpleNamespace(raw=SimpleNamespace(size=size, taken=taken))
    assert program.share_done(file, time.monotonic() - seconds) == said


def test_the_size_of_a_file_and_what_was_taken_of_it_are_known_even_when_it_is_closed(file):
    file.write_bytes(numbered(range(1000)))
    with open_file(str(file)) as opened:
        assert (opened.raw.size, opened.raw.taken) == (file.stat().st_size, 0)
        posts = [post for batch in read_file(opened) for post in batch.posts]
    assert (len(posts), opened.raw.taken) == (1000, file.stat().st_size)


def test_what_was_taken_of_a_pipe_is_known(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    content = numbered(range(100))
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    with open_file(str(tmp_path / "pipe")) as opened:
        assert sum(len(list(batch.posts)) for batch in read_file(opened)) == 100
        assert (opened.raw.size, opened.raw.taken) == (0, len(content))
    writer.join()


def test_standard_input_may_be_non_blocking(redpipe, database):
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    command = [*redpipe.command, "--from=-", str(database)]
    process = subprocess.Popen(command, stdin=reading, stderr=subprocess.PIPE)
    os.close(reading)
    os.write(writing, numbered([1])[:100])
    wait_for(database.exists)
    os.write(writing, numbered([1])[100:] + numbered(range(2, 9)))
    os.close(writing)
    assert process.communicate(timeout=20) == (None, b"")
    assert process.returncode == 0
    assert count_posts(database) == 8


@pytest.mark.parametrize("arguments", [["posts.db"], ["posts.db", "rust"], ["posts.ndjson"]])
def test_nothing_is_left_open(redpipe, file, arguments):
    write_lines(file, make_post(1), b"nonsense")
    python, pyz = redpipe.command
    done = subprocess.run(
        [python, "-X", "dev", "-W", "error", pyz, f"--from={file}", *arguments],
        cwd=file.parent,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == (73 if arguments == ["posts.ndjson"] else 65)
    assert all(line.startswith("redpipe: ") for line in done.stderr.splitlines())


def test_a_terminal_shows_share_done_and_time_left(redpipe, file, database):
    file.write_bytes(numbered(range(2000)))
    ours, theirs = open_terminal()
    process = subprocess.Popen([*redpipe.command, f"--from={file}", str(database)], stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # how a terminal ends on Linux
        pass
    finally:
        os.close(ours)
    assert process.wait(10) == 0
    lines = re.findall(
        r"redpipe: ([\d,]+) posts stored, (\d+) % of 3 MB read, \d+ MB/s, \d+ s left",
        shown.decode(),
    )
    counts = [int(stored.replace(",", "")) for stored, _ in lines]
    assert counts == sorted(counts)
    shares = [int(share) for _, share in lines]
    assert shares == sorted(shares)
    assert shown.endswith(b"\n")


# --- what files have of their own


@pytest.mark.parametrize(
    ("escaped", "title"),
    [
        ("a &lt;b&gt; &amp; c", "a <b> & c"),
        ("&amp;lt;", "&lt;"),
        ("&amp;amp;amp;", "&amp;amp;"),
        ("&quot; &#39; &nbsp; &LT; &lt", "&quot; &#39; &nbsp; &LT; &lt"),
        ("R&D <3", "R&D <3"),
    ],
)
def test_the_three_entities_of_titles_are_decoded_once(import_file, database, escaped, title):
    import_file(
        {"id": "a1", "name": "t3_a1", "title": escaped},
        thing("t3", id="a2", title=escaped),
        listing(thing("t3", id="a3", title=escaped)),
    )
    assert rows(database, "id, title") == [("a1", title), ("a2", title), ("a3", title)]


def test_only_titles_are_decoded(import_file, database):
    import_file(
        {
            "id": "a1",
            "name": "t3_a1",
            "author": "a&amp;b",
            "subreddit": "a&lt;b",
            "permalink": "/&gt;",
        }
    )
    assert rows(database, "author_name, subreddit, permalink") == [("a&amp;b", "a&lt;b", "/&gt;")]


@pytest.mark.parametrize(
    ("created_utc", "stored"),
    [
        ("1700000000", 1700000000),
        ("1700000000.0", 1700000000),
        (1700000000, 1700000000),
        (1700000000.0, 1700000000),
        (1700000000.75, 1700000000),
        ("yesterday", None),
        ("", None),
        (True, None),
        ([], None),
        (10**30, None),
    ],
)
def test_times_come_as_strings_floats_and_integers(import_file, database, created_utc, stored):
    import_file({"id": "a1", "name": "t3_a1", "created_utc": created_utc, "created": 1600000000})
    assert rows(database, "id, created_utc, typeof(created_utc)") == [
        ("a1", stored, "null" if stored is None else "integer")
    ]


# --- recorded posts

ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


def expected_row(post):
    """Make the row of a recorded post without any of the product's functions."""
    author = post.get("author")
    return (
        post["name"].split("_")[1],
        int(float(post["created_utc"])),
        post.get("subreddit"),
        re.sub("&(?:lt|gt|amp);", lambda found: ENTITIES[found[0]], post["title"]),
        post.get("author_fullname"),
        None if author == "[deleted]" else author,
        post["permalink"].split("?")[0],
    )


def feed(redpipe, source, *arguments):
    """Pipe an open file through the built file."""
    process = redpipe.start("--from=-", *arguments)
    shutil.copyfileobj(source, process.stdin.buffer)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.long)])
def test_recorded_posts_are_stored_column_for_column(redpipe, samples, database, step):
    with lzma.open(samples / "posts.ndjson.xz") as source:
        lines = source.readlines()
    assert len(lines) == 38_503
    lines = lines[random.randrange(step) :: step]
    assert feed(redpipe, BytesIO(b"".join(lines)), database) == (0, "", "")
    assert rows(database, COLUMNS) == sorted(expected_row(json.loads(line)) for line in lines)
    first = rows(database, "*")
    assert feed(redpipe, BytesIO(b"".join(lines)), database) == (0, "", "")
    assert rows(database, "*") == first


def test_recorded_listings_are_imported_whole(redpipe, samples, file, database):
    listings = [json.loads(path.read_bytes()) for path in sorted(samples.glob("listings/*.json"))]
    write_lines(file, *listings)
    assert redpipe("--from", file, database) == (0, "", "")
    children = [child for value in listings for child in value["data"]["children"]]
    assert ids(database) == sorted({c["data"]["id"] for c in children if c["kind"] == "t3"})
    assert count_posts(database) == 3921
