#!/bin/sh
# The runtime on a Jetson with a network, from a clone; on its CPU. Without network: sh STICK/install.sh (see docs/jetson.md).
#
#   scripts/install_jetson.sh            # check the board, make .venv, install, doctor
#   scripts/install_jetson.sh --check    # check the board
set -eu
cd "$(dirname "$0")/.."
. scripts/board.sh

model=$(board_file proc/device-tree/model)
release=$(board_file etc/nv_tegra_release | sed -n 's/^# R\([0-9]*\) .*REVISION: \([0-9.]*\).*/\1.\2/p')
case $model in
*"Raspberry Pi"*) fail "this is ${model}, not a Jetson; use scripts/install_raspberry_pi.sh" ;;
esac
[ "$release" ] || fail "this is ${model:-no board with a device tree}: /etc/nv_tegra_release is missing, so it is not a Jetson with JetPack; see README.md"
check_bits
case $release in
32.*) fail "L4T $release is JetPack 4 (Python 3.6): too old for onnxruntime. Install JetPack 6; a Nano, TX1 or TX2 has none and cannot run lfm-edge" ;;
34.* | 35.*) fail "L4T $release is JetPack 5 (Python 3.8, GLIBCXX older than 3.4.29): too old. Install JetPack 6; a Xavier has none and cannot run lfm-edge" ;;
36.*) jetpack=6 pin=onnxruntime==1.23.2 ;; # the newest for Python 3.10
*) jetpack=7 pin= ;;
esac
find_python "JetPack $jetpack brings one: sudo apt install python3 python3-venv"
[ "$version" = 3.10 ] || pin=
say "${model:-Jetson}, JetPack $jetpack (L4T $release), Python $version"
[ "${1:-}" = --check ] || install_runtime ${pin:+"$pin"}
