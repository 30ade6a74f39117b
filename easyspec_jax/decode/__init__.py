"""Rounds of speculative decoding, and the host loop around them."""
