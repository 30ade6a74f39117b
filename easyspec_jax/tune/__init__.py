"""Which way of decoding is the fastest for a pair of models on the machine at hand, found by measuring."""
