#!/usr/bin/env bash
# One checkpoint into four ranks, twice: the way people do it today, and with rankload. Needs only python3.
#
#   ./launch/demo.sh            a real pretrained model from a server of the demo's own
#   ./launch/demo.sh URL        your checkpoint
#   ./launch/demo.sh --help     more
#
# RANKLOAD_PYTHON names an interpreter that already has the package; then .venv is neither made nor used.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${RANKLOAD_PYTHON:-}" ]; then
    "$here/venv.sh"
    RANKLOAD_PYTHON=$here/../.venv/bin/python
fi
# exec, so that Ctrl-C and SIGTERM reach the demo itself, which cleans up.
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$RANKLOAD_PYTHON" -m demo "$@"
