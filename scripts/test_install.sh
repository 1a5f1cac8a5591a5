#!/usr/bin/env bash
# Install metarun with pip and all that it needs, from nothing, under each Python that is
# found, and train from another folder. Large downloads: not part of the tests.
#
#   scripts/test_install.sh [python3.11 python3.12 …]
set -euo pipefail
cd "$(dirname "$0")/.."
pythons=("$@")
[ $# -gt 0 ] || pythons=(python3.11 python3.12 python3.13)
for python in "${pythons[@]}"; do
    if ! "$python" --version >/dev/null 2>&1; then
        echo "$python: not found, left out"
        continue
    fi
    work=$(mktemp -d)
    git archive HEAD | tar -x -C "$work"
    "$python" -m venv "$work/.venv"
    "$work/.venv/bin/python" -m pip --disable-pip-version-check install --quiet "$work"
    (
        mkdir "$work/elsewhere" && cd "$work/elsewhere"
        METARUN_CACHE="$work/cache" "$work/.venv/bin/metarun" train backbone.width=8 \
            trainer.steps=10 trainer.eval_episodes=10 trainer.test_episodes=10
    )
    echo "$("$python" --version): installed and trained"
    rm -rf "$work"
done
