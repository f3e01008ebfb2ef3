# Sourced by run_all.sh, run_tests.sh and .ci/run, from the repository root:
#   set_up FILE...   chooses $python and installs the requirement files that changed since they were last installed.
# The interpreter is $PYTHON if given, else that of the active virtual or conda environment, else python3. If it belongs
# to an environment, that is used as it is; otherwise .venv, made with it once. A stamp in the environment, the hash of
# the requirement file and of the interpreter's version, makes the second time quick.

give_up() {
    echo "$0: $*" >&2
    exit 2
}

check_version() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        give_up "Python 3.11 or newer is needed, but $1 is $("$1" --version 2>&1). PYTHON=/path/to/python $0 names another."
}

make_venv() {
    command -v "$1" >/dev/null || give_up "there is no '$1' here. PYTHON=/path/to/python $0 names an interpreter."
    check_version "$1"
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        give_up "$1 cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)."
    echo "Making .venv with $("$1" --version)" >&2
    "$1" -m venv --clear .venv
}

choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        if "$PYTHON" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then
            python=$PYTHON
            return
        fi
    elif [ -x "${VIRTUAL_ENV:-}/bin/python" ] && [ -n "${VIRTUAL_ENV:-}" ]; then
        python=$VIRTUAL_ENV/bin/python
        return
    elif [ -x "${CONDA_PREFIX:-}/bin/python" ] && [ -n "${CONDA_PREFIX:-}" ]; then
        python=$CONDA_PREFIX/bin/python
        return
    fi
    python=$PWD/.venv/bin/python
    if ! "$python" -c '' 2>/dev/null; then  # there is none yet, or its interpreter is gone
        make_venv "${PYTHON:-python3}"
    elif [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" --version)" != "$("$python" --version)" ]; then
        give_up ".venv holds $("$python" --version), PYTHON is $("$PYTHON" --version). Remove .venv to have it made anew."
    fi
}

stamp_of() {  # the stamp's path, and what it says once this file is installed
    "$python" - "$1" <<'PYTHON_CODE'
import hashlib, pathlib, sys
file = pathlib.Path(sys.argv[1])
print(pathlib.Path(sys.prefix, f".installed-{file.name}"))
print(hashlib.sha256(file.read_bytes() + sys.version.encode()).hexdigest())
PYTHON_CODE
}

set_up() {
    local file stamp hash
    choose_python
    check_version "$python"
    for file in "$@"; do
        { read -r stamp && read -r hash; } < <(stamp_of "$file")
        [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ] && continue
        echo "Installing $file into $(dirname "$stamp") (once; a few minutes)" >&2
        "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >&2
        "$python" -m pip install --quiet --disable-pip-version-check -r "$file" >&2
        echo "$hash" > "$stamp"
    done
}
