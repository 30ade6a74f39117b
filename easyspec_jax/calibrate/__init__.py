"""Rounding to int4, chosen so that a model's outputs on a text change little.

`python -m convert --weights int4 --calibration FILE` writes them; `calibrating.calibrate` finds
them.
"""
