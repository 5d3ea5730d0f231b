"""Rank 0: drives the round protocol, adds ciphertexts, keeps the run folder.

It never holds a key or a model.
"""
