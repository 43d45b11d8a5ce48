#!/usr/bin/env python3
"""Checks, measures and runs the student in this folder: `python3 run.py --help`."""

import sys

if sys.version_info < (3, 8):  # noqa: UP036
    sys.stderr.write("error: Python 3.8 or later is needed, this is {}.{}\nuse trtexec.md\n".format(*sys.version_info))
    sys.exit(2)
sys.dont_write_bytecode = True  # the folder stays as it was delivered

from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python3 -I leaves it out

from runner.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
