#!/usr/bin/env bash
# Every figure of the README, from real trainings. Omniglot needs METARUN_DATA, or a network.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
out=${1:-outputs/reproduce}

"$bin/metarun" train algo=nearest_neighbour data=glyphs task.query=5 hydra.run.dir="$out/pixels_glyphs"
"$bin/metarun" train algo=nearest_neighbour data=omniglot task.query=5 hydra.run.dir="$out/pixels"
"$bin/metarun" train experiment=demo hydra.run.dir="$out/glyphs_demo"
"$bin/metarun" train experiment=omniglot_5w1s_quick hydra.run.dir="$out/omniglot_5w1s_quick"
"$bin/metarun" eval ckpt="$out/omniglot_5w1s_quick"
"$bin/metarun" train data=sinusoid backbone=mlp hydra.run.dir="$out/sinusoid"
