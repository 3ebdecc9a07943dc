"""What sites, aggregator and auditor must agree on: study, identity, wire, privacy, ledger."""

__version__ = "0.1.0"
