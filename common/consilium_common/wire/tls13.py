"""gRPC, restricted to TLS 1.3. Import gRPC from here and nowhere else.

gRPC has no option for a lowest TLS version. Our keys are all elliptic-curve keys, so allowing only
TLS 1.2 suites that need an RSA key leaves TLS 1.2 without a suite in common, while TLS 1.3, whose
suites are not configured by this variable, goes on. gRPC reads the variable when it is imported:
so this module must be first, and says so if it is not. A test connects with TLS 1.2 and must fail.
"""

from __future__ import annotations

import os
import sys

_VARIABLE = "GRPC_SSL_CIPHER_SUITES"
_SUITES = "ECDHE-RSA-AES256-GCM-SHA384"

if "grpc" in sys.modules and os.environ.get(_VARIABLE) != _SUITES:
    raise ImportError("gRPC was imported before consilium restricted it to TLS 1.3")
os.environ[_VARIABLE] = _SUITES
# We start processes from ones that use gRPC, always by exec: no fork handlers are wanted.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc  # noqa: E402
import grpc.aio  # noqa: E402

__all__ = ["grpc"]
