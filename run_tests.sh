#!/usr/bin/env bash
# Command 2: sets up the environment (once), then runs the tests. Options go to pytest: ./run_tests.sh -k pipeline -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/setup.sh
set_up requirements.txt requirements-dev.txt
exec "$python" -m pytest "$@"
