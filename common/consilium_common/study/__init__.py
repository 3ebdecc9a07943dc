"""The study: what is trained, on what, how, at what price. Data, never code."""

from consilium_common.study.schema import Study

__all__ = ["Study"]
