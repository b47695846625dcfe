#!/usr/bin/env bash
# Runs what waits for a GPU, in order: tests, compute-sanitizer, benchmarks. Each step writes its output,
# and a benchmark its table and picture, to one folder.
#
#   tools/gpu_check.sh [-n] [-o FOLDER] [STEP ...]
#
# -n prints the commands and runs nothing. Without STEP all steps run; a failed step does not stop the
# others. Exit status: the number of failed steps.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
out=results/gpu
dry=
while getopts no: option; do
    case $option in
        n) dry=1 ;;
        o) out=$OPTARG ;;
        *) exit 64 ;;
    esac
done
shift $((OPTIND - 1))

gpu_tests=("$PYTHON" -m pytest -q -m gpu --timeout 1200)
benchmark=("$PYTHON" tools/benchmark.py)
sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1)
values=(tests/layers/test_triton.py -k 'passes or layer_on_a_gpu')

steps=(
    machine tests tests_torch memcheck racecheck
    layer layer_split layer_torch inference step step_torch
)
run() {
    case $1 in
        machine) "$PYTHON" -m torch.utils.collect_env ;;
        # Values, equal runs, graphs, streams, a device that is not current (needs two), no synchronization.
        tests) "${gpu_tests[@]}" ;;
        tests_torch) MABN_D2_TRITON=0 "${gpu_tests[@]}" ;;
        memcheck) "${sanitizer[@]}" --tool memcheck "${gpu_tests[@]}" "${values[@]}" ;;
        racecheck) "${sanitizer[@]}" --tool racecheck "${gpu_tests[@]}" "${values[@]}" ;;
        layer)
            "${benchmark[@]}" layer --device cuda --norms bn,mabn,mabn_relu,syncbn,gn,copy \
                --dtype fp32,fp16,bf16 --formats nchw,nhwc --shapes r50_fpn --output "$out/layer.json"
            ;;
        layer_split)
            "${benchmark[@]}" layer --device cuda --norms mabn_split,bn_split --dtype fp32,fp16 \
                --formats nchw,nhwc --shapes 32x64x56x56,32x256x56x56,32x2048x7x7 --baseline bn_split \
                --output "$out/layer_split.json"
            ;;
        layer_torch)
            MABN_D2_TRITON=0 "${benchmark[@]}" layer --device cuda --norms bn,mabn --dtype fp32,fp16 \
                --shapes r50_fpn --output "$out/layer_torch.json"
            ;;
        inference)
            "${benchmark[@]}" inference --device cuda --norms bn,mabn,in,gn,ln --output "$out/inference.json"
            ;;
        step)
            "${benchmark[@]}" step --device cuda --norms bn,mabn --dtype fp32,fp16 --batch 2 --size 800 --output "$out/step.json"
            ;;
        step_torch)
            MABN_D2_TRITON=0 "${benchmark[@]}" step --device cuda --norms bn,mabn --dtype fp32,fp16 --batch 2 --size 800 \
                --output "$out/step_torch.json"
            ;;
    esac
}

for step in "$@"; do
    [[ " ${steps[*]} " == *" $step "* ]] ||
        { echo "gpu_check.sh: no step $step; the steps are ${steps[*]}" >&2; exit 64; }
done
if (($#)); then steps=("$@"); fi
if [[ $dry ]]; then
    declare -f run | sed '1,3d;$d'
    exit
fi
[[ $(command -v "$PYTHON") ]] || { echo "gpu_check.sh: no $PYTHON: run make env, or set PYTHON" >&2; exit 69; }
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "gpu_check.sh: this torch finds no CUDA device" >&2; exit 69; }
mkdir -p "$out"
failed=()
for step in "${steps[@]}"; do
    echo "== $step"
    run "$step" 2>&1 | tee "$out/$step.txt" || failed+=("$step")
done
((${#failed[@]})) && echo "failed: ${failed[*]}" >&2
exit ${#failed[@]}
