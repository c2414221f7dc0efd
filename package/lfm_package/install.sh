#!/bin/sh
# Installs the model and the runtime that lie beside this script: no network, no root, nothing outside of one folder.
#
#   sh install.sh [--prefix FOLDER] [--signers FILE]     install, prepare for this processor, test, then make it the current version
#   sh install.sh [--prefix FOLDER] --rollback           back to the previous version; run it again to undo
#   sh install.sh [--prefix FOLDER] --uninstall          remove everything this script made
#
# FOLDER/bin/lfm-edge-install is a copy of this script for later use: it needs no --prefix, and installs a stick with --stick FOLDER. If
# signatures matter, use that copy: nobody checks a stick's own install.sh.
#
# FOLDER/profile.toml, where you put one, is taken before the profile that came with a stick, by every version.
# FOLDER/versions/NAME-HASH holds one version each (an environment, the bundle, its prepared graphs); the links FOLDER/current and
# FOLDER/previous name two of them. `current` is switched by one rename, after everything else is on disk: whenever this is killed or
# the power fails, the old version works, and the next run removes what was left half done.
set -eu
umask 022
unset PYTHONPATH PYTHONHOME 2>/dev/null || true

say() { printf '%s\n' "$*"; }
quote() { printf '%s' "$1" | sed "s/'/'\\\\''/g"; } # for a text between ' and '
word() { # PATH: as one word of a command to be typed
    case $1 in
    *[!A-Za-z0-9_./-]*) printf "'%s'" "$(quote "$1")" ;;
    *) printf '%s' "$1" ;;
    esac
}
fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 2
}

stick=$(cd "$(dirname "$0")" && pwd)
prefix=${XDG_DATA_HOME:-${HOME:-}/.local/share}/lfm-edge
[ ! -f "${stick%/bin}/.lfm-edge" ] || prefix=${stick%/bin}
action=install signers=
newline='
'
while [ $# -gt 0 ]; do
    case $1 in
    --prefix | --signers | --stick)
        [ -n "${2:-}" ] || fail "$1 needs a value; see: sh install.sh --help"
        case $2 in /*) value=$2 ;; *) value=$(pwd)/$2 ;; esac
        case $1 in --prefix) prefix=$value ;; --signers) signers=$value ;; --stick) stick=$value ;; esac
        shift
        ;;
    --rollback | --uninstall) action=${1#--} ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) fail "$1 is unknown; see: sh install.sh --help" ;;
    esac
    shift
done
[ "$prefix" != /.local/share/lfm-edge ] || fail "HOME is not set; name a folder with --prefix"

# ------------------------------------------------------------------------------------------------ versions and links

version_of() { # the version that a link names; nothing where there is none
    link=$(readlink "$prefix/$1" 2>/dev/null) || return 0
    [ -f "$prefix/$link/complete" ] && say "${link#versions/}" || true
}
switch() { # LINK VERSION: from one moment to the next
    rm -f "$prefix/.$1.new"
    ln -s "versions/$2" "$prefix/.$1.new"
    mv -fT "$prefix/.$1.new" "$prefix/$1"
    sync
}
discard() { # a version; it does not count as one from the first moment
    [ ! -f "$prefix/versions/$1/complete" ] || : >"$prefix/versions/$1/.lfm-edge"
    rm -f "$prefix/versions/$1/complete"
    rm -rf "$prefix/versions/$1/venv" "$prefix/versions/$1/bundle.prepared"
    if [ -f "$prefix/versions/$1/bundle/SHA256SUMS" ]; then # whatever else lies there is somebody's
        sed -n 's/^[0-9a-f]\{64\}  //p' "$prefix/versions/$1/bundle/SHA256SUMS" | while IFS= read -r file; do
            case $file in /* | *..*) ;; *) rm -f "$prefix/versions/$1/bundle/$file" ;; esac
        done
        rm -f "$prefix/versions/$1/bundle/SHA256SUMS" "$prefix/versions/$1/bundle/SHA256SUMS.sig"
        find "$prefix/versions/$1/bundle" -depth -type d -exec rmdir {} \; 2>/dev/null || true
    fi
    rm -rf "$prefix/versions/$1/.bundle".* # what was left half done
    rm -f "$prefix/versions/$1/.lfm-edge"
    rmdir "$prefix/versions/$1" 2>/dev/null || true
}
is_version() { # whether this script made a folder of versions, whole or not
    [ -f "$prefix/versions/$1/complete" ] || [ -f "$prefix/versions/$1/.lfm-edge" ]
}
lock() { # held until this process and what it started end
    { [ -w "$prefix" ] && (: >>"$prefix/.lock") 2>/dev/null; } ||
        fail "$prefix cannot be changed by $(id -un); run this as $(stat -c %U "$prefix"), whose folder it is"
    exec 9>"$prefix/.lock"
    if command -v flock >/dev/null 2>&1; then
        flock -n 9 || fail "$prefix is being changed by another install.sh; wait for it"
    fi
}
ours() { [ -f "$prefix/.lfm-edge" ] || fail "nothing is installed in $prefix; name the folder with --prefix"; }
other_than() { # the newest whole version but this one
    ls -t "$prefix/versions" | while IFS= read -r folder; do
        [ "$folder" = "$1" ] || [ ! -f "$prefix/versions/$folder/complete" ] || { say "$folder" && break; }
    done
}

rollback() {
    ours
    lock
    now=$(version_of current) before=$(version_of previous)
    if [ -z "$before" ] || [ "$before" = "$now" ]; then # the power failed between two switches
        before=$(other_than "$now")
    fi
    [ -n "$before" ] || fail "there is no version before ${now:-this one} in $prefix"
    switch current "$before"
    [ -z "$now" ] || switch previous "$now"
    say "$prefix runs $before now"
}

uninstall() {
    ours
    lock
    rm -f "$prefix/current" "$prefix/previous" "$prefix/.current.new" "$prefix/.previous.new" "$prefix/bin/lfm-edge" "$prefix/signers"
    rm -f "$prefix/.checked" # by those who install on many boards
    rm -f "$prefix/bin/lfm-edge-install" "$prefix/bin/.lfm-edge.new" "$prefix/bin/.lfm-edge-install.new" "$prefix/.signers.new"
    for folder in "$prefix"/versions/*; do
        ! is_version "${folder##*/}" || discard "${folder##*/}"
    done
    rm -f "$prefix/.lock" "$prefix/.lfm-edge"
    rmdir "$prefix/versions" 2>/dev/null || true
    rmdir "$prefix/bin" "$prefix" 2>/dev/null || true
    if [ ! -d "$prefix" ]; then
        say "$prefix is removed"
    elif [ -z "$(ls -A "$prefix")" ]; then
        say "what was installed in $prefix is removed; the empty folder stays"
    else
        say "what was installed in $prefix is removed; other files are still there"
    fi
}

