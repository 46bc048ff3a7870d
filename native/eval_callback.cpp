// The hook in llama.cpp: llama_context_params.cb_eval, asked for every node of the graph.
//
// It uses ggml only through a handful of exported accessors, whose addresses Python takes from the library that
// llama-cpp-python has loaded. No ggml header or struct is used: nothing can drift, and there is no second ggml.
//
// One hook serves one context and is called on the thread that runs llama_decode.

#include "steer.h"

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#if defined(_WIN32)
#define LOCALSTEER_API extern "C" __declspec(dllexport)
#else
#define LOCALSTEER_API extern "C" __attribute__((visibility("default")))
#endif

struct ggml_tensor; // opaque

using localsteer::steer_program;

// must match Accessors in localsteer/runtime/bridge/hook.py
struct localsteer_ggml {
    const char * (*get_name)     (const ggml_tensor * t);
    int64_t      (*nelements)    (const ggml_tensor * t);
    int64_t      (*nrows)        (const ggml_tensor * t);
    size_t       (*nbytes)       (const ggml_tensor * t);
    bool         (*is_contiguous)(const ggml_tensor * t);
    void         (*tensor_get)   (const ggml_tensor * t, void * data, size_t offset, size_t size);
    void         (*tensor_set)   (ggml_tensor * t, const void * data, size_t offset, size_t size);
};

// what happened to one layer in the current decode
enum layer_status {
    LAYER_UNSEEN = 0,
    LAYER_DONE   = 1,
    LAYER_FAILED = 2,
};

struct layer_state {
    bool wanted  = false; // some row of the current batch is to be changed or captured here
    bool capture = false;

    layer_status status = LAYER_UNSEEN;

    std::vector<float> captured; // n_captured x n_embd, after steering
};

// one (plan, position class): a program per layer, null where the layer is left alone
using route = std::vector<std::unique_ptr<steer_program>>;

struct localsteer_hook {
    localsteer_ggml ggml;

    int32_t n_layer;
    int32_t n_embd;

    std::vector<route>       routes;
    std::vector<layer_state> layers;

    // the current batch: set by begin, read by the callback, dropped by end
    bool                 active = false;
    int32_t              n_tokens = 0;
    std::vector<int32_t> token_route;   // index into routes, -1: this token is left alone
    std::vector<uint8_t> token_capture;
    std::vector<int32_t> outputs;       // the tokens with outputs, in order

    std::vector<float> rows; // scratch: the rows of one span

    // the first error of the current batch; a plain array, because keeping it must not throw
    char error[256] = "";

    void fail(const char * format, ...);
    steer_program * program(int32_t token, int32_t il) const;
};

void localsteer_hook::fail(const char * format, ...) {
    if (error[0] != '\0') {
        return;
    }
    va_list args;
    va_start(args, format);
    vsnprintf(error, sizeof(error), format, args);
    va_end(args);
}

steer_program * localsteer_hook::program(int32_t token, int32_t il) const {
    const int32_t ir = token_route[token];
    return ir < 0 ? nullptr : routes[ir][il].get();
}

// the layer of "l_out-<il>", -1 for every other node. Copies and views are named "l_out-3 (view)",
// "CPU#l_out-3#0" and the like, and are not the residual stream itself
static int32_t layer_of(const char * name) {
    static const char   prefix[] = "l_out-";
    static const size_t n_prefix = sizeof(prefix) - 1;

    if (strncmp(name, prefix, n_prefix) != 0) {
        return -1;
    }

    int32_t il = 0;
    const char * cur = name + n_prefix;
    if (*cur == '\0') {
        return -1;
    }
    for (; *cur; ++cur) {
        if (*cur < '0' || *cur > '9' || il > 100000) {
            return -1;
        }
        il = 10*il + (*cur - '0');
    }
    return il;
}

// the row count says what the rows are: most architectures drop the rows without outputs in the last layer,
// some keep them all. Returns false, with the error set, if the rows can't be matched to tokens
static bool rows_are_tokens(localsteer_hook * hook, const ggml_tensor * t, int32_t il, bool * all_tokens) {
    const auto & ggml = hook->ggml;

    const int64_t n_rows     = ggml.nrows(t);
    const int64_t n_elements = ggml.nelements(t);

    // nrows counts all dimensions above the first: a third one (several streams per token) gives too many
    const bool f32 = ggml.is_contiguous(t) && ggml.nbytes(t) == (size_t) n_elements*sizeof(float);
    if (!f32 || n_elements != n_rows*hook->n_embd) {
        hook->fail("layer %d does not give plain rows of %d float values", il, hook->n_embd);
        return false;
    }

    const bool last = il == hook->n_layer - 1;
    *all_tokens = n_rows == hook->n_tokens;
    if (!*all_tokens && !(last && n_rows == (int64_t) hook->outputs.size())) {
        hook->fail("layer %d gave %lld rows for %d tokens with %zu outputs", il, (long long) n_rows, hook->n_tokens,
                   hook->outputs.size());
        return false;
    }
    return true;
}

