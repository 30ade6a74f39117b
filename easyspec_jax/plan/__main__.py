"""`python -m easyspec_jax.plan`, which is `easyspec plan`."""

import sys

from easyspec_jax.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
