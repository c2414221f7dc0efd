#!/usr/bin/env bash
# Lint, types and all tests, in environments made here. About ten minutes on two cores, most of it the tests against the
# references. LONG=1 adds the tests marked slow.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/environment.sh
# Two pytest processes with one thread each; more threads would only wait for each other.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
select=(-m "not slow")
[ "${LONG:-}" = 1 ] && select=()

make_environment .venv '.[test]'
# The reference image processor wants torchvision, whose own requirements would replace the CPU torch.
.venv/bin/python -c 'import torchvision' 2>/dev/null || [ -d .venv/lib/python3*/site-packages/torchvision ] ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0

echo "== ruff, mypy"
.venv/bin/ruff check .
.venv/bin/mypy

echo "== runtime on Python 3.10 with onnxruntime 1.23.2 (JetPack 6)"
old=$(command -v python3.10 || ls "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python3.10 2>/dev/null | head -n 1 || true)
if [ -n "$old" ]; then
    PYTHON=$old make_environment .venv-3.10 . onnxruntime==1.23.2 pytest hypothesis
    .venv/bin/lfm-edge export demo/checkpoint -o build/test-bundle --quiet
    LFM_EDGE_TEST_BUNDLE=build/test-bundle .venv-3.10/bin/python -m pytest -q tests/runtime "${select[@]}"
else
    echo "skipped: this machine has no Python 3.10"
fi

echo "== graphs and images against transformers 5"
make_environment .venv-transformers5 '.[export]' torch==2.13.0 'transformers>=5,<6' safetensors pytest hypothesis matplotlib
[ -d .venv-transformers5/lib/python3*/site-packages/torchvision ] ||
    .venv-transformers5/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0
.venv-transformers5/bin/python -m pytest -q tests/export/test_graph_parity.py tests/runtime/test_images.py "${select[@]}"

echo "== all tests, transformers 4.57"
.venv/bin/python -m pytest -q -n 2 --dist loadscope "${select[@]}"