# ------------------------------------------------------------------------------------------------ before anything is written

listed() { sed -n "s|^[0-9a-f]\{64\}  \($1\)\$|\1|p" "$stick/SHA256SUMS"; } # names in SHA256SUMS
setting() { sed -n "s/^$1=//p" "$stick/stick.conf"; }

check_stick() { # every file, then who signed
    for file in SHA256SUMS stick.conf; do
        [ -s "$stick/$file" ] || fail "$stick/$file is missing: this is not a stick of lfm-edge, or is half copied; copy it again"
    done
    for number in glibc_minor need_kib; do
        case $(setting $number) in '' | *[!0-9]* | ?????????????*) fail "$stick/stick.conf is damaged ($number); copy the stick again" ;; esac
    done
    command -v sha256sum >/dev/null 2>&1 || fail "sha256sum is missing; install coreutils"
    said=$(cd "$stick" && LC_ALL=C sha256sum -c --strict SHA256SUMS 2>&1) ||
        fail "$stick is half copied or damaged ($(say "$said" | grep -v ': OK$' | head -n 1)); copy it again"
    pip=$(listed 'wheels/pip-[^/]*\.whl')
    archive=$(setting name).tar
    for file in stick.conf install.sh wheels/requirements.txt "${pip:-wheels/pip}"; do # what is used must be summed
        [ "$(listed "$file")" = "$file" ] || fail "$stick/SHA256SUMS does not name $file: this is not a stick of lfm-edge; copy it again"
    done
    [ "$(listed "$archive")$(listed "$archive\.000")" ] || fail "$stick/SHA256SUMS does not name $archive; copy the stick again"
    [ -n "$signers" ] || { [ -f "$prefix/signers" ] && signers=$prefix/signers; } || return 0
    [ -f "$signers" ] || fail "$signers does not exist; give a file with the allowed signers, as in ssh's allowed_signers"
    command -v ssh-keygen >/dev/null 2>&1 || fail "signatures need ssh-keygen; install it: sudo apt install openssh-client"
    [ -f "$stick/SHA256SUMS.sig" ] || fail "$stick is not signed, but $signers requires a signature; make the stick with: lfm-edge stick --sign KEY"
    who=$(ssh-keygen -Y find-principals -s "$stick/SHA256SUMS.sig" -f "$signers" 2>/dev/null | head -n 1) || true
    [ -n "$who" ] || fail "$stick is not signed by anyone in $signers; do not use it"
    ssh-keygen -Y verify -f "$signers" -I "$who" -n lfm-edge -s "$stick/SHA256SUMS.sig" <"$stick/SHA256SUMS" >/dev/null 2>&1 ||
        fail "$stick does not match $who's signature; do not use it"
    say "signed by $who"
}

