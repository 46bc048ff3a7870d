"""One model spread over several hosts by llama.cpp's own RPC backend, without its way of failing.

That backend ends the process when a host is gone, slow to greet, of another version or no ggml-rpc-server at
all. So it never talks to a host: it talks to a relay in this process, which talks to the host, knows the
protocol, and answers in the host's place once that is gone. What is computed then is worthless, ends at
once, and is thrown away: `Hosts.check` raises HostError.

    hosts     the hosts of one model        relay     one host, and llama.cpp's connections to it
    endpoint  HOST:PORT as users write it   greeting  the first exchange with a host, within a time
    protocol  commands and their answers    library   where the RPC backend is, and how it is built
"""

from .endpoint import Endpoint, parse_endpoints
from .hosts import Hosts
from .relay import SECONDS as RPC_SECONDS

__all__ = ["RPC_SECONDS", "Endpoint", "Hosts", "parse_endpoints"]
