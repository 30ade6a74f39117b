"""`python -m easyspec_jax.tune`, which is `easyspec tune`."""

import sys

from easyspec_jax.cli.tune import main

if __name__ == "__main__":
    sys.exit(main())
