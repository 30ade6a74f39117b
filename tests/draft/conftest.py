from tests.refit.conftest import draft

__all__ = ["draft"]
