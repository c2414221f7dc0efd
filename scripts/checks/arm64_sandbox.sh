#!/usr/bin/env bash
# The installer, the selftest and an answer on 64-bit Arm, emulated: a Debian trixie root for aarch64 with Python alone, entered under
# qemu as a Cortex-A76 (Raspberry Pi 5) and a Cortex-A72 (Raspberry Pi 4), without network. Some minutes on two cores.
#
#   scripts/checks/arm64_sandbox.sh [CPU…]        # cortex-a76 cortex-a72
#   LONG=1 scripts/checks/arm64_sandbox.sh        # the whole selftest of fp32, int8 and int4 on each; else of what suits it, and of the
#                                          # others what can differ on another processor: golden values and answers. Eight minutes beside other tests
#
# Needs root on Linux, debootstrap and qemu-user (installed here with apt), and binfmt_misc; without them it says so and does nothing.
# Everything lies in build/arm64; the root is kept for the next run.
set -euo pipefail
cd "$(dirname "$0")/../.."
cpus=("$@")
[ $# -gt 0 ] || cpus=(cortex-a76 cortex-a72)

skip() {
    echo "skipped: $*"
    exit 0
}
[ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ] || skip "the Arm sandbox needs root on Linux"
command -v apt-get >/dev/null || skip "the Arm sandbox takes its tools from Debian's packages"
if ! command -v debootstrap >/dev/null || ! command -v qemu-aarch64-static >/dev/null; then
    echo "== installing debootstrap, qemu-user-static"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends debootstrap qemu-user-static binfmt-support; } \
        >/dev/null 2>&1 || skip "debootstrap and qemu-user-static could not be installed"
fi
handlers=/proc/sys/fs/binfmt_misc
[ -e $handlers/register ] || mount -t binfmt_misc binfmt_misc $handlers 2>/dev/null || skip "the kernel has no binfmt_misc"
if [ ! -e $handlers/qemu-aarch64 ]; then # F: the emulator is opened now, so that it works in a root that lacks it
    printf '%s' ':qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:'"$(command -v qemu-aarch64-static)":F \
        >$handlers/register 2>/dev/null || skip "the emulator cannot be registered with the kernel"
fi
unshare -m -n true 2>/dev/null || skip "namespaces of its own are not allowed here"

work=build/arm64 root=$PWD/build/arm64/root
mkdir -p "$work"
if [ ! -f "$root/.complete" ]; then
    echo "== a root for aarch64 in $work"
    rm -rf "$root"
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3 trixie "$root" >"$work/debootstrap.log" 2>&1 ||
        { tail -n 3 "$work/debootstrap.log" && exit 1; }
    for package in "$root"/var/cache/apt/archives/*.deb; do # its second stage would run every script of every package, emulated
        dpkg-deb -x "$package" "$root"
    done
    rm "$root"/var/cache/apt/archives/*.deb
    touch "$root/.complete"
fi
# onnxruntime looks into /proc/cpuinfo for what the processor can do, and crashes on what an x86 says there.
cpuinfo() { # PART FEATURES
    for processor in 0 1; do
        printf 'processor\t: %s\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid %s\nCPU implementer\t: 0x41\n' $processor "$2"
        printf 'CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: %s\nCPU revision\t: 1\n\n' "$1"
    done
}
cpuinfo 0xd0b "atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp" >"$work/cortex-a76"
cpuinfo 0xd08 "" >"$work/cortex-a72"

. scripts/environment.sh
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || { python=.venv/bin/python && make_environment .venv "$(find_python)" '.[export,quantize,package]'; }
edge() { "$python" -c 'import sys; from lfm_runtime.commands.cli import main; sys.exit(main(sys.argv[1:]))' "$@"; }

rm -rf "$work"/stick*
stick=$work/stick picture=demo/eval/images/0000.png question="What is in this image?"
echo "== a stick with the demo model"
edge export demo/checkpoint -o "$work/bundle" --quiet
for variant in int8 int4; do
    edge quantize "$work/bundle" --variant $variant --method rtn --quiet >/dev/null
done
printf 'description = "Emulated: a thread more only waits"\nextends = "generic-arm64"\nthreads = 1\nspinning = false\n' >"$work/one-thread.toml"
edge stick "$work/bundle" --target pi5 --variant int8 --profile "$work/one-thread.toml" -o "$stick"
for variant in fp32 int8 int4; do
    edge pack "$work/bundle" --variant $variant --profile "$work/one-thread.toml" -o "$work/$variant.tar" >/dev/null
done
cp -r "$stick" "$stick-int4" # the other processor's: no dot products
cp "$work/int4.tar" "$stick-int4/stick.tar"
sed -i s/^variant=.*/variant=int4/ "$stick-int4/stick.conf"
(cd "$stick-int4" && find . -type f ! -name SHA256SUMS -exec sha256sum {} + | sed 's|  \./|  |' >"../sums" && mv ../sums SHA256SUMS)
ask=(-p "$question" --variant fp32 --temperature 0 --max-new-tokens 16)
LFM_EDGE_PROFILE=generic edge run "$work/bundle" $picture "${ask[@]}" 2>/dev/null >"$work/answer.x86"

