"""What redpipe.pyz must hold, and where it must run.

Every CPython that is found takes part: pyenv's, those on PATH, and those named in
REDPIPE_PYTHONS (paths, separated by colons).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import marshal
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from artefact import (
    NEEDED_TO_BUILD,
    ROOT,
    ListingServer,
    build,
    copy_checkout,
    find_pythons,
    readme_blocks,
    run_bare,
    serve_listing,
    wait_for,
)
from conftest import add_posts, one_line, query
from fake_reddit import make_post

STRICT = ("-X", "dev", "-W", "error")
PACKAGES = ["certifi", "charset_normalizer", "docopt_ng", "idna", "requests", "urllib3"]
NEW_ENOUGH = [python for python in find_pythons() if python.version >= (3, 10, 0)]
TOO_OLD = [python for python in find_pythons() if python.version < (3, 10, 0)]
SORTING = [python for python in NEW_ENOUGH if python.version >= (3, 12, 0)]

every_python = pytest.mark.parametrize("python", NEW_ENOUGH, ids=str)

# Modules that need something outside of the bundle, by design.
OPTIONAL = {
    "urllib3.contrib.pyopenssl",  # needs OpenSSL
    "urllib3.contrib.socks",  # needs socks
    "urllib3.http2.connection",  # needs h2
}

IMPORT_ALL = """
import importlib, importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
failed = {}
for name in sys.argv[2:]:
    try:
        if name.endswith("__main__"):  # importing it would run it
            importlib.util.find_spec(name).loader.get_code(name)
        else:
            importlib.import_module(name)
    except ImportError as exc:
        failed[name] = str(exc)
print(json.dumps(failed))
"""

COUNT_COMPILED = """
import runpy, sys
archive = sys.argv[1]
compiled = []
def note(event, args):
    if event == "compile" and str(args[1]).startswith(archive):
        compiled.append(args[1])
sys.addaudithook(note)
sys.argv[1:] = ["--version"]
try:
    runpy.run_path(archive, run_name="__main__")
except SystemExit:
    pass
