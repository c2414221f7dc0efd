#!/usr/bin/env bash
# `lfm-edge watch /dev/video0` with a real Video4Linux device: a virtual machine with Debian's kernel and its test driver vivid, on this
# machine's files (read-only). Pictures are asked about, the camera is unplugged and is there again, Ctrl-C ends it.
#
#   scripts/checks/usb_camera.sh          # two minutes; the processor is emulated
#
# Needs root on Debian (x86-64), an environment in .venv with the extra video, and the network for Debian's packages
# (qemu-system-x86, cpio, kmod, v4l-utils; a kernel and busybox, which are only unpacked). Everything lies in build/usb-camera.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=$PWD work=$PWD/build/usb-camera edge=$PWD/.venv/bin/lfm-edge

skip() { echo "skipped: $*" && exit 0; }
[ "$(uname -sm)" = "Linux x86_64" ] && [ "$(id -u)" = 0 ] || skip "the camera check needs root on x86-64 Linux"
command -v apt-get >/dev/null || skip "the camera check takes its tools from Debian's packages"
mkdir -p "$work"
if ! command -v qemu-system-x86_64 >/dev/null || ! command -v v4l2-ctl >/dev/null || ! command -v cpio >/dev/null || ! command -v modprobe >/dev/null; then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends qemu-system-x86 cpio kmod v4l-utils; } >/dev/null ||
        skip "qemu-system-x86, cpio, kmod and v4l-utils could not be installed"
fi
if [ ! -f "$work/.complete" ]; then
    package=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-.*-amd64\)$/\1/p' | head -n 1)
    (cd "$work" && apt-get download -qq "$package" busybox-static && for file in *.deb; do dpkg-deb -x "$file" files; done)
    touch "$work/.complete"
fi
kernel=$(basename "$work"/files/boot/vmlinuz-*)
version=${kernel#vmlinuz-}
depmod -b "$work/files" "$version"
[ -f "$work/bundle/manifest.json" ] || "$edge" export demo/checkpoint -o "$work/bundle" --quiet

rm -rf "$work/first" && mkdir -p "$work"/first/{bin,proc,sys,dev,lower,upper,new}
cp "$work/files/bin/busybox" "$work/first/bin/"
for module in virtio_pci 9p 9pnet_virtio overlay vivid; do
    modprobe -d "$work/files" -S "$version" --show-depends $module
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r file; do
    cp "$file" "$work/first/" && basename "$file" >>"$work/first/modules"
done
cat >"$work/first/init" <<END
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc && /bin/busybox mount -t sysfs sys /sys && /bin/busybox mount -t devtmpfs dev /dev
for module in \$(/bin/busybox cat /modules); do
    case \$module in vivid.ko*) more="n_devs=1 node_types=0x1" ;; *) more= ;; esac # one camera, nothing else
    /bin/busybox insmod /\$module \$more
done
/bin/busybox mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=524288,cache=loose host /lower
/bin/busybox mount -t tmpfs tmpfs /upper && /bin/busybox mkdir /upper/files /upper/work
/bin/busybox mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /new
/bin/busybox mount --move /dev /new/dev && /bin/busybox mount -t tmpfs tmpfs /new/run
/bin/busybox mount -t proc proc /new/proc && /bin/busybox mount -t sysfs sys /new/sys
exec /bin/busybox switch_root /new /bin/bash "$work/inside.sh"
END
chmod +x "$work/first/init"
(cd "$work/first" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/first.gz"

cat >"$work/inside.sh" <<END
export PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LFM_EDGE_PROFILE=generic PYTHONFAULTHANDLER=1
cd "$here"
records() { wc -l </run/out.jsonl; }
until_there_are() { for n in \$(seq 150); do [ "\$(records)" -lt "\$1" ] || return 0; sleep 1; done; echo "there are no \$1 records"; }
: >/run/out.jsonl
"$edge" watch "$work/bundle" /dev/video0 -p What? --every 1s --stall 5s --max-new-tokens 2 \
    --min-image-tokens 4 --max-image-tokens 16 --no-do-image-splitting >/run/out.jsonl 2>/run/err &
until_there_are 2
v4l2-ctl -d /dev/video0 -c disconnect=1
until_there_are 6
kill -INT \$!
wait \$! && ended=0 || ended=\$?
cut -c1-250 /run/out.jsonl; cat /run/err
grep -q '"event": "lost"' /run/out.jsonl && grep -q '"event": "back"' /run/out.jsonl && [ \$ended = 0 ] && echo "CAMERA OK" || echo "CAMERA FAILED (\$ended)"
echo o >/proc/sysrq-trigger; sleep 10
END
timeout 590 qemu-system-x86_64 -accel tcg -cpu Nehalem -smp 2 -m 4096 -nographic -no-reboot -nic none \
    -kernel "$work/files/boot/$kernel" -initrd "$work/first.gz" -append "console=ttyS0 quiet panic=-1" \
    -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap >"$work/log" 2>&1 || true
sed -n '/^{"time"/,$p' "$work/log"
grep -q "CAMERA OK" "$work/log"
