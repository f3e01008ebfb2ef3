"""Running a notebook as a person would from the shell, and looking at its pictures."""

import os
import subprocess
import sys

import numpy as np
from PIL import Image


def papermill(notebook, copy, parameters, cwd):
    """Run a notebook as a person would from the shell; returns the finished process."""
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--cwd", str(cwd), "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    return subprocess.run([*command, str(notebook), str(copy)], capture_output=True, text=True, env=environment)


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"))
