"""`python -m easyspec_jax.serve`: the same command as `easyspec serve`."""

import sys

from easyspec_jax.cli.serve import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
