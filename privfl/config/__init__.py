"""The experiment file and the site files, as frozen, validated objects."""

from privfl.config.experiment import Experiment, Optimizer
from privfl.config.functions import check_functions, load_function
from privfl.config.load import demo_path, load_experiment, load_site, sites_folder, to_yaml
from privfl.config.site import Budget, SiteFile

__all__ = [
    "Budget",
    "Experiment",
    "Optimizer",
    "SiteFile",
    "check_functions",
    "demo_path",
    "load_experiment",
    "load_function",
    "load_site",
    "sites_folder",
    "to_yaml",
]
