"""What a pair of models costs on a mesh, told without weights: collectives, bytes, memory, time."""
