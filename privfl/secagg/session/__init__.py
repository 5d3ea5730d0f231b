"""What the sites of one run share: roster, keys, sums, range, metrics, replicas.

Knows nothing of learning or of transports.
"""
