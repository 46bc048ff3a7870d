// llama.cpp without localsteer: its own control-vector loader, its own llama_set_adapter_cvec.
//
//   stock_cvec load   VECTOR                         n_embd, then the loaded floats
//   stock_cvec logits MODEL VECTOR|- SCALE TOKEN...  logits of every token, F32 KV cache, no flash attention
//
// Numbers go to stdout as raw float32. llama-cpp-python ships llama.h but not common.h, so the two structs of
// common_control_vector_load are declared here.

#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

struct common_control_vector_data {
    int n_embd;
    std::vector<float> data;  // (n_layer - 1) rows: layer 1 first
};

struct common_control_vector_load_info {
    float strength;
    std::string fname;
};

common_control_vector_data common_control_vector_load(const std::vector<common_control_vector_load_info> & infos);

static void put(const float * data, size_t n) {
    fwrite(data, sizeof(float), n, stdout);
}

static int load(const char * path) {
    const auto cvec = common_control_vector_load({{1.0f, path}});
    if (cvec.n_embd <= 0) {
        return 3;
    }
    const float n_embd = cvec.n_embd;
    put(&n_embd, 1);
    put(cvec.data.data(), cvec.data.size());
    return 0;
}

static int apply(llama_context * ctx, const char * path, float scale, int n_layer) {
    const auto cvec = common_control_vector_load({{scale, path}});
    if (cvec.n_embd <= 0) {
        return 3;
    }
    return llama_set_adapter_cvec(ctx, cvec.data.data(), cvec.data.size(), cvec.n_embd, 1, n_layer);
}

static int logits(const char * model_path, const char * path, float scale, std::vector<llama_token> tokens) {
    auto mparams = llama_model_default_params();
    mparams.use_extra_bufts = false;
    llama_model * model = llama_model_load_from_file(model_path, mparams);
    if (!model) {
        return 4;
    }
    auto cparams = llama_context_default_params();
    cparams.n_ctx = cparams.n_batch = cparams.n_ubatch = 512;
    cparams.type_k = cparams.type_v = GGML_TYPE_F32;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    cparams.n_threads = cparams.n_threads_batch = 1;
    llama_context * ctx = llama_init_from_model(model, cparams);
    if (!ctx || (strcmp(path, "-") != 0 && apply(ctx, path, scale, llama_model_n_layer(model)) != 0)) {
        return 5;
    }
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    batch.n_tokens = tokens.size();
    for (int i = 0; i < batch.n_tokens; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(ctx, batch) != 0) {
        return 6;
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (int i = 0; i < batch.n_tokens; i++) {
        put(llama_get_logits_ith(ctx, i), n_vocab);
    }
    llama_batch_free(batch);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}

int main(int argc, char ** argv) {
    if (argc == 3 && std::string(argv[1]) == "load") {
        return load(argv[2]);
    }
    if (argc > 5 && std::string(argv[1]) == "logits") {
        std::vector<llama_token> tokens;
        for (int i = 5; i < argc; i++) {
            tokens.push_back(atoi(argv[i]));
        }
        return logits(argv[2], argv[3], atof(argv[4]), tokens);
    }
    return 2;
}
