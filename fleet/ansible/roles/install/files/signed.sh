#!/bin/sh
# signed.sh STICK SIGNERS : whether one of the signers signed the stick, before anything of it is run.
set -eu
fail() { printf '%s\n' "$1" >&2 && exit 2; }
[ -f "$2" ] || fail "$2 does not exist; give a file with the allowed signers, as in ssh's allowed_signers"
[ -f "$1/SHA256SUMS.sig" ] || fail "the stick is not signed; make it with: lfm-edge stick --sign KEY"
who=$(ssh-keygen -Y find-principals -s "$1/SHA256SUMS.sig" -f "$2" 2>/dev/null | head -n 1) || true
[ -n "$who" ] || fail "the stick is not signed by anyone in $2"
ssh-keygen -Y verify -f "$2" -I "$who" -n lfm-edge -s "$1/SHA256SUMS.sig" <"$1/SHA256SUMS" >/dev/null 2>&1 ||
    fail "the stick does not match the signature of $who"
(cd "$1" && LC_ALL=C sha256sum -c --strict --quiet SHA256SUMS) >&2 || fail "the stick is damaged; make it again"
