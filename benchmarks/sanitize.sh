#!/usr/bin/env bash
# compute-sanitizer over a small part of the GPU tests: memcheck over the engine and the kernels, racecheck over the
# kernels (it sees shared memory only). Prints each tool's last lines; fails if one found something.
#
#     benchmarks/sanitize.sh [folder for the logs [engine] [kernels] [kernels-race] [products] [products-race]]
set -u
cd "$(dirname "$0")/.."
out=${1:-sanitize-out}
[ $# -eq 0 ] || shift
chosen=${*:-engine kernels kernels-race products products-race}
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
    [ "$code" -eq 0 ] || found=1
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
# No captures: an allocator that does not cache has nothing to give to a graph. And nothing that looks at what is let go
# of: under the tool graphs of autograd outlive their backward (its backtraces hold Python's frames, it seems), so that
# such tests fail, and captures meet the streams of graphs that should be gone.
check engine memcheck \
    tests/gpu/test_cuda_laws.py::test_several_backwards_and_threads \
    tests/gpu/test_cuda_laws.py::test_reloaded_tensors_keep_their_address_modulo_512 \
    tests/gpu/test_engine_cuda.py::test_what_is_written_between_saved_ranges_is_not_lost
check kernels memcheck "${kernels[@]}"
check kernels-race racecheck "${kernels[@]}"
check products memcheck "${products[@]}"
check products-race racecheck "${products[@]}"
exit $found
