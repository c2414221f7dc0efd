#!/usr/bin/env bash
# Programs that people point at the server, as they are: Frigate, Home Assistant with LLM Vision and with its own integrations of
# Ollama and llama.cpp, Open WebUI. Each in an environment of its own (some 4 GB and ten minutes at first); after scripts/demo.sh.
# Needs root and debootstrap, for Home Assistant.
#
#     scripts/checks/clients/run.sh FRIGATE LLM_VISION
#
# FRIGATE, LLM_VISION: clones of github.com/blakeblackshear/frigate and github.com/valentinfrlch/ha-llmvision.
set -euo pipefail
frigate=$(realpath "$1") llm_vision=$(realpath "$2")
cd "$(dirname "$0")/../../.."
. scripts/environment.sh
here=scripts/checks/clients work=$PWD/build/clients
mkdir -p "$work"

echo "== a model with the true tokenizer and chat template, and random weights: every program's requests, no sense"
[ -d "$work/checkpoint" ] || .venv/bin/python scripts/bench/make_random_checkpoint.py --size tiny --tokenizer real "$work/checkpoint"
[ -d "$work/bundle" ] || .venv/bin/lfm-edge export "$work/checkpoint" -o "$work/bundle" --quiet
echo a-key >"$work/keys"
.venv/bin/lfm-edge serve "$work/bundle" --port 8471 --api-key-file "$work/keys" 2>"$work/serve-key.log" &
.venv/bin/lfm-edge serve "$work/bundle" --port 8472 2>"$work/serve.log" & # Ollama's clients send no key
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
until grep -q "serving at" "$work/serve-key.log" && grep -q "serving at" "$work/serve.log"; do sleep 0.2; done

echo "== Frigate, $(git -C "$frigate" log -1 --format='%h of %cs')"
make_environment "$work/frigate" "$(find_python 3.11)" pydantic ruamel.yaml numpy opencv-python-headless peewee norfair requests \
    openai ollama httpx pytz tzlocal psutil joserfc fastapi pathvalidate shapely scipy unidecode slowapi pywebpush pandas \
    cryptography python-multipart prometheus-client pyzmq titlecase faster-fifo setproctitle google-genai pillow
[ -f "$frigate/frigate/version.py" ] || echo 'VERSION = "source"' >"$frigate/frigate/version.py" # its build makes it
PYTHONPATH=$frigate "$work/frigate/bin/python" $here/frigate_genai.py

echo "== Home Assistant, LLM Vision $(git -C "$llm_vision" log -1 --format='%h of %cs')"
root=$work/debian # Home Assistant takes the newest Python, which Debian's next release has
in_root() { # COMMAND: in the root, with this machine's network
    unshare --mount sh -c 'mount --bind /proc "$0/proc" && mount --bind /dev "$0/dev" && exec chroot "$0" "$@"' "$root" "$@"
}
if [ ! -f "$root/.complete" ]; then
    rm -rf "$root"
    debootstrap --variant=minbase --include=python3-venv,python3-dev,g++,libffi-dev,libturbojpeg0,ca-certificates \
        testing "$root" >"$work/debootstrap.log"
    in_root python3 -m venv /environment
    touch "$root/.complete"
fi
for file in /etc/resolv.conf /etc/pip.conf /root/.config/pip/pip.conf /etc/ssl/certs/ca-certificates.crt; do # pip as it is here
    [ ! -f "$file" ] || { mkdir -p "$root${file%/*}" && cp "$file" "$root$file"; }
done
in_root /environment/bin/pip install --quiet pytest-homeassistant-custom-component boto3==1.37.1 aiosqlite==0.21.0 aiofile==3.9.0
cp $here/home_assistant.py $here/home_assistant_needs.py "$root"
in_root /environment/bin/python /home_assistant_needs.py >"$root/needs.txt"
in_root /environment/bin/pip install --quiet -r /needs.txt
components=$(echo "$root"/environment/lib/python3*/site-packages/pytest_homeassistant_custom_component/testing_config/custom_components)
rm -rf "$components/llmvision" && cp -r "$llm_vision/custom_components/llmvision" "$components"
in_root /environment/bin/python -m pytest -q -p no:cacheprovider --asyncio-mode=auto --rootdir / /home_assistant.py

echo "== Open WebUI"
make_environment "$work/open-webui" "$(find_python 3.11)" torch==2.13.0 open-webui
rm -rf "$work/open-webui-data"
(
    export DATA_DIR=$work/open-webui-data WEBUI_AUTH=False OFFLINE_MODE=True HF_HUB_OFFLINE=1 WEBUI_SECRET_KEY=only-for-this-check-of-clients-here
    export OPENAI_API_BASE_URL=http://127.0.0.1:8471/v1 OPENAI_API_KEY=a-key OLLAMA_BASE_URL=http://127.0.0.1:8472
    export RAG_EMBEDDING_ENGINE=openai ANONYMIZED_TELEMETRY=False DO_NOT_TRACK=true SCARF_NO_ANALYTICS=true
    exec "$work/open-webui/bin/open-webui" serve --host 127.0.0.1 --port 8473 >"$work/open-webui.log" 2>&1
) &
.venv/bin/python $here/open_webui.py
cat "$work/serve-key.log" "$work/serve.log"
echo "all clients were answered"
