#!/usr/bin/env bash
# Make .venv with the tested versions. Finds a Python >= 3.12 wherever it may be; needs no root and no GPU.
# PYTHON=/path/to/python chooses one; `tools/setup.sh --force` installs again.
set -euo pipefail
cd "$(dirname "$0")/.."

# Two targets started at once must not install into one .venv together: the second waits for the first.
if command -v flock >/dev/null; then exec 9>.venv.lock; flock 9; fi

stamp=.venv/.installed
wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
if [ "${1:-}" != --force ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then exit 0; fi

new_enough() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

candidates() { # best first: 3.12 is the tested one
    [ -z "${PYTHON:-}" ] || { echo "$PYTHON"; return; }
    local roots="${PYENV_ROOT:-$HOME/.pyenv}/versions $HOME/.local/share/uv/python /opt/python /usr/local"
    for minor in 12 13 14; do
        type -P "python3.$minor" || true
        for root in $roots; do compgen -G "$root/*/bin/python3.$minor" || compgen -G "$root/bin/python3.$minor" || true; done
    done
    type -P python3 || true
}

python=
while read -r candidate; do
    if new_enough "$candidate"; then python=$candidate; break; fi
done < <(candidates)
if [ -z "$python" ]; then
    echo "setup: no Python >= 3.12 found (looked at: $(candidates | tr '\n' ' '))." >&2
    echo "setup: install one, for example with 'pyenv install 3.12' or 'uv python install 3.12', or name it: make PYTHON=/path/to/python setup" >&2
    exit 1
fi

echo "setup: $("$python" --version) at $python -> .venv (torch brings 5 GB; about two minutes)"
[ -x .venv/bin/python ] && new_enough .venv/bin/python || { rm -rf .venv; "$python" -m venv .venv; }
.venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[search,train,hf,eval,dev]"
echo "$wanted" > $stamp
