#!/usr/bin/env python3
"""Checks, measures and runs the student in this folder: `python3 run.py --help`."""

import sys

if sys.version_info < (3, 8):  # noqa: UP036
    sys.exit("error: Python 3.8 or later is needed, this is {}.{}\nuse trtexec.md".format(*sys.version_info[:2]))
sys.dont_write_bytecode = True  # the folder stays as it was delivered

from runner.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
