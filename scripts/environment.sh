# Sourced by demo.sh and test.sh.

# find_python [MAJOR.MINOR] : a Python that can make environments, of that version or else from 3.10 up; PYTHON is tried first.
find_python() {
    local wanted=${1:-} candidate check
    check="import sys, venv, ensurepip; v = sys.version_info[:2]; sys.exit(v < (3, 10) or '$wanted' not in ('', '%d.%d' % v))"
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1*/bin/python; do
        if "$candidate" -c "$check" 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

# make_environment FOLDER PYTHON PACKAGE… : a virtual environment with the packages; nothing is done when it has them already.
# A package that starts with a dot is this clone, installed in place.
make_environment() {
    local folder=$1 python=$2 wanted
    shift 2
    wanted="$* $(cksum <pyproject.toml)"
    grep -qxF "$wanted" "$folder/.wanted" 2>/dev/null && return
    echo "== installing into $folder: $*"
    "$folder/bin/python" -m pip --version >/dev/null 2>&1 || { rm -rf "$folder" && "$python" -m venv "$folder"; }
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${@/#./-e.}"
    echo "$wanted" >>"$folder/.wanted"
}