// steer and capture the rows [ir0, ir1) of layer il; token_of maps a row to its token, null: they are equal
static void process_span(localsteer_hook * hook, ggml_tensor * t, int32_t il, int32_t ir0, int32_t ir1,
                         const int32_t * token_of) {
    const size_t n_embd = hook->n_embd;
    const size_t offset = ir0*n_embd*sizeof(float);
    const size_t size   = (ir1 - ir0)*n_embd*sizeof(float);

    auto & layer = hook->layers[il];

    if (hook->rows.size() < (ir1 - ir0)*n_embd) {
        hook->rows.resize((ir1 - ir0)*n_embd);
    }
    hook->ggml.tensor_get(t, hook->rows.data(), offset, size);

    bool changed = false;
    for (int32_t ir = ir0; ir < ir1; ++ir) {
        const int32_t token = token_of ? token_of[ir] : ir;

        float * row = hook->rows.data() + (ir - ir0)*n_embd;
        if (steer_program * program = hook->program(token, il)) {
            program->apply(row, 1);
            changed = true;
        }
        if (layer.capture && hook->token_capture[token]) {
            layer.captured.insert(layer.captured.end(), row, row + n_embd);
        }
    }

    if (changed) {
        hook->ggml.tensor_set(t, hook->rows.data(), offset, size);
    }
}

static void process_layer(localsteer_hook * hook, ggml_tensor * t, int32_t il) {
    auto & layer = hook->layers[il];

    if (layer.status != LAYER_UNSEEN) {
        layer.status = LAYER_FAILED;
        hook->fail("layer %d was computed more than once: llama.cpp has split the batch", il);
        return;
    }

    bool all_tokens = false;
    if (!rows_are_tokens(hook, t, il, &all_tokens)) {
        layer.status = LAYER_FAILED;
        return;
    }

    const int32_t * token_of = all_tokens ? nullptr : hook->outputs.data();
    const int32_t   n_rows   = all_tokens ? hook->n_tokens : (int32_t) hook->outputs.size();

    auto touched = [&](int32_t ir) {
        const int32_t token = token_of ? token_of[ir] : ir;
        return hook->program(token, il) || (layer.capture && hook->token_capture[token]);
    };

    // one transfer per contiguous run of touched rows
    for (int32_t ir0 = 0; ir0 < n_rows;) {
        if (!touched(ir0)) {
            ++ir0;
            continue;
        }
        int32_t ir1 = ir0 + 1;
        while (ir1 < n_rows && touched(ir1)) {
            ++ir1;
        }
        process_span(hook, t, il, ir0, ir1, token_of);
        ir0 = ir1;
    }

    layer.status = LAYER_DONE;
}

// always true for a node that was asked for: on false llama_decode drops the graph, returns 0 and leaves garbage.
// Errors are kept instead, and localsteer_batch_end reports them. No exception may reach llama.cpp's C code
LOCALSTEER_API bool localsteer_eval_callback(ggml_tensor * t, bool ask, void * user_data) {
    auto * hook = static_cast<localsteer_hook *>(user_data);

    const int32_t il = hook->active ? layer_of(hook->ggml.get_name(t)) : -1;

    const bool wanted = il >= 0 && il < hook->n_layer && hook->layers[il].wanted;
    if (ask) {
        return wanted;
    }
    if (wanted) {
        try {
            process_layer(hook, t, il);
        } catch (const std::exception & e) {
            hook->layers[il].status = LAYER_FAILED;
            hook->fail("layer %d: %s", il, e.what());
        } catch (...) {
            hook->layers[il].status = LAYER_FAILED;
            hook->fail("layer %d: unknown exception", il);
        }
    }
    return true;
}

// null: out of memory
LOCALSTEER_API localsteer_hook * localsteer_hook_new(const localsteer_ggml * ggml, int32_t n_layer, int32_t n_embd) {
    try {
        auto hook = std::make_unique<localsteer_hook>();
        hook->ggml    = *ggml;
        hook->n_layer = n_layer;
        hook->n_embd  = n_embd;
        hook->layers.resize(n_layer);
        return hook.release();
    } catch (...) {
        return nullptr;
    }
}

