#!/usr/bin/env bash
# Command 2: sets up the environment (once), then runs the tests. Options go to pytest: ./run_tests.sh -k pipeline -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source runner/setup.sh
set_up requirements.txt requirements-dev.txt
export OMP_NUM_THREADS=1  # two test processes; threads that wait for each other on shared cores are slower than one
exec "$python" -m pytest -n 2 --dist loadfile "$@"
