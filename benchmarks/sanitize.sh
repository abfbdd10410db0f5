#!/usr/bin/env bash
# compute-sanitizer over GPU tests: memcheck over the engine's, but for those that time something, and over a part of the
# kernels'; racecheck over the kernels (it sees shared memory only). Prints each tool's last lines; fails if one found
# something.
#
#     benchmarks/sanitize.sh [folder for the logs [engine] [captures] [kernels] [kernels-race] [products] [products-race]]
set -u
cd "$(dirname "$0")/.."
out=${1:-sanitize-out}
[ $# -eq 0 ] || shift
chosen=${*:-engine captures kernels kernels-race products products-race}
python=${PYTHON:-python3}
mkdir -p "$out"
# PyTorch's caching allocator would hide what lies outside of a tensor but inside its segment.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
found=0

check() { # name, tool, tests
    local name=$1 tool=$2
    shift 2
    [[ " $chosen " == *" $name "* ]] || return 0
    timeout "${SANITIZE_TIMEOUT:-600}" compute-sanitizer --tool "$tool" --error-exitcode 86 --target-processes all \
        "$python" -m pytest -p pytest_timeout -p _hypothesis_pytestplugin -q --timeout 600 -p no:cacheprovider "$@" \
        > "$out/$name.txt" 2>&1
    local code=$?
    echo "== $name ($tool): exit $code"
    grep -E "ERROR SUMMARY|RACECHECK SUMMARY|passed|failed" "$out/$name.txt" | tail -4
    return "$code"
}

kernels=(
    "tests/kernels/test_triton_fp8_block.py::test_ragged_and_empty_splits_equal_the_reference"
    "tests/kernels/test_triton_fp8_block.py::test_one_direction_alone_equals_the_reference"
    "tests/kernels/test_triton_swiglu.py::test_the_backward_is_that_of_autograd"
    "tests/kernels/test_triton_permute.py::test_copies_are_placed_as_by_a_stable_sort"
)
products=( # minutes: a product's threads are many
    "tests/kernels/test_grouped_gemm_gpu.py::test_rows_of_no_expert_are_zeros_and_the_bias_is_added"
)
# Under the tool everything is many times slower.
timed="beside or busy or flat or finishes_before or overtakes or never_wait or gives_way"
check engine memcheck -k "not ($timed)" \
    tests/gpu/test_cuda_laws.py tests/gpu/test_engine_cuda.py tests/gpu/test_urgent_cuda.py || found=1
# An allocator that does not cache has nothing to give to a graph.
(
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
    check captures memcheck -k "not ($timed or overlap)" \
        tests/gpu/test_capture_cuda.py tests/gpu/test_graphed_callables_cuda.py tests/gpu/test_graph_driver_cuda.py
) || found=1
check kernels memcheck "${kernels[@]}" || found=1
check kernels-race racecheck "${kernels[@]}" || found=1
check products memcheck "${products[@]}" || found=1
check products-race racecheck "${products[@]}" || found=1
exit $found