LOCALSTEER_API void localsteer_hook_free(localsteer_hook * hook) {
    delete hook;
}

// a new route that leaves every layer alone; its index, or -1: out of memory
LOCALSTEER_API int32_t localsteer_route_new(localsteer_hook * hook) {
    try {
        hook->routes.emplace_back(hook->n_layer);
        return (int32_t) hook->routes.size() - 1;
    } catch (...) {
        return -1;
    }
}

// drops all routes; not while a batch is active
LOCALSTEER_API void localsteer_routes_clear(localsteer_hook * hook) {
    hook->routes.clear();
}

// 0, or -1 with localsteer_error set
LOCALSTEER_API int32_t localsteer_route_program(localsteer_hook * hook, int32_t route, int32_t il, int32_t k,
                                                const float * readers, const double * biases,
                                                const float * writers, const uint8_t * normalised,
                                                const uint8_t * one_sided, const float * caps, int32_t n_solved,
                                                double ridge) {
    hook->error[0] = '\0';
    try {
        hook->routes.at(route).at(il) = std::make_unique<steer_program>(
            hook->n_embd, k, readers, biases, writers, normalised, one_sided, caps, n_solved, ridge);
        return 0;
    } catch (const std::exception & e) {
        hook->fail("layer %d: %s", il, e.what());
        return -1;
    }
}

// to be called before llama_decode, with what each token of the batch gets.
// token_route: n_tokens indices, -1: left alone; null: all left alone. outputs: n_tokens flags.
// capture: n_layer flags, null: none. token_capture: n_tokens flags, null: all tokens.
// 0, or -1 with localsteer_error set
LOCALSTEER_API int32_t localsteer_batch_begin(localsteer_hook * hook, int32_t n_tokens, const int32_t * token_route,
                                              const uint8_t * outputs, const uint8_t * capture,
                                              const uint8_t * token_capture) {
    hook->active = false;
    hook->error[0] = '\0';
    try {
        hook->n_tokens = n_tokens;
        hook->token_route  .assign(n_tokens, -1);
        hook->token_capture.assign(n_tokens, 1);
        hook->outputs.clear();
        for (int32_t i = 0; i < n_tokens; ++i) {
            if (token_route) {
                hook->token_route[i] = token_route[i];
            }
            if (token_capture) {
                hook->token_capture[i] = token_capture[i];
            }
            if (outputs[i]) {
                hook->outputs.push_back(i);
            }
        }

        for (int32_t il = 0; il < hook->n_layer; ++il) {
            auto & layer = hook->layers[il];
            layer.status  = LAYER_UNSEEN;
            layer.capture = capture && capture[il];
            layer.wanted  = layer.capture;
            layer.captured.clear();
        }

        int32_t last = -1; // neighbours mostly share their route
        for (int32_t i = 0; i < n_tokens; ++i) {
            const int32_t ir = hook->token_route[i];
            if (ir < 0 || ir == last) {
                continue;
            }
            const route & programs = hook->routes.at(ir);
            for (int32_t il = 0; il < hook->n_layer; ++il) {
                hook->layers[il].wanted = hook->layers[il].wanted || programs[il];
            }
            last = ir;
        }
    } catch (const std::exception & e) {
        hook->fail("%s", e.what());
        return -1;
    }
    hook->active = true;
    return 0;
}

// to be called after llama_decode; 0, or -1 with localsteer_error set: the logits can't be trusted then
LOCALSTEER_API int32_t localsteer_batch_end(localsteer_hook * hook) {
    hook->active = false;
    for (int32_t il = 0; il < hook->n_layer; ++il) {
        const auto & layer = hook->layers[il];
        if (layer.wanted && layer.status == LAYER_UNSEEN) {
            hook->fail("layer %d gave no residual stream (no graph node l_out-%d)", il, il);
        }
    }
    return hook->error[0] == '\0' ? 0 : -1;
}

// the first error of the last batch or route; empty: none
LOCALSTEER_API const char * localsteer_error(const localsteer_hook * hook) {
    return hook->error;
}

// layer_status of the last batch
LOCALSTEER_API int32_t localsteer_layer_status(const localsteer_hook * hook, int32_t il) {
    return hook->layers[il].status;
}

// what the last batch captured at a layer: the number of rows, *data valid until the next batch begins
LOCALSTEER_API int64_t localsteer_captured(const localsteer_hook * hook, int32_t il, const float ** data) {
    const auto & captured = hook->layers[il].captured;
    *data = captured.data();
    return (int64_t) captured.size()/hook->n_embd;
}
