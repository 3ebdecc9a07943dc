"""Privacy arithmetic: events of the mechanism and what they cost, per patient."""
