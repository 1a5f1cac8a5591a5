#!/usr/bin/env bash
# All that a GPU is asked about metarun, in one call of less than ten minutes without a network:
# its tests, the benchmark against the peers, a profile, and real trainings in each precision.
#
#   scripts/gpu_check.sh [device, default cuda] [folder, default outputs/gpu_check]
#
# Writes JSON, plots, logs and page.md there. A stage that fails or takes too long is noted, and the
# next one begins. With device cpu it is a rehearsal: the same stages, small, and no figures of a
# GPU. METARUN_DATA names the folder of Omniglot; without it, drawn characters take its place.
# Ends with 1 if a stage failed.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda}
out=${2:-outputs/gpu_check}
python=${PYTHON:-${VENV:-.venv}/bin/python}
mkdir -p "$out"
: >"$out/stages.tsv"
failed=0

stage() { # name, most seconds, command …
    local name=$1 most=$2 begin code
    shift 2
    echo "== $name (at most $most s)"
    begin=$(date +%s)
    timeout --kill-after=10 "$most" "$@" >"$out/$name.log" 2>&1
    code=$?
    printf '%s\t%s\t%s\n' "$name" "$code" "$(($(date +%s) - begin))" >>"$out/stages.tsv"
    [ $code = 0 ] && return
    failed=1
    echo "   ended with $code; the end of $out/$name.log:"
    tail -n 5 "$out/$name.log" | sed 's/^/   /'
}

bench=(scripts/bench --device "$device" --out "$out/bench")
tests=(-m pytest -q -m gpu -p no:cacheprovider tests)
steps=2000
if [ "${device%%:*}" = cpu ]; then
    bench+=(--quick)
    tests+=(--co)
    steps=20
fi

stage tests 150 "$python" "${tests[@]}"
stage bench 240 "$python" "${bench[@]}" --repeats 3 --workloads W1,W2,W3,W8,W14
stage profile 60 "$python" -m scripts.gpu_check.profile --device "$device" --out "$out/profile.json"
data=glyphs
[ -d "${METARUN_DATA:-/nowhere}/omniglot-py" ] && data=omniglot
for precision in float32 tf32 bf16; do
    [ "$precision$device" = tf32cpu ] && continue
    stage "train_$precision" 45 "$python" -m metarun train experiment=omniglot_5w1s_quick \
        data=$data "device=$device" "engine.precision=$precision" "trainer.steps=$steps" \
        "hydra.run.dir=$out/train/$precision"
done
stage page 20 "$python" -m scripts.gpu_check.page "$out"
cat "$out/page.md"
exit $failed
