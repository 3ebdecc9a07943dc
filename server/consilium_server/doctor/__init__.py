"""The doctor of the aggregator: its list of steps, its command, its ticket."""
