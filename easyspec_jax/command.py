"""What the commands share."""

import argparse
from typing import NoReturn

from easyspec_jax.errors import EasySpecError


class Parser(argparse.ArgumentParser):
    """Refuses a bad command line as everything else is refused: with an EasySpecError, without printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise EasySpecError(f"{message} (see --help)")
