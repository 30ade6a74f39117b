"""Size of the draft that tests refit, and texts to refit it on."""

import numpy as np

LAYERS = 8
TEXTS = np.random.default_rng(5).integers(0, 300, (6, 24), np.int32)
