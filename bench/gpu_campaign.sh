#!/usr/bin/env bash
# What only a GPU can show, in one go: build, tests, sanitizers, figures. Logs and figures go to $OUT (default: bench/results).
# PYTHON names the interpreter whose CUDA torch is to be used; nvcc of the same CUDA version must be there.
set -u
cd "$(dirname "$0")/.."
OUT="${OUT:-bench/results}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
failed=()

step() {
  local name="$1"
  shift
  echo "== $name: $*"
  "$@" >"$OUT/$name.log" 2>&1 || failed+=("$name")
  tail -n 20 "$OUT/$name.log"
}

export PYTHONPATH="$PWD"
step machine nvidia-smi
step build env QWEN_FUSED_REQUIRE_EXTENSION=1 "$PYTHON" setup.py build_ext --inplace
step tests "$PYTHON" -m pytest -q -m gpu tests

# the sanitizers see each allocation only where torch's cache does not stand between; small cases: they are a hundred times slower
SMALL="bad_elements or clip_matches or matches_extended"
for tool in memcheck racecheck initcheck; do
  step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$PYTHON" -m pytest -q tests/test_gradients_cuda.py -k "$SMALL"
done

step grad_norm_float32 "$PYTHON" bench/bench_grad_norm.py --case "2000 small" qwen2.5-0.5b --dtype float32
step grad_norm_bfloat16 "$PYTHON" bench/bench_grad_norm.py --case "2000 small" qwen2.5-1.5b --dtype bfloat16
[ ! -e bench/bench_efe_loss.py ] || step efe_loss "$PYTHON" bench/bench_efe_loss.py
[ "$OUT" = bench/results ] || cp bench/results/*.json "$OUT"/

if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed"
