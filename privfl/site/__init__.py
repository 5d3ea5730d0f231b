"""The processes of a run: a site's agent and its trainer, and the driver of the coordinator on
rank 0.
"""
