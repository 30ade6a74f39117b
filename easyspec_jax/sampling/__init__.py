"""Noise, warping and vocabulary shards, which draft and verifier both need."""
