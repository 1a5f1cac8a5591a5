#!/usr/bin/env bash
# Every figure of the README, from real trainings. Omniglot needs METARUN_DATA, or a network.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
out=${1:-outputs/reproduce}

"$bin/python" scripts/pixel_baseline.py --data glyphs --query 5
"$bin/python" scripts/pixel_baseline.py --data omniglot --query 5
"$bin/metarun" train experiment=demo hydra.run.dir="$out/glyphs_demo"
"$bin/metarun" train experiment=omniglot_5w1s_quick hydra.run.dir="$out/omniglot_5w1s_quick"
"$bin/metarun" eval ckpt="$out/omniglot_5w1s_quick"
"$bin/metarun" train data=sinusoid backbone=mlp hydra.run.dir="$out/sinusoid"
