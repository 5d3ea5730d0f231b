"""Statistics of audits: from what an attack saw to a bound on epsilon. Pure arithmetic, nothing of
privfl.
"""
