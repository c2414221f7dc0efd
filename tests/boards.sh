#!/bin/sh
# boards.sh NAME ADDRESS KEYS PYTHON OPT_MIB : a Debian of its own on 127.0.0.x, with systemd and OpenSSH's server, until it is killed.
#
# Its disk is this machine's, seen through an overlay in memory: what it writes is its own, and gone with it. Mounts are seen by these
# processes alone. PYTHON is its only one, as python3 and python3.N; /opt has OPT_MIB MiB; pi may become root.
set -eu
name=$1 address=$2 keys=$3 python=$4 size=$5
[ -n "${BOARD_ALONE:-}" ] || exec env BOARD_ALONE=1 unshare --mount --pid --mount-proc --fork --kill-child --propagation private sh "$0" "$@"

room=/mnt # nobody else sees what is mounted here
mount -t tmpfs -o size=2g none "$room"
mkdir "$room/up" "$room/work" "$room/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$room/up,workdir=$room/work" "$room/root"
cd "$room/root"
rm -rf etc/systemd/system/*.wants opt var/log/journal
mkdir -p etc/systemd/system/multi-user.target.wants etc/ssh/sshd_config.d opt usr/local/bin home/pi/.ssh
ln -s /lib/systemd/system/ssh.service etc/systemd/system/multi-user.target.wants/
echo "$name" >etc/hostname
echo "$address $name" >>etc/hosts
tr -d - </proc/sys/kernel/random/uuid >etc/machine-id # without one systemd would enable every service
printf 'ListenAddress %s\nPort 2222\nUseDNS no\n' "$address" >etc/ssh/sshd_config.d/board.conf
ssh-keygen -A -f "$room/root" >/dev/null
grep -q '^pi:' etc/passwd || chroot . useradd --home-dir /home/pi --shell /bin/sh pi
echo 'pi ALL=(ALL) NOPASSWD: ALL' >etc/sudoers.d/pi
cp "$keys" home/pi/.ssh/authorized_keys
chroot . chown -R pi home/pi
chmod 700 home/pi home/pi/.ssh
chmod o+x root # where PYTHON may lie
for other in usr/bin/python3 usr/bin/python3.* usr/local/bin/python3 usr/local/bin/python3.*; do
    [ "/$other" = "$python" ] || rm -f "$other"
done
for link in python3 "${python##*/}"; do [ -e "usr/local/bin/$link" ] || ln -s "$python" "usr/local/bin/$link"; done
exec systemd-nspawn --quiet --directory="$room/root" --boot --register=no --keep-unit --console=read-only \
    --tmpfs="/opt:mode=755,size=${size}m" systemd.unit=multi-user.target
