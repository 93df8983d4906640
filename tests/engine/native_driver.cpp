// A model, tokens and tasks from standard input, logits to standard output: the library's functions without Python, to be
// run under an emulator of another processor or under sanitizers.
//
//     native_driver KERNELS THREADS
//
// Input, all int32 but the tensors' bytes: number of tensors, the shape; each tensor: kind (-1: a vector of float32), rows,
// columns, bytes, the bytes; the layers, embedding, head, final norm; number of tokens, tokens.
// Output: the names of the kernels that run here (a line), then the logits that follow each token, taken in three ways.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "model.cpp"

static void read(void* to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) abort();
}
static int32_t number() {
    int32_t n;
    read(&n, sizeof n);
    return n;
}

int main(int, char** arguments) {
    std::string names = mobillama_kernels();
    std::replace(names.begin(), names.end(), '\n', ' ');
    printf("%s\n", names.c_str());
    const int tensors = number();
    Shape shape;
    read(&shape, sizeof shape);
    Model* model = mobillama_new(&shape, atoi(arguments[2]), arguments[1]);
    if (!model) return 2;
    for (int i = 0; i < tensors; i++) {
        const int kind = number(), rows = number(), columns = number();
        std::vector<uint8_t> bytes(number());
        read(bytes.data(), bytes.size());
        const int added = kind < 0 ? mobillama_add_vector(model, (const float*)bytes.data(), columns)
                                   : mobillama_add_matrix(model, kind, rows, columns, bytes.data());
        if (added < 0) return 3;
    }
    std::vector<Layer> layers(shape.layers);
    read(layers.data(), layers.size() * sizeof(Layer));
    const int embedding = number(), head = number(), final_norm = number();
    if (!mobillama_prepare(model, layers.data(), shape.layers, embedding, head, final_norm)) return 4;
    std::vector<int32_t> ids(number());
    read(ids.data(), ids.size() * sizeof(int32_t));
    std::vector<float> logits(ids.size() * shape.vocabulary);
    for (size_t step : {ids.size(), (size_t)13, (size_t)1}) {
        for (size_t i = 0; i < ids.size(); i += step)
            mobillama_feed(model, &ids[i], (int)std::min(step, ids.size() - i), (int)i, &logits[i * shape.vocabulary], 1);
        fwrite(logits.data(), sizeof(float), logits.size(), stdout);
    }
    mobillama_free(model);
}