sys.path.insert(0, archive)
import docopt, pipeline, requests
print(len(compiled))
"""

LEAVE_A_FILE_OPEN = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "pipeline":
            sys.meta_path.remove(self)
            file = open(os.devnull)
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):
                pass
sys.meta_path.insert(0, Finder())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def archive(pyz: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(pyz) as opened:
        yield opened


@pytest.fixture
def server() -> Iterator[ListingServer]:
    with serve_listing() as running:
        yield running


def locked_versions() -> dict[str, str]:
    """Read requirements.txt: package name, as its dist-info spells it, to version."""
    pins = re.findall(
        r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE
    )
    return {name.replace("-", "_"): version for name, version in pins}


def files(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [entry for entry in archive.infolist() if not entry.is_dir()]


def dist_info(name: str) -> str:
    return f"{name}-{locked_versions()[name]}.dist-info"


def module_names(archive: zipfile.ZipFile) -> list[str]:
    """Name every module in the archive but our own __main__."""
    paths = [PurePosixPath(name) for name in archive.namelist() if name.endswith(".py")]
    names = [".".join(path.with_suffix("").parts) for path in paths]
    return sorted(n.removesuffix(".__init__") for n in names if n != "__main__")


def follow_once(
    python: Path, pyz: str | Path, url: str, directory: Path, **environment: str
) -> tuple[int, str, str]:
    """Run `--once` in `directory`, into posts.db; give the exit status and what it said."""
    command = [python, *STRICT, pyz, "--once", "posts.db", "python"]
    done = run_bare(*command, cwd=directory, REDPIPE_URL=url, **environment)
    return done.returncode, done.stdout, done.stderr


def titles(database: Path) -> list[str]:
    return [title for (title,) in query(database, "SELECT title FROM posts ORDER BY created_utc")]


# The archive itself


def test_the_archive_is_sound_and_everybody_may_run_it(pyz, archive):
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\nPK")
    assert stat.S_IMODE(pyz.stat().st_mode) == 0o755
    assert archive.testzip() is None


def test_it_holds_our_two_modules_and_the_pinned_packages(archive):
    top = {PurePosixPath(name).parts[0] for name in archive.namelist()}
    modules = {"__main__.py", "__main__.pyc", "pipeline.py", "pipeline.pyc"}
    packages = {"certifi", "charset_normalizer", "docopt", "idna", "requests", "urllib3"}
    assert top == modules | packages | {dist_info(name) for name in PACKAGES}


def test_it_holds_nothing_but_modules_data_and_licences(archive):
    def is_known(path: PurePosixPath) -> bool:
        if path.parts[0].endswith(".dist-info"):
            return path.name == "METADATA" or "licenses" in path.parts
        return path.suffix in {".py", ".pyc"} or path.name == "py.typed"

    paths = [PurePosixPath(entry.filename) for entry in files(archive)]
    assert [str(path) for path in paths if not is_known(path)] == ["certifi/cacert.pem"]
    described = {path.parts[0] for path in paths if path.name == "METADATA"}
    assert described == {dist_info(name) for name in PACKAGES}
    assert not {"__pycache__", "tests", "bin"} & {part for path in paths for part in path.parts}


def test_entries_are_unique_and_tell_nothing_of_when_and_by_whom_they_were_made(archive):
    assert [name for name, count in Counter(archive.namelist()).items() if count > 1] == []
    assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert {oct(entry.external_attr >> 16) for entry in files(archive)} == {"0o100644"}
    directories = [entry for entry in archive.infolist() if entry.is_dir()]
    assert {oct(entry.external_attr >> 16) for entry in directories} == {"0o40755"}
    assert {entry.compress_type for entry in files(archive)} == {zipfile.ZIP_DEFLATED}


def test_every_source_has_bytecode_that_is_never_checked_and_names_the_archive(archive):
    sources = {name for name in archive.namelist() if name.endswith(".py")}
    assert {name for name in archive.namelist() if name.endswith(".pyc")} == {
        f"{name}c" for name in sources
    }
    for name in sources:
        source_hash = importlib.util.source_hash(archive.read(name))
        header = importlib.util.MAGIC_NUMBER + b"\1\0\0\0" + source_hash
        compiled = archive.read(f"{name}c")
        assert compiled[:16] == header, name
        assert marshal.loads(compiled[16:]).co_filename == f"redpipe.pyz/{name}"


def test_no_path_of_the_building_machine_is_inside(pyz, archive):
    traces = [b".redpipe-build", os.fsencode(pyz.parent), os.fsencode(ROOT) + b"/"]
    for name in archive.namelist():
        assert not [trace for trace in traces if trace in archive.read(name)], name


def test_every_package_keeps_its_licence(archive):
    paths = [PurePosixPath(entry.filename) for entry in files(archive)]
    licences = [path for path in paths if "licenses" in path.parts]
    assert {(path.parts[0].partition("-")[0], path.name) for path in licences} == {
        ("certifi", "LICENSE"),
        ("charset_normalizer", "LICENSE"),
        ("docopt_ng", "LICENSE-MIT"),
        ("idna", "LICENSE.md"),
        ("requests", "LICENSE"),
        ("requests", "NOTICE"),
        ("urllib3", "LICENSE.txt"),
    }


def test_it_stays_small(pyz, archive):
    assert pyz.stat().st_size <= 1_200_000
    assert len(files(archive)) <= 190


# Running it


@every_python
@pytest.mark.parametrize(
    ("flags", "argument", "status"),
    [
        (STRICT, "--help", 0),
        (STRICT, "--version", 0),
        (["-OO"], "--help", 0),  # without docstrings
        ([], "--no-such-option", 64),
    ],
)
def test_what_needs_no_database_is_said_in_peace(pyz, bare_of, python, flags, argument, status):
    done = run_bare(bare_of(python.path), *flags, pyz, argument)
    assert done.returncode == status
    if status:
        assert one_line(done.stderr)
    else:
        assert done.stdout
        assert done.stderr == ""


@every_python
def test_every_bundled_module_can_be_imported(pyz, archive, bare_of, python):
    done = run_bare(bare_of(python.path), "-c", IMPORT_ALL, pyz, *module_names(archive))
    assert done.stderr == ""
    assert set(json.loads(done.stdout)) == OPTIONAL


@every_python
def test_it_follows_a_listing(pyz, bare_of, python, server, tmp_path):
    assert follow_once(bare_of(python.path), pyz, server.url, tmp_path) == (0, "", "")
    assert titles(tmp_path / "posts.db") == ["First", "Second"]


@every_python
def test_an_import_and_a_look_at_it_leave_nothing_open(pyz, bare_of, python, tmp_path):
    (tmp_path / "posts.ndjson").write_text(json.dumps(make_post(1)) + "\n")
    for arguments, status in [
        (["--from=posts.ndjson", "posts.db"], 0),
        (["--from=posts.ndjson", "posts.ndjson"], 73),
        (["--status", "posts.db"], 0),
        (["--status", "posts.ndjson"], 73),
        (["--recheck=0", "posts.db"], 78),
    ]:
        done = run_bare(bare_of(python.path), *STRICT, pyz, *arguments, cwd=tmp_path)
        assert done.returncode == status
        assert all(line.startswith("redpipe: ") for line in done.stderr.splitlines())
    assert titles(tmp_path / "posts.db") == [make_post(1)["title"]]


@pytest.mark.skipif(not TOO_OLD, reason="no Python older than 3.10 was found")
@pytest.mark.parametrize("python", TOO_OLD, ids=str)
def test_an_older_python_gets_one_line(pyz, python):
    done = run_bare(python.path, pyz, "--version")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "needs Python 3.10" in done.stderr
    assert f"{python.version[0]}.{python.version[1]}" in done.stderr


def test_help_imports_nothing_of_the_network(pyz, bare_python):
    done = run_bare(bare_python, "-X", "importtime", pyz, "--help")
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines()}
    assert "signal" in imported
    assert "pipeline" not in imported
    assert imported.isdisjoint({"requests", "urllib3", "ssl", "http.client", "certifi"})


def test_the_bytecode_inside_is_used(pyz, archive, bare_python, tmp_path):
    done = run_bare(bare_python, "-c", COUNT_COMPILED, pyz)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0", "")
    bare_archive = tmp_path / "sources.pyz"
    with zipfile.ZipFile(bare_archive, "w") as sources:
        for name in archive.namelist():
            if not name.endswith(".pyc"):
                sources.writestr(name, archive.read(name))
    done = run_bare(bare_python, "-c", COUNT_COMPILED, bare_archive)
    assert int(done.stdout.splitlines()[-1]) > 60


# From anywhere


def test_it_runs_by_its_own_name_and_from_the_root_by_a_relative_path(pyz, bare_python):
    done = run_bare(pyz, "--version", PATH=f"{bare_python.parent}:/usr/bin:/bin")
    assert (done.returncode, done.stderr) == (0, "")
    assert run_bare(bare_python, pyz.relative_to("/"), "--version", cwd="/").returncode == 0


@pytest.mark.parametrize("flag", ["-I", "-S", "-E", "-B"])
def test_it_runs_under_the_flags_of_the_careful(pyz, bare_python, flag):
    done = run_bare(bare_python, flag, pyz, "--version")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["with a space/red pipe.pyz", "redpipe", "ünïcode/😀.pyz"])
def test_it_runs_read_only_under_any_name_and_through_a_link(
    pyz, bare_python, server, tmp_path, name
):
    copy = tmp_path / name
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(pyz, copy)
    copy.chmod(0o444)
    if copy.parent != tmp_path:
        copy.parent.chmod(0o555)
    (tmp_path / "link").symlink_to(copy)
    for path in (copy, "link"):
        assert follow_once(bare_python, path, server.url, tmp_path) == (0, "", "")


def test_modules_in_the_working_directory_are_left_alone(pyz, bare_python, server, tmp_path):
    for name in ["json", "pipeline", "requests", "docopt", "sqlite3", "certifi"]:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the directory')\n")
    assert follow_once(bare_python, pyz, server.url, tmp_path) == (0, "", "")


def copy_python(python: Path, directory: Path) -> tuple[Path, Path]:
    """Copy an environment; give its interpreter and its folder of packages."""
    shutil.copytree(python.parents[1], directory, symlinks=True)
    (packages,) = directory.glob("lib/python3*/site-packages")
    return directory / "bin" / "python3", packages


def test_packages_of_the_host_are_left_alone(pyz, bare_python, server, tmp_path):
    python, packages = copy_python(bare_python, tmp_path / "host")
    for name in ["simplejson", "brotli", "zstandard", "socks", "OpenSSL", "requests", "docopt"]:
        (packages / f"{name}.py").write_text("raise SystemExit('taken from the host')\n")
    # A release that requests does not know, and would warn about.
    (packages / "chardet.py").write_text("__version__ = '9.0.0'\n")
    assert follow_once(python, pyz, server.url, tmp_path) == (0, "", "")


# While and after it runs


def test_what_a_signal_leaves_open_is_not_talked_of(pyz, bare_python, server, tmp_path):
    command = [*STRICT, "-c", LEAVE_A_FILE_OPEN, pyz, "--once", "posts.db"]
    done = run_bare(bare_python, *command, cwd=tmp_path, REDPIPE_URL=server.url)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "", "")


def test_replacing_the_file_does_not_disturb_a_run(redpipe, app, fake_reddit, pyz, tmp_path):
    add_posts(fake_reddit, range(3))
    copy = Path(shutil.copy(pyz, tmp_path / "redpipe.pyz"))
    redpipe.command[1] = str(copy)
    process = redpipe.start("--interval=1", "posts.db", "python")
    wait_for(fake_reddit.requests)
    (tmp_path / "new.pyz").write_bytes(b"#!/usr/bin/env python3\nnothing that can be imported")
    (tmp_path / "new.pyz").replace(copy)
    asked = len(fake_reddit.requests())
    wait_for(lambda: len(fake_reddit.requests()) >= asked + 2)
    assert redpipe.stop(process) == (-signal.SIGTERM, "", "")


# Building it


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Fetch the pinned wheels, and give the environment of a build without a network."""
    if importlib.util.find_spec("pip") is None:
        return {}  # build.sh finds one, and downloads each time
    directory = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    lock = ["--only-binary=:all:", "--requirement", ROOT / "requirements.txt"]
    subprocess.run([*command, "--dest", directory, *lock], check=True, timeout=120)
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(directory)}


