"""What draft and verifier both need: noise, warping, vocabulary shards."""
