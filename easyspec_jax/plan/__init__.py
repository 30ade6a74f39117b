"""What a pair of models will cost on a machine, told without weights and without the machine."""