@pytest.fixture(scope="module")
def repeatable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Build with a CPython that sorts the entries; gives also what build.sh printed."""
    if not SORTING:
        pytest.skip("equal bytes need CPython 3.12 or newer; name one in REDPIPE_PYTHONS")
    output = tmp_path_factory.mktemp("repeatable") / "plain.pyz"
    done = build(output, python=SORTING[-1].path, umask=0o022, TZ="UTC0")
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_entries_are_sorted_and_the_build_prints_hash_name_and_size(repeatable):
    output, printed = repeatable
    with zipfile.ZipFile(output) as archive:
        assert archive.namelist() == sorted(archive.namelist(), key=PurePosixPath)
    assert printed.startswith(f"{hash_of(output)}  {output}\n{output.stat().st_size} bytes; ")


def test_the_same_sources_give_the_same_bytes(repeatable, wheels, tmp_path):
    littered = copy_checkout(tmp_path / "two words" / "deep")
    littered.chmod(0o2755)  # new directories inherit the set-group-id bit
    for name in ["secret.db", ".env", "certifi.py", "redpipe.pyz"]:
        (littered / name).write_text("not for the archive")
    (littered / "temporary").mkdir()
    other = build(
        littered / "redpipe.pyz",
        root=littered,
        python=SORTING[-1].path,
        umask=0o077,
        TZ="Asia/Tokyo",
        LC_ALL="C",
        HOME=str(tmp_path),
        TMPDIR=str(littered / "temporary"),
        PYTHONOPTIMIZE="2",
        PYTHONHASHSEED="42",
        PIP_USER="1",
        PIP_REQUIRE_VIRTUALENV="1",
        SOURCE_DATE_EPOCH="1234567890",
        **wheels,
    )
    assert other.returncode == 0, other.stderr
    assert hash_of(littered / "redpipe.pyz") == hash_of(repeatable[0])
    assert stat.S_IMODE((littered / "redpipe.pyz").stat().st_mode) == 0o755


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy the checkout, and put an older redpipe.pyz and a temporary directory into it."""
    directory = copy_checkout(tmp_path / "checkout")
    (directory / "redpipe.pyz").write_text("the old one")
    (directory / "temporary").mkdir()
    return directory


