"""Proxies and certificates that the environment names: what can never work is said at once."""

from __future__ import annotations

import os

import pytest
import trustme

from artefact import run_bare
from fake_reddit import TRUNCATE, gzip_bomb, make_post
from pipeline import BadEnvironment

NO_PROXY_FORM = "not http(s)://host:port; SOCKS is not spoken"
NO_CERTIFICATE = "not a file or folder that holds a certificate"

PROXY_NAMES = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]
SOCKS = "socks5h://user:pa55word@127.0.0.1:1080"
BAD_PROXIES = {
    "SOCKS": SOCKS,
    "an old SOCKS": "socks4://127.0.0.1:1080",
    "SOCKS in capitals": "SOCKS5://127.0.0.1:1080",
    "a port that is no number": "http://pa55word:notaport",
    "a port that is too high": "http://proxy.invalid:65536",
    "port 0": "http://proxy.invalid:0",
    "no host": "http://",
    "no host but a port": "http://:3128",
    "nothing but a scheme": "://",
    "another scheme": "ftp://proxy.invalid:21",
    "a blank": "http://proxy.invalid :3128",
    "half an IPv6 address": "http://[::1:3128",
    "a password with a number sign": "http://user:pa55#word@proxy.invalid:3128",
    "a password with a question mark": "http://user:pa55?word@proxy.invalid:3128",
    "a newline": "http://proxy.invalid:3128\n",
}
GOOD_PROXIES = [
    "http://proxy.invalid:3128",
    "HTTP://proxy.invalid",
    "https://user:pa55word@proxy.invalid:8443/",
    "proxy.invalid:3128",
    "127.0.0.1:3128",
    "http://[::1]:3128",
    "",
]


@pytest.fixture
def trouble(program):
    """Give what tells what is wrong with variables, when there are no others; "" for nothing."""
    kept = dict(os.environ)

    def found(**environ):
        os.environ.clear()
        os.environ.update(environ)
        try:
            program.check_proxy(program.read_access(environ).url or "https://www.reddit.com")
        except BadEnvironment as exc:
            return str(exc)
        return ""

    yield found
    os.environ.clear()
    os.environ.update(kept)


@pytest.mark.parametrize("name", PROXY_NAMES)
def test_a_socks_proxy_ends_the_built_file_at_once(name, redpipe, tmp_path):
    far = {"REDPIPE_URL": "https://reddit.invalid"}
    done = redpipe("posts.db", "python", timeout=10, **{name: SOCKS}, **far)
    assert done == (78, "", f"redpipe: {name}: {NO_PROXY_FORM}\n")
    assert not (tmp_path / "posts.db").exists()


@pytest.mark.parametrize("proxy", BAD_PROXIES.values(), ids=BAD_PROXIES)
@pytest.mark.parametrize("name", PROXY_NAMES)
def test_a_proxy_that_can_never_work_is_refused_by_its_variable(name, proxy, trouble):
    assert trouble(**{name: proxy}) == f"{name}: {NO_PROXY_FORM}"


@pytest.mark.parametrize("proxy", GOOD_PROXIES)
@pytest.mark.parametrize("name", PROXY_NAMES)
def test_a_proxy_that_may_work_is_taken(name, proxy, trouble):
    assert trouble(**{name: proxy}) == ""


@pytest.mark.parametrize("all_proxy", ["ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("https_proxy", ["HTTPS_PROXY", "https_proxy"])
def test_a_socks_proxy_for_all_is_no_matter_beside_one_that_is_used(
    all_proxy, https_proxy, trouble
):
    assert trouble(**{all_proxy: SOCKS, https_proxy: "http://127.0.0.1:3128"}) == ""


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy"])
def test_a_proxy_for_plain_http_matters_to_plain_http_only(name, trouble):
    assert trouble(**{name: SOCKS}) == ""
    url = "http://reddit.invalid"
    assert trouble(REDPIPE_URL=url, **{name: SOCKS}) == f"{name}: {NO_PROXY_FORM}"


@pytest.mark.parametrize("exempt", ["*", "reddit.com", ".reddit.com", "a.invalid, www.reddit.com"])
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_a_proxy_that_no_proxy_leaves_unused_is_no_matter(name, exempt, trouble):
    assert trouble(HTTPS_PROXY=SOCKS, **{name: exempt}) == ""
    assert trouble(HTTPS_PROXY=SOCKS, **{name: "example.invalid"}).startswith("HTTPS_PROXY: ")


# Certificates


FILES = ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]
AUTHORITY = trustme.CA()
WITHOUT_A_CERTIFICATE = {
    "rubbish": ("authority", b"rubbish with pa55word\n"),
    "an empty file": ("authority", b""),
    "a folder of rubbish": ("authority/12345678.0", b"rubbish"),
    "an empty folder": ("authority/12345678.0", None),
    "a key": ("authority", AUTHORITY.private_key_pem.bytes()),
    "nothing": ("elsewhere", b""),
}


@pytest.mark.parametrize(
    ("file", "content"), WITHOUT_A_CERTIFICATE.values(), ids=WITHOUT_A_CERTIFICATE
)
@pytest.mark.parametrize("name", FILES)
def test_a_path_without_a_certificate_is_refused_by_its_variable(
    name, file, content, tmp_path, trouble
):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    if content is not None:
        (tmp_path / file).write_bytes(content)
    assert trouble(**{name: str(tmp_path / "authority")}) == f"{name}: {NO_CERTIFICATE}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_rubbish_ends_the_built_file_at_once(name, redpipe, tmp_path):
    (tmp_path / "authority").write_text("rubbish with pa55word\n")
    done = redpipe("posts.db", "python", timeout=10, **{name: str(tmp_path / "authority")})
    assert done == (78, "", f"redpipe: {name}: {NO_CERTIFICATE}\n")


@pytest.mark.parametrize("name", FILES)
def test_a_certificate_is_taken_whatever_else_is_there(name, tmp_path, trouble):
    certificate = AUTHORITY.cert_pem.bytes()
    (tmp_path / "authority.pem").write_bytes(b"# Invented\n" + certificate)
    assert trouble(**{name: str(tmp_path / "authority.pem")}) == ""
    (tmp_path / "README").write_text("rubbish")
    (tmp_path / "00000000.0").write_text("rubbish")
    (tmp_path / "0a1b2c3d.0").write_bytes(certificate)
    (tmp_path / "authority.pem").unlink()
    (tmp_path / "gone.0").symlink_to("nowhere")
    assert trouble(**{name: str(tmp_path)}) == ""


# Warnings


@pytest.mark.parametrize(
    ("closed", "faults"),
    [(False, []), (True, []), (False, [TRUNCATE, gzip_bomb()])],
    ids=["open", "closed", "trouble"],
)
def test_a_run_in_development_mode_warns_of_nothing(
    closed, faults, pyz, bare_python, fake_reddit, tmp_path
):
    fake_reddit.anonymous_json_blocked = closed
    fake_reddit.script(*faults)
    fake_reddit.add(make_post(1))
    command = [bare_python, "-X", "dev", "-W", "error", pyz, "-q", "--once", "posts.db", "python"]
    done = run_bare(*command, REDPIPE_URL=fake_reddit.url, TMPDIR=str(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(fake_reddit.log) > len(faults)
