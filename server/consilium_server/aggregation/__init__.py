"""How the sites' updates become the next global model: from files to a file, strategy by strategy.

An update is a file that arrived whole. Every strategy sees the same small block of all of them at
a time, in the order of the sites' names and in float64, so that memory depends neither on the
model nor on the number of sites, and the result not on the order of arrival.
"""

from consilium_server.aggregation.averaging import running_average
from consilium_server.aggregation.combining import Combined, aggregate, offered
from consilium_server.aggregation.updates import SiteUpdate, check_update
from consilium_server.aggregation.weighting import cohort_weights

__all__ = [
    "Combined",
    "SiteUpdate",
    "aggregate",
    "check_update",
    "cohort_weights",
    "offered",
    "running_average",
]