def is_as_it_was(checkout: Path) -> bool:
    names = {path.name for path in checkout.iterdir()}
    assert names == {*NEEDED_TO_BUILD, "redpipe.pyz", "temporary"}
    assert list((checkout / "temporary").iterdir()) == []
    return (checkout / "redpipe.pyz").read_text() == "the old one"


@pytest.mark.parametrize(
    ("name", "pattern", "put"),
    [
        pytest.param("requirements.txt", "sha256:....", "sha256:0000", id="a wrong hash"),
        pytest.param("requirements.txt", r"idna==.*\n.*\n", "", id="a missing package"),
        pytest.param("pipeline.py", r"\A", "def (\n", id="wrong syntax"),
    ],
)
def test_a_failed_build_leaves_everything_as_it_was(checkout, wheels, name, pattern, put):
    spoiled = checkout / name
    spoiled.write_text(re.sub(pattern, put, spoiled.read_text(), count=1))
    temporary = str(checkout / "temporary")
    done = build(checkout / "redpipe.pyz", root=checkout, TMPDIR=temporary, **wheels)
    assert done.returncode != 0
    assert done.stderr
    assert is_as_it_was(checkout)


def test_an_interrupted_build_leaves_everything_as_it_was(checkout, wheels):
    process = subprocess.Popen(
        [checkout / "build.sh"],
        env=os.environ | wheels | {"PYTHON": sys.executable, "TMPDIR": str(checkout / "temporary")},
        start_new_session=True,
    )
    wait_for(lambda: list(checkout.glob(".redpipe-build.*/stage")))
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    assert is_as_it_was(checkout)


