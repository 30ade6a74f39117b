"""Cost of a pair of models on a machine, estimated without weights and without the machine."""
