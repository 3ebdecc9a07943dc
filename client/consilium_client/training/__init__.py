"""Local training at a site: with or without patient-level privacy, and evaluation."""
