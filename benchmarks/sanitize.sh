#!/usr/bin/env bash
# compute-sanitizer over the GPU tests of engine, graphs and kernels: memcheck over all of them, racecheck over the
# kernels (it sees shared memory only). Prints a line for each group of tests; fails if a tool found something or a test
# failed. Left out: tests marked `undisturbed`, which judge times or memory that the tool changes.
#
#     benchmarks/sanitize.sh [folder for the logs [group ...]]
#
# SANITIZE_JOBS groups run at once (4); SANITIZE_TIMEOUT bounds each, in seconds (1800); COMPUTE_SANITIZER names the
# program. Take one of 2026.1 or newer (`pip install nvidia-cuda-sanitizer-api` brings one): before, racecheck did not
# follow the barriers of groups of warps on Hopper, and took the compiler's own start of them for a race (seen with
# 2025.3); and memcheck looks at what the TMA loads since 2026.2.
set -u
cd "$(dirname "$0")/.."
out=${1:-sanitize-out}
[ $# -eq 0 ] || shift
chosen=$*
python=${PYTHON:-python3}
sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
mkdir -p "$out"
export PYTHONPATH=src PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONUNBUFFERED=1

# name, tool, allocator, then arguments of pytest.
#
# PyTorch's caching allocator hides what lies outside of a tensor but inside its segment, so that most groups do without
# ("plain"). But captures need it ("caching"), and without it freeing memory waits for the device, so that memory is
# never used again while a copy is under way: where that is what a test provokes, the test runs both ways.
#
# In the groups of kernels the tool looks at the library's own: PyTorch's, of which references are made, have C++ names.
groups() {
    local gpu=tests/gpu kernels=tests/kernels
    group laws           memcheck  plain   $gpu/test_cuda_laws.py
    group engine         memcheck  plain   $gpu/test_engine_cuda.py
    group urgent         memcheck  plain   $gpu/test_urgent_cuda.py -k "not on_the_way_back"
    group early          memcheck  caching $gpu/test_urgent_cuda.py $gpu/test_engine_cuda.py -k "too_early"
    group captures       memcheck  caching $gpu/test_capture_cuda.py
    group graphs         memcheck  caching $gpu/test_graphed_callables_cuda.py
    group drivers        memcheck  caching $gpu/test_graph_driver_cuda.py $gpu/test_compat_graphs_cuda.py \
        $gpu/test_gauge_cuda.py $gpu/test_plans_cuda.py
    group fp8-block      memcheck  plain   $kernels/test_triton_fp8_block.py $kernels/test_triton_launch.py
    group mxfp8          memcheck  plain   $kernels/test_triton_mxfp8.py $kernels/test_triton_swiglu.py
    group nvfp4          memcheck  plain   $kernels/test_triton_nvfp4.py -k "not ieee"
    group nvfp4-ieee     memcheck  plain   $kernels/test_triton_nvfp4.py -k ieee
    group dequantize     memcheck  plain   $kernels/test_triton_dequantize.py
    group products       memcheck  plain   $kernels/test_grouped_gemm_gpu.py
    group formats        memcheck  plain   tests/formats/test_gpu.py tests/formats/test_device_splits.py
    group fp8-block-race racecheck plain   $kernels/test_triton_fp8_block.py
    group mxfp8-race     racecheck plain   $kernels/test_triton_mxfp8.py $kernels/test_triton_swiglu.py
    group nvfp4-race     racecheck plain   $kernels/test_triton_nvfp4.py -k "not ieee"
    group nvfp4-ieee-race racecheck plain  $kernels/test_triton_nvfp4.py -k ieee
    group dequantize-race racecheck plain  $kernels/test_triton_dequantize.py
    group products-race  racecheck plain   $kernels/test_grouped_gemm_gpu.py -k portable
    group weights-race   racecheck plain   $kernels/test_grouped_gemm_gpu.py -k weights
    group hopper-race    racecheck plain   $kernels/test_grouped_gemm_gpu.py -k "hopper or powers_of_two"
    # What provokes an error of CUDA's own, without the tool's word on failed calls.
    group errors         memcheck  caching $gpu/test_capture_cuda.py $gpu/test_graphed_callables_cuda.py \
        $gpu/test_graph_driver_cuda.py
}

group() {
    local name=$1 tool=$2 allocator=$3
    shift 3
    [[ -z "$chosen" || " $chosen " == *" $name "* ]] || return 0
    while [ "$(jobs -rp | wc -l)" -ge "${SANITIZE_JOBS:-4}" ]; do wait -n; done
    check "$name" "$tool" "$allocator" "$@" &
}

check() {
    local name=$1 tool=$2 allocator=$3 marked="not undisturbed and not cuda_error" code=0 options=()
    shift 3
    [ "$name" != errors ] || marked=cuda_error
    [[ "$*" == *tests/gpu/test_* ]] || options=(--kernel-name-exclude kns=_Z)
    # Of failed calls the engine's groups alone are told: newer tools tell of calls that PyTorch makes to see whether it
    # has a context yet.
    if [ "$tool" = memcheck ]; then
        [[ "$name" != errors && "$*" == *tests/gpu/test_* ]] && options+=(--report-api-errors all) ||
            options+=(--report-api-errors no)
    fi
    [ "$allocator" = caching ] || export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    # No backtraces: they would hold frames of Python's, and with them the graphs of autograd of which tests check that
    # they are gone.
    timeout -k 20 "${SANITIZE_TIMEOUT:-1800}" "$sanitizer" --tool "$tool" "${options[@]}" --show-backtrace no \
        --error-exitcode 86 --target-processes all \
        "$python" -m pytest -p pytest_timeout -p _hypothesis_pytestplugin -m "$marked" -v --tb=short --durations=10 \
        --timeout 900 -p no:cacheprovider "$@" > "$out/$name.txt" 2>&1 || code=$?
    echo "$code" > "$out/$name.code"
    printf '%-16s %-9s exit %-3s %s;%s\n' "$name" "$tool" "$code" \
        "$(grep -E '^=+ .*(passed|failed) ?.* in ' "$out/$name.txt" | tail -1 | tr -d '=')" \
        "$(grep -E 'SUMMARY' "$out/$name.txt" | tail -1 | tr -d '=')"
}

rm -f "$out"/*.code
# What these options find is shown first: each tool has to find its planted fault.
for fault in bounds race; do
    tool=memcheck
    if [ $fault = race ]; then
        tool=racecheck
        "$python" -c "import torch; raise SystemExit(torch.cuda.get_device_capability()[0] != 9)" || continue
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool $tool --kernel-name-exclude kns=_Z --show-backtrace no \
        --error-exitcode 86 "$python" benchmarks/planted_fault.py $fault > "$out/planted-$fault.txt" 2>&1
    [ $? -eq 86 ] || {
        echo "$tool did not find a planted fault, so that its silence says nothing: see $out/planted-$fault.txt"
        echo 1 > "$out/planted-$fault.code"
    }
done
"$sanitizer" --version | tail -1
groups
wait
! cat "$out"/*.code | grep -qv '^0$'
