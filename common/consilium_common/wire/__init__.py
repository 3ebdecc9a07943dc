"""The one port between a site and the aggregator: methods, roles, channels, calls."""
