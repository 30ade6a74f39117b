"""Devices: the mesh, the collectives that we write, and several hosts that run one command."""
