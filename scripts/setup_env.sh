#!/usr/bin/env bash
# Make a virtual environment with metarun (editable), its test tools and learn2learn.
#
#   PYTHON=python3.12 scripts/setup_env.sh [folder, default .venv]
#
# learn2learn 0.2.0 cannot be a plain requirement: its published C files do not compile on
# Python 3.11 and later, and its own requirements would downgrade numpy. So its extension is
# built from the .pyx files (the build_ext option makes its setup.py do that), without its
# requirements, and the few packages that it really imports are installed by name. One of these is
# qpth, which solves its support vector machines: it asks for numpy 1, and works with numpy 2.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3}

"$python" - <<'CHECK'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"metarun needs Python 3.11, 3.12 or 3.13, not {sys.version.split()[0]}: "
             "set PYTHON, e.g. make demo PYTHON=python3.12")
CHECK
echo "Setting up $venv (a few minutes the first time: torch is large)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install --editable ".[test]"
pip install "setuptools>=77" wheel "cython>=3" scipy requests "gym==0.26.2"
if ! "$venv/bin/python" -c 'import learn2learn' 2>/dev/null; then
    pip install --no-deps --no-build-isolation --use-pep517 \
        --config-settings=--global-option=build_ext "learn2learn==0.2.0"
fi
pip install --no-deps "qpth==0.0.18"
"$venv/bin/python" -W ignore -c 'import metarun, learn2learn' 2>/dev/null \
    || { echo "learn2learn was installed but cannot be imported:"; "$venv/bin/python" -c 'import learn2learn'; }
