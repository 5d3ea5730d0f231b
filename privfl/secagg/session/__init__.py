"""What the sites of one run share: roster, keys, sums, range, metrics, replicas.

No wire, no learning.
"""