def test_pip_is_taken_from_venv_where_it_is_missing(bare_python, wheels, tmp_path):
    output = tmp_path / "redpipe.pyz"
    done = build(output, python=str(bare_python), **wheels)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [output]


def test_without_pip_and_venv_the_package_to_install_is_named(bare_python, checkout, tmp_path):
    python, packages = copy_python(bare_python, tmp_path / "host")
    (packages / "no-venv.pth").write_text("import sys; sys.modules['venv'] = None\n")
    done = build(checkout / "redpipe.pyz", root=checkout, python=str(python))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "apt install python3-venv" in done.stderr
    assert is_as_it_was(checkout)


@pytest.mark.parametrize(
    "python",
    [*(python.path for python in TOO_OLD), "no-such-python"],
    ids=[*map(str, TOO_OLD), "missing"],
)
def test_a_python_that_is_too_old_is_refused_in_one_line(checkout, python):
    done = build(checkout / "redpipe.pyz", root=checkout, python=python)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"build.sh: {python} is not Python 3.10 or newer; name one: PYTHON=python3.13 ./build.sh\n"
    )


# What the file says of itself


def test_the_version_is_that_of_the_newest_change(pyz, bare_python):
    shown = run_bare(bare_python, pyz, "--version").stdout.split()
    changes = (ROOT / "README.md").read_text("utf-8").split("\n## Changes\n")[1]
    newest = re.search(r"^### (\S+)", changes, re.MULTILINE)
    assert newest
    assert shown == ["redpipe", newest[1]]


def test_the_readme_shows_the_help(pyz, bare_python):
    shown = run_bare(bare_python, pyz, "--help").stdout
    assert shown in readme_blocks()
