#!/bin/sh
# stick.sh STICK PLACE [SIGNERS] : checks a stick, a folder or a tar, on the machine that installs it, before anything of it is run; makes
# PLACE/stick.tar of the files that SHA256SUMS names and of no others; prints its version, and on a line of its own the KiB that it needs
# with what is carried.
set -eu
export LC_ALL=C
stick=$1 place=$2 signers=${3:-}
fail() { printf '%s\n' "$*" >&2 && exit 2; }
no_stick() { fail "$stick is no stick ($1); make one with: lfm-edge stick BUNDLE --target … -o FOLDER"; }

if [ -f "$place/said" ]; then # by another host of the same run
    cat "$place/said"
    exit
fi
rm -rf "$place"
mkdir "$place" "$place/files"
files=$stick
if [ -f "$stick" ]; then
    tar -xf "$stick" -C "$place/files" --strip-components=1 2>/dev/null || no_stick "it is no tar"
    files=$place/files
fi
[ -s "$files/SHA256SUMS" ] || no_stick "it has no SHA256SUMS"
sed -n 's/^[0-9a-f]\{64\}  //p' "$files/SHA256SUMS" >"$place/names"
for name in install.sh stick.conf wheels/requirements.txt; do
    grep -qxF "$name" "$place/names" || no_stick "its SHA256SUMS does not name $name"
done
! grep -qE '^/|(^|/)\.\.(/|$)' "$place/names" || no_stick "it names files outside of itself"
if [ -n "$signers" ]; then
    [ -f "$signers" ] || fail "$signers does not exist; give a file with the allowed signers, as in ssh's allowed_signers"
    [ -f "$files/SHA256SUMS.sig" ] || fail "the stick is not signed; make it with: lfm-edge stick --sign KEY"
    who=$(ssh-keygen -Y find-principals -s "$files/SHA256SUMS.sig" -f "$signers" 2>/dev/null | head -n 1) || true
    [ -n "$who" ] || fail "the stick is not signed by anyone in $signers; do not use it"
    ssh-keygen -Y verify -f "$signers" -I "$who" -n lfm-edge -s "$files/SHA256SUMS.sig" <"$files/SHA256SUMS" >/dev/null 2>&1 ||
        fail "the stick does not match the signature of $who; do not use it"
fi
(cd "$files" && sha256sum -c --strict --quiet SHA256SUMS) >/dev/null 2>&1 || fail "$stick is damaged; make it again"
printf 'SHA256SUMS\n' >>"$place/names"
[ ! -f "$files/SHA256SUMS.sig" ] || printf 'SHA256SUMS.sig\n' >>"$place/names"
tar -chf "$place/stick.tar" -C "$files" --verbatim-files-from -T "$place/names"
sum=$(sha256sum <"$files/SHA256SUMS")
name=$(sed -n 's/^name=//p' "$files/stick.conf") need=$(sed -n 's/^need_kib=//p' "$files/stick.conf")
rm -rf "$place/files"
case $name in */* | '') no_stick "its stick.conf is damaged" ;; esac
case $need in *[!0-9]* | '') no_stick "its stick.conf is damaged" ;; esac
size=$(du -k "$place/stick.tar" | cut -f 1)
printf '%s-%.12s\n%d\n' "$name" "$sum" $((need + 2 * size)) >"$place/said"
cat "$place/said"
