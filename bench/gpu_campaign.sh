#!/usr/bin/env bash
# What only a GPU can show, in four parts that need nothing of each other, each under ten minutes:
#
#   bench/gpu_campaign.sh [--cpu] [PART|STAGE...]     all stages, or those named; --cpu: a dry run of every stage's code
#
#   checks     is it right: machine build launches gradcheck repeat graph sync memcheck racecheck tests
#   figures    how fast are the kernels: machine build bench ncu
#   options    which launch options, and the step: machine build tune step
#   training   does it train, and what takes the time: machine build train-tiny train-half profile
#
# Needs CUDA, torch >= 2.10, triton and nvcc, no network. The extension is built where none can be imported. PYTHON names
# the interpreter, OUT the folder for what comes out (default: campaign), LIMIT the seconds of the whole; out come
# summary.md, summary.json, <device>.json and its pictures, trace.json.gz, logs.tar.gz, none over 16 MB.
# A stage that fails or runs out of its time leaves the others alone; one that needs what is not here is skipped, and says
# what. Checks share the device; what is timed has it alone. Exit code: 0 none failed, 1 some did, 2 bad argument.
set -u
cd "$(dirname "$0")/.." || exit 2
STAGES="machine build launches gradcheck repeat graph sync memcheck racecheck tests bench ncu tune step train-tiny train-half profile"
declare -A PARTS=(
  [checks]="machine build launches gradcheck repeat graph sync memcheck racecheck tests"
  [figures]="machine build bench ncu"
  [options]="machine build tune step"
  [training]="machine build train-tiny train-half profile"
)
cpu=() chosen=()
for argument in "$@"; do
  case " $STAGES ${!PARTS[*]} --cpu " in
    *" $argument "*) ;;
    *) echo "gpu_campaign: argument must be --cpu or one of $STAGES ${!PARTS[*]}, got $argument" >&2; exit 2 ;;
  esac
  if [ "$argument" = --cpu ]; then cpu=(--cpu); else chosen+=(${PARTS[$argument]:-$argument}); fi
done
OUT="${OUT:-campaign}" PYTHON="${PYTHON:-python3}" SECONDS=0
# the whole; a dry run may take longer, on two cores
END="${LIMIT:-470}"
[ ${#cpu[@]} -eq 0 ] || END="${LIMIT:-590}"
mkdir -p "$OUT/logs" || exit 2
OUT="$(cd "$OUT" && pwd)"
rm -f "$OUT/stages.tsv"
# the tree as it is, whether it was installed or not
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

record() { printf '%s\t%s\t%s\t%s\n' "$@" | tee -a "$OUT/stages.tsv"; }

# stage NAME LIMIT COMMAND...: exit code 77 means skipped; a line "figure: ..." of its output goes into the table
stage() {
  local name="$1" limit="$2" start=$SECONDS left=$((END - SECONDS)) log="$OUT/logs/$1.log" code status figure
  shift 2
  [ ${#chosen[@]} -eq 0 ] || case " ${chosen[*]} " in *" $name "*) ;; *) return ;; esac
  if [ "$left" -lt 5 ]; then record "$name" skipped 0 "no time was left"; return; fi
  # two cores take longer than sixteen and a GPU
  [ ${#cpu[@]} -eq 0 ] || limit=$((4 * limit))
  [ "$limit" -lt "$left" ] || limit=$left
  timeout -k 5 "$limit" "$@" >"$log" 2>&1
  code=$?
  case $code in 0) status=passed ;; 77) status=skipped ;; 124 | 137) status=failed; echo "figure: over its $limit s" >>"$log" ;; *) status=failed ;; esac
  figure="$(sed -n 's/^figure: //p' "$log" | tail -n 1)"
  [ -n "$figure" ] || figure="$(tail -n 1 "$log" | cut -c 1-160)"
  record "$name" "$status" $((SECONDS - start)) "$figure"
}

run() { stage "$1" "$2" "$PYTHON" bench/campaign.py "${@:3}" --out "$OUT" "${cpu[@]}"; }

# beside the others: most of a check's time goes into compiling kernels on one core; a dry run's cores are too few for that
beside() { "$@" & [ ${#cpu[@]} -eq 0 ] || wait; }

# skip NAME REASON
skip() { stage "$1" 5 bash -c 'echo "figure: $1"; exit 77' skip "$2"; }

# torch's caching allocator would stand between a sanitizer and each allocation; small cases: they are a hundred times slower
sanitize() {
  if [ ${#cpu[@]} -gt 0 ]; then run "$1" 60 small; return; fi
  command -v compute-sanitizer >/dev/null || { skip "$1" "no compute-sanitizer"; return; }
  stage "$1" 90 bash -c 'set -o pipefail; "$@" 2>&1 | tee "$0" && exit; code=$?
    grep -q "Device not supported" "$0" && { echo "figure: compute-sanitizer does not know this device"; exit 77; }; exit $code' \
    "$OUT/logs/$1.out" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 1 \
    "$PYTHON" bench/campaign.py small --out "$OUT"
}

# the kernels of the ops alone; it reads hardware counters, which not every machine allows
counters() {
  if [ ${#cpu[@]} -gt 0 ] || ! command -v ncu >/dev/null; then skip ncu "no CUDA, or no ncu"; return; fi
  stage ncu 45 bash -c 'ncu --clock-control none --csv --kernel-name "regex:efe_|measure|finish|clip" --launch-count 12 \
    --metrics gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread \
    "$@" || { echo "figure: ncu does not work here"; exit 77; }; echo "figure: logs.tar.gz: logs/ncu.log"' \
    ncu "$PYTHON" bench/campaign.py large --out "$OUT"
}

# the table's rows for this device; without one there is nothing to tune
tune() {
  if [ ${#cpu[@]} -gt 0 ]; then skip tune "no CUDA"; return; fi
  stage tune 300 "$PYTHON" bench/tune_efe_loss.py --seconds 1.0
}

run machine 30 machine
# for the GPU that is there alone: other architectures are compiled in CI
[ ${#cpu[@]} -gt 0 ] || export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))' 2>/dev/null)}"
stage build 150 env QWEN_FUSED_REQUIRE_EXTENSION=1 bash -c '
  "$0" -c "import torch, qwen_fused._C" 2>/dev/null || "$0" setup.py -q build_ext --inplace || exit
  "$0" -c "from qwen_fused import backends; print(\"figure: extension\", backends.describe()[\"extension\"])"' "$PYTHON"
beside run launches 120 launches
beside run gradcheck 60 gradcheck
beside run repeat 45 repeat
beside run graph 45 graph
beside run sync 60 sync
beside sanitize memcheck
beside sanitize racecheck
beside run tests 220 tests
wait
run bench 330 bench
counters
tune
run step 240 step
run train-tiny 90 train tiny
run train-half 120 train half
run profile 40 profile

# in the order of the list, whichever ended first
for name in $STAGES; do grep "^$name	" "$OUT/stages.tsv"; done >"$OUT/ordered.tsv"
mv "$OUT/ordered.tsv" "$OUT/stages.tsv"
"$PYTHON" bench/campaign.py summary --out "$OUT"
code=$?
tar -czf "$OUT/logs.tar.gz" -C "$OUT" logs && rm -r "$OUT/logs" "$OUT/stages.tsv"
find "$OUT" -type f -size +16M -print -delete | sed 's/^/over 16 MB, removed: /'
echo "in $OUT, after $SECONDS s: $(ls "$OUT" | tr '\n' ' ')"
exit $code
