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
# What an earlier check left would be taken for this one's: trainings are recalled, not repeated.
rm -rf "$out"/{bench,train,profile.json,page.md,gpu_check.json}
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

names=metarun,vmap,higher,learn2learn
# A CPU compiles each case for half a minute: its rehearsal goes without.
[ "${device%%:*}" = cpu ] && names=${names/metarun/metarun-eager}
bench=(scripts/bench --device "$device" --out "$out/bench" --repeats 3)
two=(--implementations "${names%%,*},learn2learn") # each one more starts two processes
bench_all=("${bench[@]}" --implementations "$names")
more=(--inner-steps 5)
tests=(-m pytest -q -m gpu -p no:cacheprovider tests)
steps=2000
if [ "${device%%:*}" = cpu ]; then
    more=(--quick)
    quick=--quick
    tests+=(--co)
    steps=20
fi

stage tests 105 "$python" "${tests[@]}"
# One after the other, so that what is measured stays where the time does not do for all.
stage bench_W2 90 "$python" "${bench_all[@]}" "${more[@]}" --workloads W2
stage bench_W1 70 "$python" "${bench_all[@]}" "${more[@]}" --workloads W1
stage bench_W3 80 "$python" "${bench_all[@]}" "${more[@]}" --workloads W3-5w1s
stage bench_W14 60 "$python" "${bench[@]}" "${two[@]}" --workloads W14 ${quick:-}
stage bench_W8 45 "$python" "${bench[@]}" "${two[@]}" "${more[@]}" --workloads W8
stage profile 45 "$python" -m scripts.gpu_check.profile --device "$device" --out "$out/profile.json"
data=glyphs
[ -d "${METARUN_DATA:-/nowhere}/omniglot-py" ] && data=omniglot
for precision in float32 tf32 bf16; do
    [ "$precision$device" = tf32cpu ] && continue
    stage "train_$precision" 25 "$python" -m metarun train experiment=omniglot_5w1s_quick \
        data=$data "device=$device" "engine.precision=$precision" "trainer.steps=$steps" \
        "hydra.run.dir=$out/train/$precision"
done
stage page 20 "$python" -m scripts.gpu_check.page "$out"
cat "$out/page.md"
exit $failed
