// What ggml-rpc-server lacks when it is built against an installed ggml that knows nothing of RPC.

#include "ggml-backend.h"
#include "ggml-rpc.h"

#ifndef _WIN32
#include <csignal>
#endif

extern "C" void ggml_backend_register(ggml_backend_reg_t reg);

static bool prepare() {
#ifndef _WIN32
    // a client that vanishes while it is answered would end the server
    std::signal(SIGPIPE, SIG_IGN);
#endif
    // rpc-server.cpp looks the backend up by its name
    ggml_backend_register(ggml_backend_rpc_reg());
    return true;
}

// before main()
static const bool is_prepared = prepare();