on_board() { # CPU COMMAND… : in the root, as that processor, without network
    unshare -m -n sh -eu -c '
        root=$1 cpu=$2 work=$3; shift 3
        mount -t proc proc "$root/proc" && mount --bind "$work/$cpu" "$root/proc/cpuinfo"
        mount --rbind /sys "$root/sys" && mount --rbind /dev "$root/dev" && mkdir -p "$root/media" && mount --bind "$work" "$root/media"
        exec env -i QEMU_CPU="$cpu" HOME=/root PATH=/usr/bin:/usr/sbin LFM_EDGE_PROFILE=/media/one-thread.toml chroot "$root" "$@"
    ' sh "$root" "$1" "$PWD/$work" "${@:2}"
}

differs='import sys; from pathlib import Path; from lfm_audit.selftest import CHECKS, Installed
on = Installed(Path(sys.argv[1]), "/media/one-thread.toml")
for check in CHECKS:
    if check.name in ("golden values", "graphs load", "answers"): print(check.name, check.run(on))'

try() { # CPU: everything that must hold there
    local cpu=$1 prefix=/root/$1 edge=/root/$1/bin/lfm-edge stick=stick others="fp32 int4" variant
    [ "$cpu" != cortex-a72 ] || { stick=stick-int4 && others="fp32 int8"; }
    rm -rf "$root/root/$cpu"
    on_board "$cpu" sh /media/$stick/install.sh --prefix "$prefix" || return
    for variant in $others; do
        on_board "$cpu" $edge unpack /media/$variant.tar -o "$prefix/$variant" || return
        if [ "${LONG:-}" = 1 ]; then
            on_board "$cpu" $edge selftest "$prefix/$variant" || return
        else
            on_board "$cpu" "$prefix/current/venv/bin/python" -c "$differs" "$prefix/$variant" || return
        fi
    done
    on_board "$cpu" $edge run "$prefix/fp32" /media/picture.png "${ask[@]}" >"$work/answer.$cpu" || return
    cmp "$work/answer.x86" "$work/answer.$cpu" || return
    echo "$cpu says what x86 says: $(cat "$work/answer.$cpu")"
}

cp $picture "$work/picture.png"
for cpu in "${cpus[@]}"; do # on a core each
    { try "$cpu" >"$work/$cpu.log" 2>&1 && echo ok >"$work/$cpu.result" || echo failed >"$work/$cpu.result"; } &
done
wait
for cpu in "${cpus[@]}"; do
    echo "== $cpu: $(cat "$work/$cpu.result")"
    cat "$work/$cpu.log"
done
! grep -qx failed $(printf "$work/%s.result " "${cpus[@]}")
