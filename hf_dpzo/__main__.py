"""Runs the command line: `python -m hf_dpzo` is the same as `hf-dpzo`."""

import sys

from hf_dpzo.cli.main import main


if __name__ == "__main__":
    sys.exit(main())
