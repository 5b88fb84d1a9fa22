"""--from: posts out of files and pipes, good lines and bad ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from artefact import run_bare, wait_for
from conftest import count_posts, finish, open_terminal, query, says
from fake_reddit import make_post
from pipeline import BadLines, Database, load, open_file, read_file, transform

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


def numbered(numbers):
    """Invent posts by their numbers, as bytes of a file."""
    return b"".join(json.dumps(make_post(n)).encode() + b"\n" for n in numbers)


def thing(kind, **data):
    return {"kind": kind, "data": data}


def listing(*children):
    return thing("Listing", after=None, children=list(children))


def post(identifier, **fields):
    """Write a bare object that says that it is a post."""
    return {"id": identifier, "name": f"t3_{identifier}", **fields}


def rows(database, columns):
    return query(database, f"SELECT {columns} FROM posts ORDER BY id")


def ids(database):
    return [row[0] for row in rows(database, "id")]


@pytest.fixture
def import_file(file, database):
    """Import lines within this process, and give the posts stored or filled."""

    def import_file(*lines, names=()):
        write_lines(file, *lines)
        with Database(str(database)) as opened, open_file(str(file)) as source:
            return sum(
                load(opened, [transform(post) for post in batch.posts], batch.cursors, batch.gaps)
                for batch in read_file(source, names)
            )

    return import_file


# --- what a line may be

POST = {"id": "a1", "created_utc": 1700000001, "title": "Titled", "author": "somebody"}


def test_posts_things_and_listings_are_mixed_at_will(redpipe, fake_reddit, file, database):
    write_lines(
        file,
        {**POST, "subreddit": "Python", "author_fullname": "t2_1", "permalink": "/r/a1/one/?ref=x"},
        thing("t3", name="t3_a2", created_utc=1700000002.0, author="[deleted]"),
        listing(thing("t3", id="a3", title="Three"), thing("t3", id="a4"), thing("t5", id="x")),
        {"name": "t3_a5"},
        listing(),
    )
    assert redpipe("--from", file, database) == (0, "", "")
    assert rows(database, COLUMNS) == [
        ("a1", 1700000001, "Python", "Titled", "t2_1", "somebody", "/r/a1/one/"),
        ("a2", 1700000002, None, None, None, None, None),
        ("a3", None, None, "Three", None, None, None),
        ("a4", None, None, None, None, None, None),
        ("a5", None, None, None, None, None, None),
    ]
    assert query(database, "SELECT * FROM cursors") == []
    assert fake_reddit.log == []


POSTS = {
    "its name": {"name": "t3_a1"},
    "its name beside its id": post("a1", selftext="text"),
    "title and author": POST,
    "a deleted author": {**POST, "author": "[deleted]"},
    "an author who is null": {**POST, "author": None},
    "a name that is null": {**POST, "name": None},
    "an empty name": {**POST, "name": ""},
    "columns of comments, too": {**POST, "body": None, "parent_id": None, "link_id": None},
    "an ad": post("a1", promoted=True, title="Buy"),
    "a field that is called data": {"name": "t3_a1", "data": [1]},
    "fields of the wrong type": {"id": "a1", "title": 17, "author": ["x"]},
    "a thing": thing("t3", id="a1"),
    "a thing that has its kind inside": {"kind": "t3", "name": "t3_a1"},
    "a listing": listing(thing("t3", id="a1"), thing("t1", id="b1"), thing("more")),
    "an array of posts": [POST],
    "an array of things": [thing("t3", id="a1")],
    "a permalink": [listing(thing("t3", id="a1")), listing(thing("t1", id="b1", body="text"))],
    "an archive's answer": {"data": [POST]},
    "an archive's answer with more": {"data": [POST], "error": None, "metadata": {}},
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
        POST,
        thing("t3", id="a2"),
        listing(thing("t3", id="a3"), thing("t3", id="-"), thing("t5", id="x1")),
        {"id": "x2", "body": "a comment"},
        {**POST, "id": "a4"},
        None,
    ]
    with pytest.raises(BadLines, match=r"^skipped 1 line"):
        import_file({"name": "t3_a0"}, values)
    assert ids(database) == ["a0", "a1", "a2", "a3", "a4"]
    assert caplog.messages == [f"line 2: {NOT_A_POST}"]


ONE, TWO = b'{"id": "a1", "name": "t3_a1"}', b'{"id": "a2", "name": "t3_a2"}'
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("content", "stored"),
    [
        pytest.param(BOM + ONE + b"\n" + TWO + b"\n", ["a1", "a2"], id="byte-order mark"),
        pytest.param(ONE + b"\r\n" + TWO + b"\r\n", ["a1", "a2"], id="CRLF"),
        pytest.param(
            b"\n  \n" + ONE + b"\n\r\n\t\n" + TWO + b"\n\n", ["a1", "a2"], id="blank lines"
        ),
        pytest.param(b"  " + ONE + b"  \n\t" + TWO, ["a1", "a2"], id="spaces, no last newline"),
        pytest.param(b"", [], id="nothing"),
        pytest.param(b"\n", [], id="one blank line"),
        pytest.param(BOM, [], id="nothing but a byte-order mark"),
    ],
)
def test_what_surrounds_the_values_does_no_harm(redpipe, file, database, content, stored):
    file.write_bytes(content)
    assert redpipe("--from", file, database) == (0, "", "")
    assert ids(database) == stored


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
        post("a1", subreddit="Python"),
        thing("t3", id="a2", subreddit="pYTHON"),
        listing(thing("t3", id="a3", subreddit="u_some-name")),
        post("a4", subreddit="reddit.com"),
        post("a5", subreddit=None),
    )
    assert redpipe("--from", file, database, *names) == (0, "", "")
    assert ids(database) == selected


NOTHING_SELECTED = "redpipe: nothing selected of {} posts read; check the names\n"


def test_names_that_select_nothing_are_said_once(redpipe, file, database):
    write_lines(
        file,
        post("a1", subreddit="Python"),
        thing("t3", id="a2", subreddit="rust"),
        listing(thing("t3", id="a3", subreddit=None), thing("t3", id="a4")),
        thing("t3", id="a5", subreddit="pyth\u00f6n"),
    )
    nothing = (0, "", NOTHING_SELECTED.format(5))
    assert redpipe("--from", file, database, "none", "nobody") == nothing
    assert ids(database) == []
    assert redpipe("-q", "--from", file, database, "nobody") == (0, "", "")


def test_of_an_empty_file_nothing_selected_is_said_if_names_select(redpipe, database):
    assert redpipe("--from=-", database, "python") == (0, "", NOTHING_SELECTED.format(0))
    for names in ["all"], ["python", "all"]:
        assert redpipe("--from=-", database, *names) == (0, "", "")


def test_a_bad_line_is_bad_whatever_is_selected(redpipe, file, database):
    write_lines(file, b"nonsense", post("a1", subreddit="Rust"))
    done = redpipe("--from", file, database, "python")
    assert done.status == 65
    assert [line.partition(":")[2][:17] for line in done.err.splitlines()] == [
        " line 1: not JSON",
        " nothing selected",
        " skipped 1 line(s",
    ]
    assert ids(database) == []


# --- bad lines

DEEP = b"[" * 200_000 + b"]" * 200_000

NOT_A_POST = "not a post, or one without a usable id"
TITLED = {"title": "Titled", "author": "somebody"}

BAD_LINES = {
    "cut off": (b'{"id": "x1", "title": "cut o', "not JSON (Invalid control character"),
    "not JSON": (b"id,title", "not JSON (Expecting value)"),
    "two values": (b'{"name": "t3_x1"} {"name": "t3_x2"}', "not JSON (Extra data)"),
    "a comment": (thing("t1", id="x1", name="t1_x1"), NOT_A_POST),
    "a more": (thing("more", id="x1", name="t1_x1", children=[]), NOT_A_POST),
    "no listing": (thing("Listing", children=None), NOT_A_POST),
    "a bare comment": ({"id": "x1", "name": "t1_x1", **TITLED}, NOT_A_POST),
    "a comment of a dump": ({"id": "x1", "link_id": "t3_a1", **TITLED}, NOT_A_POST),
    "a comment without a link": ({"id": "x1", "body": "", **TITLED}, NOT_A_POST),
    "an answer to a comment": ({"id": "x1", "parent_id": "t1_x0", **TITLED}, NOT_A_POST),
    "a comment with a post's name": ({"name": "t3_x1", "body": "text"}, NOT_A_POST),
    "a bare subreddit": ({"id": "x1", "name": "t5_x1", **TITLED}, NOT_A_POST),
    "an event": ({"id": "x1", "name": "LiveUpdateEvent_x1", **TITLED}, NOT_A_POST),
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
    "an archive's comments": ({"data": [{"id": "x1", "body": "text"}]}, NOT_A_POST),
    "a number": (b"17", NOT_A_POST),
    "an array of ids": (["x1", "x2"], NOT_A_POST),
    "an array of arrays": ([[{"name": "t3_x1"}]], NOT_A_POST),
    "null": (b"null", NOT_A_POST),
    "NaN": (b"NaN", NOT_A_POST),
    "not UTF-8": (b'{"id": "x1", "title": "caf\xe9"}', "not JSON ('utf-8' codec"),
    "UTF-16": ('{"id": "x1"}'.encode("utf-16"), "not JSON ('utf-8' codec"),
    "nested too deeply": (b'{"id": "x1", "x": ' + DEEP + b"}", "not JSON (nested too deeply)"),
    "an integer without end": (b'{"x": ' + b"9" * 5000 + b"}", "not JSON (Exceeds the limit"),
    "too long": (
        BOM + b'{"x": "' + b"x" * (16 * MEBIBYTE) + b'"}',
        "not JSON (longer than 16 MiB)",
    ),
    "a little too long": (
        BOM + b'"' + b"x" * (16 * MEBIBYTE - 1) + b'"',
        "not JSON (longer than 16 MiB)",
    ),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_said_and_stops_no_other(import_file, database, caplog, line, reason):
    with pytest.raises(BadLines, match=r"^skipped 2 line"):
        import_file(post("a1"), line, post("a2"), b"nonsense")
    assert ids(database) == ["a1", "a2"]
    first, second = caplog.messages
    assert first.startswith(f"line 2: {reason}")
    assert second == "line 4: not JSON (Expecting value)"


def test_bad_lines_end_in_65_with_the_good_ones_stored(redpipe, file, database):
    lines = [line for line, _ in BAD_LINES.values()]
    write_lines(file, post("a1"), *lines, post("a2"))
    done = redpipe("--from", file, database)
    assert ids(database) == ["a1", "a2"]
    assert (done.status, done.out) == (65, "")
    *told, last = done.err.splitlines()
    assert [line[: line.index(":", 9)] for line in told] == [
        f"redpipe: line {number}" for number in range(2, 12)
    ]
    assert last == f"redpipe: skipped {len(lines)} line(s) that are not posts; stored the rest"
    assert redpipe("-q", "--from", file, database) == (65, "", f"{last}\n")


@pytest.mark.parametrize(
    ("value", "command"),
    [
        (listing(thing("t3", id="a1")), "jq -c ."),
        ({"data": [post("a1")]}, "jq -c ."),
        ([post("a1"), thing("t3", id="a2")], "jq -c '.[]'"),
        ([listing(thing("t3", id="a1")), listing(thing("t1", id="b1"))], "jq -c '.[]'"),
    ],
)
@pytest.mark.parametrize("names", [[], ["python"]])
def test_a_pretty_printed_file_leads_to_jq(import_file, caplog, value, command, names):
    with pytest.raises(BadLines):
        import_file(*json.dumps(value, indent=4).encode().splitlines(), names=names)
    first, *others = caplog.messages
    assert first.endswith(f"; if it is one value on many lines: {command} FILE | ... --from=-")
    assert "jq" not in "".join(others)


@pytest.mark.skipif(not shutil.which("jq"), reason="no jq here")
@pytest.mark.parametrize("value", [listing(thing("t3", id="a1")), [post("a1")]])
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


def test_a_line_of_16_mebibytes_is_not_too_long(import_file, database):
    start, end = b'{"name": "t3_a1", "x": "', b'"}'
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
    assert says(redpipe(f"--from={path}", database), 66, f"redpipe: {path}: ")
    assert not database.exists()
    assert fake_reddit.log == []


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc/self/mem here")
def test_a_file_that_breaks_while_it_is_read_ends_in_66(redpipe, database):
    done = redpipe("--from=/proc/self/mem", database)
    assert done == (66, "", "redpipe: FILE cannot be read: Input/output error\n")


def test_a_standard_input_that_cannot_be_read_ends_in_66(redpipe, file, database):
    with file.open("wb") as write_only:
        process = redpipe.start_through(*redpipe.command, "--from=-", database, stdin=write_only)
    assert says(finish(process), 66)


def zstd(data):
    """Give the start of a .zst file; the standard library writes none."""
    return b"\x28\xb5\x2f\xfd\x24" + bytes([len(data)]) + b"\x00" + data


@pytest.mark.parametrize(
    ("compress", "command"),
    [(zstd, "zstdcat"), (gzip.compress, "zcat"), (lzma.compress, "xzcat"), (bz2.compress, "bzcat")],
)
def test_a_compressed_file_leads_to_the_command_that_reads_it(
    redpipe, file, database, compress, command
):
    file.write_bytes(compress(ONE + b"\n"))
    assert says(redpipe(f"--from={file}", database), 66, command)
    piped = file.read_text("utf-8", "surrogateescape")
    assert says(redpipe("--from=-", database, stdin=piped), 66, command)


# --- the process


def peak_memory(redpipe, lines, *arguments):
    """Give the peak of resident memory, in bytes, of an import of lines."""
    command = [sys.executable, "-I", "-S", "-c", PEAK, *redpipe.command, "--from=-", *arguments]
    process = redpipe.start_through(*command, stdin=subprocess.PIPE, encoding=None)
    process.stdin.writelines(lines)
    kibibytes, status = finish(process, timeout=60).out.split()
    assert status == b"0"
    return int(kibibytes) * 1024


def test_memory_does_not_grow_with_the_file(redpipe, database):
    line = json.dumps(make_post(0, selftext="long " * 500)).encode() + b"\n"
    identifier = make_post(0)["id"].encode()
    lines = [line.replace(identifier, b"%07d" % n) for n in range(10_000)]
    few = peak_memory(redpipe, lines[:1000], "few.db")
    many = peak_memory(redpipe, lines, database)
    assert count_posts(database) == len(lines)
    assert many - few < 5_000_000


def test_memory_does_not_grow_with_lines_that_select_nothing(redpipe, database):
    """Hold a listing of 6 MB, three and nine times."""
    one = listing(*[thing("t3", id=f"a{n}", x="x" * 12_000) for n in range(500)])
    line = json.dumps(one).encode() + b"\n"
    few, many = (peak_memory(redpipe, [line] * n, database, "python") for n in (3, 9))
    assert many - few < 15_000_000


def test_requests_is_imported_for_reddit_only(redpipe, fake_reddit, file, database):
    write_lines(file, post("a1"))
    fake_reddit.create("python")
    python, pyz = redpipe.command
    network = {"requests", "urllib3", "ssl", "certifi"}
    for arguments, expected in (["--from", file], set()), (["--once"], network):
        command = [python, "-X", "importtime", pyz, *map(str, arguments), str(database), "python"]
        done = run_bare(*command, **redpipe.environment)
        assert done.returncode == 0
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert imported & network == expected


def test_a_file_needs_no_sensible_environment(redpipe, file, database):
    write_lines(file, post("a1"))
    done = redpipe("--from", file, database, REDPIPE_URL="nonsense", REDDIT_CLIENT_SECRET="alone")
    assert done == (0, "", "")


@pytest.mark.parametrize(
    ("size", "taken", "seconds", "said"),
    [
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


def test_standard_input_may_be_non_blocking(redpipe, database):
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    process = redpipe.start_through(*redpipe.command, "--from=-", database, stdin=reading)
    os.close(reading)
    os.write(writing, numbered([1])[:100])
    wait_for(database.exists)
    os.write(writing, numbered([1])[100:] + numbered(range(2, 9)))
    os.close(writing)
    assert finish(process) == (0, "", "")
    assert count_posts(database) == 8


def test_a_terminal_shows_share_done_and_time_left(redpipe, file, database):
    file.write_bytes(b"\n" * 30_000_000)  # takes seconds
    ours, theirs = open_terminal()
    redpipe.start_through(*redpipe.command, f"--from={file}", database, stderr=theirs)
    os.close(theirs)
    line = r"redpipe: 0 posts stored, [1-9]\d? % of 30 MB read, \d+ MB/s, \d+ s left"
    shown = ""
    while not re.search(line, shown):
        shown += os.read(ours, 4096).decode()  # fails when it has ended
    os.close(ours)


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
def test_the_three_entities_of_titles_alone_are_decoded_once(import_file, database, escaped, title):
    raw = dict.fromkeys(("title", "author", "subreddit", "permalink"), escaped)
    things = [thing("t3", id=identifier, **raw) for identifier in ("a2", "a3")]
    import_file(post("a1", **raw), things[0], listing(things[1]))
    row = (title, escaped, escaped, escaped)
    assert rows(database, "title, author_name, subreddit, permalink") == [row] * 3
