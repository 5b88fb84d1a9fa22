#!/usr/bin/env bash
# Build redpipe.pyz: our two modules and the pinned packages in one file.
#
#   ./build.sh [OUTPUT]                       default: redpipe.pyz beside this script
#   PYTHON=/path/to/python3.13 ./build.sh     the CPython (3.10 or newer) to build with
#
# The file runs on every CPython from 3.10 on, and starts fastest on the minor version that
# built it. Same commit, same CPython x.y.z (3.12 or newer) and same zlib: same bytes.
set -euo pipefail

die() {
    printf 'build.sh: %s\n' "$1" >&2
    exit 1
}

[[ $# -le 1 && ${1:-} != -* ]] || die 'usage: [PYTHON=PYTHON3] ./build.sh [OUTPUT]'
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
output=${1:-$here/redpipe.pyz}
[[ $output = /* ]] || output=$PWD/$output
[[ ! -d $output ]] || die "$output is a directory; name a file"

# -I here and below: no PYTHON... variable and no module lying about takes part in the build.
python=$("${PYTHON:-python3}" -I -c '
import sys
sys.exit(1) if sys.version_info < (3, 10) else print(sys.executable)
' 2>/dev/null) || die "${PYTHON:-python3} is not Python 3.10 or newer; name one: PYTHON=python3.13 ./build.sh"

# All work is done in one directory beside the output, so that the last step is a rename
# within one file system, and one rm cleans up everything, pip's own temporary files too.
work=$(mktemp -d -- "${output%/*}/.redpipe-build.XXXXXX")
trap 'rm -rf -- "$work"' EXIT
umask 022
export TMPDIR=$work TZ=UTC0 LC_ALL=C

pip=("$python" -I -m pip)
if ! "$python" -I -c 'import pip' 2>/dev/null; then
    "$python" -I -m venv "$work/venv" >/dev/null 2>&1 ||
        die "$python has neither pip nor venv; on Debian or Ubuntu: apt install python3-venv"
    pip=("$work/venv/bin/python" -I -m pip)
fi

# Wheels of pure Python for the oldest Python we run on, with the hashes in requirements.txt or
# not at all. The first two variables cannot be combined with --target; the rest of a user's pip
# configuration (mirror, proxy, certificates) is wanted.
mkdir "$work/stage"
cd "$work/stage"
PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_ROOT_USER_ACTION=ignore "${pip[@]}" install --quiet \
    --disable-pip-version-check --no-input --no-deps --no-compile --only-binary=:all: \
    --platform any --python-version 3.10 --require-hashes --target . \
    --requirement "$here/requirements.txt"

# Keep each package's licences, and METADATA for importlib.metadata. What else pip writes is of
# no use in an archive, and differs from one builder to the next. emscripten is for browsers.
rm -rf bin ./*/tests urllib3/contrib/emscripten
find . -path './*.dist-info/*' -type f ! -name METADATA ! -path '*/licenses/*' \
    ! -name 'LICEN[CS]E*' ! -name 'NOTICE*' -delete
cp -- "$here/__main__.py" "$here/pipeline.py" .

# An archive's bytecode is used only if it lies beside the source, and trusted in every time
# zone only if it is "unchecked". -o 0: docopt needs docstrings. -s, -p: tracebacks name the
# archive, not this directory.
"$python" -I -m compileall -q -b -o 0 --invalidation-mode unchecked-hash \
    -s "$work/stage" -p redpipe.pyz "$work/stage" >&2

# Entries carry times and modes: make them the same everywhere.
chmod -R a-s,u=rwX,go=rX .
find . -exec touch -t 198001010000 {} +
new=$work/redpipe.pyz
"$python" -I -m zipapp -c -p '/usr/bin/env python3' -o "$new" .
chmod 755 "$new"

# It must start, and be complete without this machine's packages, before it replaces the old.
"$python" -I -S "$new" --version >/dev/null
"$python" -I -S -c 'import sys; sys.path.insert(0, sys.argv[1]); import pipeline, requests' "$new"
mv -f -- "$new" "$output"
"$python" -I -c '
import hashlib, platform, sys, zlib
data = open(sys.argv[1], "rb").read()
print(hashlib.sha256(data).hexdigest(), "", sys.argv[2])
print(len(data), "bytes; CPython", platform.python_version() + ", zlib", zlib.ZLIB_RUNTIME_VERSION)
' "$output" "${1:-redpipe.pyz}"
