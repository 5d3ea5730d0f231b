"""The trainer: the process with torch, user code and records, and how an agent starts it and
talks to it.
"""