check_machine() { # sets $python
    wanted=$(setting machine) target=$(setting target) version=$(setting python) glibc=$(setting glibc_minor)
    case $(uname -m) in arm* | i?86) fail "this system is 32-bit ($(uname -m)); there are no wheels for it: install the 64-bit system" ;; esac
    [ "$(uname -m)" = "$wanted" ] || fail "this stick is for $target ($wanted), this machine is $(uname -m); make one with: lfm-edge stick BUNDLE --target … -o FOLDER"
    found=
    for python in "python$version" python3; do
        command -v "$python" >/dev/null 2>&1 || continue
        found=$("$python" -I -c 'import struct, sys; print("%d.%d" % sys.version_info[:2], 8 * struct.calcsize("P"))' 2>/dev/null) || found=
        [ "$found" != "$version 64" ] || break
    done
    case $found in
    "$version 64") ;;
    *" 32") fail "this system is 32-bit; there are no wheels for it: install the 64-bit system (Raspberry Pi OS 64-bit)" ;;
    "") fail "there is no Python $version here; install it: sudo apt install python3" ;;
    *) fail "this stick is for Python $version, but this system has ${found% *}; make one with: lfm-edge stick BUNDLE --target $target --python ${found% *} -o FOLDER" ;;
    esac
    have=$("$python" -I -c 'import platform; print(*platform.libc_ver())')
    case $have in
    "glibc 2."*) [ "${have#glibc 2.}" -ge "$glibc" ] || fail "this system has $have, the wheels need 2.$glibc; install a newer system" ;;
    *) fail "this system has no glibc (musl?); the wheels need glibc 2.$glibc" ;;
    esac
}

check_space() { # of the disk that the folder is, or will be, on
    free=$(df -Pk "$place" 2>/dev/null | tail -n 1 | sed 's/.* \([0-9][0-9]*\) \{1,\}[0-9-]*% .*/\1/')
    case $free in '' | *[!0-9]*) return 0 ;; esac # what has no size, as /proc, says so when it is written
    free=$((free / 1024))
    needed=$((($(setting need_kib) + 1023) / 1024))
    [ "$free" -ge "$needed" ] || fail "$prefix has $free MiB free, $needed are needed: $((needed - free)) MiB more; free some space, or name another disk with --prefix"
}

# ------------------------------------------------------------------------------------------------ the installation

fill() { # FOLDER: environment, bundle, prepared graphs, all tested
    say "installing the runtime into $1"
    "$python" -I -m venv --without-pip "$1/venv"
    "$1/venv/bin/python" -I "$stick/$pip/pip" --isolated install --quiet --disable-pip-version-check --no-cache-dir --no-index \
        --find-links "$stick/wheels" --require-hashes -r "$stick/wheels/requirements.txt"
    edge=$1/venv/bin/lfm-edge variant=$(setting variant) prefill=$(setting prefill)
    "$edge" unpack "$stick/$(setting name).tar" -o "$1/bundle"
    "$edge" prepare "$1/bundle" --variant "$variant" ${prefill:+--prefill "$prefill"}
    LFM_EDGE_PROFILE=
    for profile in "$1/bundle/profile.toml" "$prefix/profile.toml"; do
        [ ! -f "$profile" ] || LFM_EDGE_PROFILE=$profile
    done
    export LFM_EDGE_PROFILE
    say "testing it: on a small board and with a large model this takes minutes"
    status=0
    "$edge" selftest "$1/bundle" || status=$?
    case $status in
    0) ;;
    3) say "warning: it works, but a budget of the profile is exceeded or the board is throttled ; the lines above say which, and what helps" ;;
    *) return 1 ;;
    esac
}

