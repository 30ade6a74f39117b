"""Layer-parallel drafting: which layers go together, and how a group of them runs at once."""
