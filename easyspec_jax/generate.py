"""`python -m easyspec_jax.generate`: the same command as `easyspec generate`."""

import sys

from easyspec_jax.cli.generate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
