"""All benchmarks, one after the other on one machine:

    PYTHONPATH=. python tests/benchmarks/all.py \
        [--repetitions 5] [--threads N] [--device cpu] [--out FOLDER]

The options go to both scripts. With --out results/reference/benchmarks, `python -m runner.results`
makes docs/speed.md of the new tables.
"""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    for script in ("cam.py", "faithfulness.py"):
        subprocess.run(
            [sys.executable, Path(__file__).with_name(script), *sys.argv[1:]], check=True
        )
