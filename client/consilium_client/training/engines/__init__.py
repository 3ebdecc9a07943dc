"""Gradient engines: three ways to the same rows, one gradient a patient."""
