"""What a run leaves behind and what a person sees of it."""

from privfl.reporting.run_folder import RunFolder
from privfl.reporting.terminal import Terminal

__all__ = ["RunFolder", "Terminal"]
