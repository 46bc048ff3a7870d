"""One model on several hosts through llama.cpp's RPC backend, without its way of failing.

That backend ends the process if a host is lost, is slow to greet, has another version, or is not a
ggml-rpc-server. It therefore never talks to a host, but to a relay in this process, which talks to the host,
knows the protocol, and answers in the host's place once that is lost. What is computed then is worthless,
ends at once, and is discarded: `Hosts.check` raises HostError.

    hosts     the hosts of one model        relay     one host, and llama.cpp's connections to it
    endpoint  HOST:PORT as users write it   greeting  the first exchange with a host, within a time limit
    protocol  commands and their answers    library   where the RPC backend is, and how it is built
"""

from .endpoint import Endpoint, parse_endpoints
from .hosts import Hosts
from .relay import SECONDS as RPC_SECONDS

__all__ = ["RPC_SECONDS", "Endpoint", "Hosts", "parse_endpoints"]
