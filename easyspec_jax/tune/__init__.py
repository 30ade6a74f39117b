"""Find the fastest way of decoding for a pair of models on the machine at hand, by measuring."""
