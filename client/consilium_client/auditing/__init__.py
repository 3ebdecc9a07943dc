"""Empirical audit: attacks the privacy code that is installed here, and says what it could refute.

Nothing in this package touches a patient: the patients are made up, and the mechanism, the gradient
engine and the random numbers are those that training uses.
"""
