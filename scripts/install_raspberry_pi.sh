#!/bin/sh
# The runtime on a Raspberry Pi with a network, from a clone. Without network: sh STICK/install.sh (see docs/raspberry-pi.md).
#
#   scripts/install_raspberry_pi.sh            # check the board, make .venv, install, doctor
#   scripts/install_raspberry_pi.sh --check    # check the board
set -eu
cd "$(dirname "$0")/.."
. scripts/board.sh

model=$(board_file proc/device-tree/model)
case $model in
*"Raspberry Pi Zero 2"* | *"Raspberry Pi 3"* | *"Raspberry Pi 4"* | *"Raspberry Pi 5"* | *"Raspberry Pi Compute Module "[345]*) ;;
*"Raspberry Pi"*) fail "$model has a 32-bit processor; a Raspberry Pi 3, 4, 5 or Zero 2 W is needed" ;;
*NVIDIA* | *Jetson*) fail "this is ${model}, not a Raspberry Pi; use scripts/install_jetson.sh" ;;
*) fail "this is ${model:-no board with a device tree}, not a Raspberry Pi; see README.md for other machines" ;;
esac
check_bits
find_python "Raspberry Pi OS bookworm or trixie has one: install it anew, 64-bit"
say "$model, Python $version"
kib=$(board_file proc/meminfo | sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p')
[ "${kib:-9999999}" -ge 900000 ] || say "warning: $((kib / 1024)) MiB of memory; see what fits: lfm-edge plan BUNDLE photo.jpg"
[ "${1:-}" = --check ] || install_runtime
