"""Integers of int4 with which a model's outputs on a text change little.

`python -m convert --weights int4 --calibration FILE` writes them; `calibrating.calibrate` finds
them.
"""
