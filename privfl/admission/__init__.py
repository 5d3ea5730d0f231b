"""Whether a run may happen at a site, and with how much noise: the site's policy, the plan of the
run, the site's budget, and forecasts of all three.
"""
