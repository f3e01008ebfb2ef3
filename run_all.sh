#!/usr/bin/env bash
# Command 1: sets up the environment (once), then runs the notebooks, or explains photographs (./run_all.sh explain
# PHOTO...). ./run_all.sh --help and ./run_all.sh explain --help tell the options.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
stand=$PWD
cd "$here"
source runner/setup.sh
set_up requirements.txt
cd "$stand"  # files named on the command line are seen from where the user stands
module=runner.pipeline
if [ "${1:-}" = explain ]; then
    module=runner.explain
    shift
fi
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -P -m "$module" "$@"
