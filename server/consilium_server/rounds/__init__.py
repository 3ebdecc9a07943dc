"""A study's rounds at the aggregator: who is asked, what is taken, what is kept after each."""

from consilium_server.rounds.run import StudyRun

__all__ = ["StudyRun"]
