#!/bin/sh
# Chooses a Python and hands over to setup.py beside this file, with the arguments given here.
# PYTHON, where set, is the only one tried. An environment that stands is kept, whatever made it.
set -u
here=$(dirname "$0")
for candidate in ${PYTHON:-"$here/../.venv/bin/python" python3 python3.13 python3.12 python3.11 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$candidate" "$here/setup.py" "$@"
    fi
done
if [ -n "${PYTHON:-}" ]; then
    echo "setup: PYTHON=$PYTHON is not a Python of 3.11 or newer that runs." >&2
else
    echo "setup: no Python of 3.11 or newer found (tried python3, python3.13, python3.12, python3.11, python)." >&2
fi
echo "  Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2
exit 3
