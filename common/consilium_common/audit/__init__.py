"""The auditor's tools: offline, with nothing but files and public keys."""
