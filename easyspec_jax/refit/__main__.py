"""`python -m easyspec_jax.refit`, which is `easyspec refit`."""

import sys

from easyspec_jax.cli.refit import main

if __name__ == "__main__":
    sys.exit(main())
