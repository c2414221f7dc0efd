# Sourced by demo.sh and test.sh.

# The first Python from 3.10 up, by the names systems give it; PYTHON overrides.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "lfm-edge needs Python 3.10 or newer with venv (Debian: apt install python3-venv); found none" >&2
    return 1
}

# make_environment FOLDER REQUIREMENT… : a virtual environment with the packages, made anew when the wanted set changes.
make_environment() {
    local folder=$1 stamp="$1/.wanted" wanted
    shift
    wanted="$* $(cksum <pyproject.toml)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "== making $folder"
        local python
        python=$(find_python)
        [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${@/#./-e.}"
        echo "$wanted" >"$stamp"
    fi
}
