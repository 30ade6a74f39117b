"""The transformer decoder on a mesh; knows nothing of drafting."""
