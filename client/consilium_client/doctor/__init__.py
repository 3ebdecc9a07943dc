"""The doctor of a site: its list of steps, its command, its ticket."""
