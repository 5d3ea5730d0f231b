"""May this run happen, and with how much noise: a site's policy, its plan, its budget, and
forecasts of all three.
"""
