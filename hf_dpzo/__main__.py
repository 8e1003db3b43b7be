"""`python -m hf_dpzo` is `hf-dpzo`."""

import sys

from hf_dpzo.cli.main import main


if __name__ == "__main__":
    sys.exit(main())
