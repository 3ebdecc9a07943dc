"""The aggregator: registry, rounds, aggregation and the gateway that sites connect to."""
