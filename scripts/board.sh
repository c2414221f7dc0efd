# Sourced by install_raspberry_pi.sh and install_jetson.sh: what both check, and what the usual failures mean. POSIX sh.
# shellcheck shell=sh
# LFM_EDGE_ROOT is the root of a recorded tree of another board, for tests.

say() { printf '%s\n' "$*"; }
fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

board_file() { # PATH : its text, without the NUL bytes of device trees
    [ ! -r "${LFM_EDGE_ROOT:-}/$1" ] || tr -d '\000' <"${LFM_EDGE_ROOT:-}/$1"
}

check_bits() {
    case $(uname -m) in
    aarch64 | arm64) ;;
    arm*) fail "this system is 32-bit ($(uname -m)): onnxruntime, numpy and pillow have no wheels for it. Install the 64-bit system" ;;
    *) fail "this machine is $(uname -m), not 64-bit Arm; see README.md for PCs and servers" ;;
    esac
}

find_python() { # sets $python and $version; the newest that onnxruntime has wheels for
    found=
    for python in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
        command -v "$python" >/dev/null 2>&1 || continue
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        found="$found $version"
        case $version in 3.1[0-9]) break ;; esac
        version=
    done
    [ "${version:-}" ] || fail "lfm-edge needs Python 3.10 or newer; found:${found:- none}. ${1:-Install it: sudo apt install python3 python3-venv}"
    [ "$("$python" -c 'import struct; print(8 * struct.calcsize("P"))')" = 64 ] ||
        fail "this Python is 32-bit, on a 64-bit kernel: onnxruntime, numpy and pillow have no wheels for it. Install the 64-bit system"
}

explain() { # LOG STATUS : the cause and the fix of a failure that is known; else the last line
    if [ "$2" = 132 ] || grep -q 'Illegal instruction' "$1"; then
        say "onnxruntime uses an instruction this processor lacks (1.21.0 does on Cortex-A53 and A72). Fix: pip install 'onnxruntime!=1.21.0'"
    elif grep -q 'GLIBCXX_' "$1"; then
        say "the system's C++ library is too old for onnxruntime's wheel (JetPack 5, Ubuntu 20.04). Fix: install JetPack 6 or newer"
    elif grep -q 'externally-managed-environment' "$1"; then
        say "this system's own Python must not be changed with pip. Fix: a virtual environment, as this script makes one: unset PIP_TARGET, PIP_USER"
    elif grep -q 'no kernel image' "$1"; then
        say "the GPU wheel has no code for this GPU. Fix: pip uninstall -y onnxruntime-gpu; pip install onnxruntime"
    elif grep -q -i 'not a supported wheel' "$1"; then
        say "a wheel is for another Python or processor. Fix: make the wheels again with lfm-edge wheelhouse, for the Python version that python3 --version prints"
    elif grep -q -i -E 'name resolution|connection|timed out|network is unreachable' "$1"; then
        say "the package index cannot be reached. Fix: check the network, or install from a stick: lfm-edge stick on a PC"
    elif grep -q 'No matching distribution' "$1"; then
        say "$(grep 'No matching distribution' "$1" | head -n 1 | sed 's/^ERROR: //'): no wheel for this Python ($version) on $(uname -m). Fix: a 64-bit system with Python 3.11 or newer"
    elif grep -q 'No space left' "$1"; then
        say "the disk is full. Fix: free 400 MB, or clone to another disk"
    elif grep -q -E 'ensurepip|No module named (venv|pip)' "$1"; then
        say "Python cannot make environments here. Fix: sudo apt install python3-venv"
    else
        say "$(tail -n 1 "$1"). The whole output is in $1"
    fi
}

try() { # COMMAND… : quietly; a failure is explained
    log=$(mktemp)
    status=0
    "$@" >"$log" 2>&1 || status=$?
    [ "$status" = 0 ] || fail "$(explain "$log" "$status")"
    rm -f "$log"
}

install_runtime() { # REQUIREMENT… : into .venv of this clone
    say "installing the runtime into .venv (about 200 MB)"
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # also where venv was cut off half-way
        rm -rf .venv
        try "$python" -m venv .venv
    fi
    try .venv/bin/python -m pip install --disable-pip-version-check --only-binary numpy,onnxruntime,pillow -e . "$@"
    try .venv/bin/python -c 'import os; os.environ["ORT_DISABLE_TELEMETRY"] = "1"; import numpy, onnxruntime, PIL, psutil'
    .venv/bin/lfm-edge doctor || say "fix the problems above"
    say "next: copy a bundle here, then: .venv/bin/lfm-edge prepare BUNDLE && .venv/bin/lfm-edge run BUNDLE photo.jpg -p 'What is in this image?'"
}