commands() { # this script; and lfm-edge of the current version, with the board's or the stick's profile unless another is named
    quoted=$(quote "$prefix")
    mkdir -p "$prefix/bin"
    cat >"$prefix/bin/.lfm-edge.new" <<END
#!/bin/sh
current='$quoted/current'
for profile in '$quoted/profile.toml' "\$current/bundle/profile.toml"; do
    [ ! -f "\$profile" ] || export LFM_EDGE_PROFILE="\${LFM_EDGE_PROFILE-\$profile}"
done
exec "\$current/venv/bin/lfm-edge" "\$@"
END
    cp "$stick/install.sh" "$prefix/bin/.lfm-edge-install.new"
    for file in lfm-edge lfm-edge-install; do
        [ ! -f "$prefix/bin/.$file.new" ] || { chmod 755 "$prefix/bin/.$file.new" && mv -f "$prefix/bin/.$file.new" "$prefix/bin/$file"; }
    done
}

give_up() { # STATUS: what was begun is removed; 130 where the user, or the system, ended it
    discard "$id"
    [ "$1" = 130 ] || fail "$id could not be installed; still installed: ${before:-nothing}"
    say "install.sh: interrupted; still installed: ${before:-nothing}" >&2
    exit 130
}

install() {
    [ "$stick" != "$prefix/bin" ] || fail "which stick? name its folder: '$(quote "$0")' --stick FOLDER"
    check_stick
    check_machine
    case $prefix in # the launchers of Python's packages are scripts with this path between double quotes
    *[\"\$\`\\]* | *"$newline"*) fail "the folder to install in has \" \$ \` \\ or a line break in its name, with which programs there would not start; name another one with --prefix" ;;
    esac
    id=$(setting name)-$(sha256sum "$stick/SHA256SUMS" | cut -c1-12)
    place=$prefix
    while [ ! -e "$place" ]; do place=$(dirname "$place"); done
    [ -d "$place" ] || fail "$place is a file; name another folder with --prefix"
    [ -d "$prefix" ] || check_space
    if [ ! -f "$prefix/.lfm-edge" ]; then # what this script would replace must be its own
        for file in versions current previous .lock bin/lfm-edge bin/lfm-edge-install; do
            { [ ! -e "$prefix/$file" ] && [ ! -L "$prefix/$file" ]; } || fail "$prefix/$file was not made by this script; name another folder with --prefix"
        done
    fi
    { mkdir -p "$prefix" && touch "$prefix/.lfm-edge" && mkdir -p "$prefix/versions"; } 2>/dev/null && [ -w "$prefix/versions" ] ||
        fail "$prefix cannot be written by $(id -un); name another folder with --prefix"
    lock
    cd "$prefix" # nothing of the folder that this is started in may be imported
    for folder in "$prefix"/versions/*; do # what was left half done
        [ -f "$folder/complete" ] || ! is_version "${folder##*/}" || discard "${folder##*/}"
    done
    before=$(version_of current)
    if [ -f "$prefix/versions/$id/complete" ]; then
        if ! said=$("$prefix/versions/$id/venv/bin/lfm-edge" verify "$prefix/versions/$id/bundle" 2>&1); then
            case $said in Traceback*) said=$(say "$said" | tail -n 1) ;; esac
            say "$id is damaged ($(say "$said" | head -n 1)); installing it again"
            if [ "$before" = "$id" ]; then # until that is done, the other version runs, if there is one
                before=$(other_than "$id")
                [ -z "$before" ] || switch current "$before"
            fi
            discard "$id"
        fi
    fi
    if [ ! -f "$prefix/versions/$id/complete" ]; then
        check_space
        trap 'give_up "$?"' EXIT
        trap 'exit 130' INT TERM HUP
        mkdir "$prefix/versions/$id"
        : >"$prefix/versions/$id/.lfm-edge"
        fill "$prefix/versions/$id"
        sync
        : >"$prefix/versions/$id/complete"
        sync
        trap - EXIT INT TERM HUP
    fi
    if [ "$signers" ] && [ "$signers" != "$prefix/signers" ]; then # later sticks must be signed as well
        cp "$signers" "$prefix/.signers.new"
        mv -f "$prefix/.signers.new" "$prefix/signers"
    fi
    commands
    if [ "$before" = "$id" ]; then
        say "$id is installed already"
    else
        [ -z "$before" ] || switch previous "$before"
        switch current "$id"
        say "installed $id in $prefix${before:+; back to $before: $(word "$prefix/bin/lfm-edge-install") --rollback}"
    fi
    for folder in "$prefix"/versions/*; do
        kept=${folder##*/}
        [ "$kept" = "$id" ] || [ "$kept" = "$(version_of previous)" ] || ! is_version "$kept" || discard "$kept"
    done
    say "try: $(word "$prefix/bin/lfm-edge") run $(word "$prefix/current/bundle") photo.jpg -p 'What is in this image?'"
}

"$action"
