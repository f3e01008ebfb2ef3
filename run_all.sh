#!/usr/bin/env bash
# Command 1: sets up the environment (once), then runs the notebooks. ./run_all.sh --help tells the options.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
stand=$PWD
cd "$here"
source runner/setup.sh
set_up requirements.txt
cd "$stand"  # files named on the command line are seen from where the user stands
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -P -m runner.pipeline "$@"
