#!/usr/bin/env bash
# Makes .venv in the repository root with this package in it (editable) and the versions of constraints.txt.
#
#   launch/venv.sh              the package
#   launch/venv.sh test         the package and what its tests need
#   PYTHON=python3.12 launch/venv.sh    made with that interpreter instead of python3
#
# Says nothing and returns at once when .venv is already what the files ask for. Safe to interrupt, and safe
# to start twice at a time. Needs python3 (3.10 or newer) with venv and pip, nothing else.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
stamps=.venv/.setup
extras=$(printf '%s\n' "$@" | sort -u | paste -sd, -)

fail() {
    printf 'venv.sh: %s\n' "$*" >&2
    exit 1
}

# What .venv must have been made from. The path is part of it: the editable install and the scripts in
# .venv/bin hold absolute paths, so a copied or moved checkout needs a new environment.
sources() {
    .venv/bin/python -c '
import hashlib, os, pathlib
content = b"".join(pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
print(hashlib.sha256(os.fsencode(os.getcwd()) + content).hexdigest()[:24])
' 2>/dev/null
}

# One stamp per set of extras, so that the demo and the tests do not undo each other's.
is_ready() {
    local key
    [ -x .venv/bin/python ] && key=$(sources) && [ -e "$stamps/$key,$extras" ]
}

# python3 if it can make an environment, else the newest that can. A name may exist and not run (a pyenv shim without its
# version), or run and lack ensurepip (Debian without python3-venv), so each one is tried.
usable_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "needs python3, 3.10 or newer, with venv and pip; tried: ${PYTHON:-python3, python3.13 to python3.10}." \
        "Install one (on Debian and Ubuntu: apt install python3 python3-venv) or name it: PYTHON=/path/to/python3 $0"
}

# Runs quietly; its output is worth reading only when it fails.
quietly() {
    local log
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        cat -- "$log" >&2
        # A command that fails, unlike one that is killed, leaves the environment as it found it.
        rm -f -- "$log" "$stamps/unfinished"
        fail "failed: $*"
    fi
    rm -f -- "$log"
}

is_ready && exit 0

python=$(usable_python)

# The lock belongs to the open file, which this shell and its pip keep after this python has exited, and it goes
# when they die, however they die: no stale lock. On pyproject.toml, because .venv itself may be replaced.
exec 9<pyproject.toml
"$python" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("venv.sh: waiting for another setup of .venv", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError as error:  # network filesystems refuse, or want the file writable
    print(f"venv.sh: going on without a lock ({error})", file=sys.stderr)
'
is_ready && exit 0

printf 'venv.sh: setting up .venv (the first time takes some minutes: torch is large)\n' >&2
# An environment that was interrupted half-way may miss pieces that pip believes are there: start over.
if [ -e "$stamps/unfinished" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    quietly "$python" -m venv --clear .venv
fi
mkdir -p "$stamps"
: >"$stamps/unfinished"
quietly .venv/bin/python -m pip install --disable-pip-version-check --no-input \
    --editable ".${extras:+[$extras]}" --constraint constraints.txt

key=$(sources)
# Stamps of other sources no longer describe what is installed.
for stamp in "$stamps"/*; do
    case $stamp in "$stamps/$key,"*) ;; *) rm -f -- "$stamp" ;; esac
done
: >"$stamps/$key,$extras"
