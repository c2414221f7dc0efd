#!/usr/bin/env bash
# From a fresh clone to a streamed answer: environment, export of the demo checkpoint, two questions.
# Run again it reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/environment.sh
python=$(find_python) || {
    echo "lfm-edge needs Python 3.10 or newer with venv and pip (Debian: apt install python3-venv)" >&2
    exit 1
}
make_environment .venv "$python" '.[export]'

if [ ! -f demo/bundle/manifest.json ] || [ demo/checkpoint/model.safetensors -nt demo/bundle/manifest.json ]; then
    echo "== exporting demo/checkpoint to demo/bundle"
    .venv/bin/lfm-edge export demo/checkpoint -o demo/bundle
fi

ask() {
    echo
    echo "== $1: $2"
    .venv/bin/lfm-edge run demo/bundle "$1" -p "$2"
}
ask demo/eval/images/0000.png "What is in this image?"
ask demo/photos/coffee.jpg "What is in this image?"
echo
echo "The demo model knows coloured shapes and printed words. On a photo it shows what tiles cost; its answers are meaningless there."
