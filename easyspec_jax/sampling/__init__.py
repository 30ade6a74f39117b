"""Noise, warping and vocabulary shards: sampling primitives that drafts and verifiers share."""
