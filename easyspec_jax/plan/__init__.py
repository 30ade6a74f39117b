"""What a pair of models costs on a mesh, told without weights: so far what it sends between devices."""
