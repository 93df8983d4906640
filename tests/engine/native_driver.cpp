// A model, tokens and tasks from standard input, logits to standard output: the library's functions without Python, to be
// run under an emulator of another processor or under sanitizers.
//
//     native_driver KERNELS THREADS
//
// Input, all int32 but the tensors' bytes: number of tensors, the shape; each tensor: kind (-1: a vector of float32), rows,
// columns, bytes, the bytes; the layers, embedding, head, final norm; number of tokens, tokens.
// Output: the names of the kernels that run here (a line), then the logits that follow each token, taken in four ways: all at
// once, 13 at a time, one by one, and in steps of one to three tokens in each of the slots but the first, one of which begins
// later. The last way is done in slot 1 and, if its logits differ by a bit from those of slot 2, ends the program.
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
    const size_t v = shape.vocabulary;
    const int n = (int)ids.size();
    std::vector<float> logits(n * v);
    for (int step : {n, 13, 1}) {
        for (int i = 0; i < n; i += step) {
            const int tokens = std::min(step, n - i);
            const Run run{0, i, tokens, tokens};
            mobillama_feed(model, &ids[i], &run, 1, &logits[i * v]);
        }
        fwrite(logits.data(), sizeof(float), logits.size(), stdout);
    }

    std::vector<float> slots[2] = {logits, logits};
    int held[2] = {0, 0};
    for (int turn = 0; held[1] < n; turn++) {
        std::vector<Run> runs;
        std::vector<int32_t> fed;
        for (int slot = 0; slot < 2; slot++) {
            const int tokens = std::min(1 + (turn + slot) % 3, n - held[slot]);
            if (!tokens || (slot && !turn)) continue;
            runs.push_back({slot + 1, held[slot], tokens, tokens});
            fed.insert(fed.end(), &ids[held[slot]], &ids[held[slot]] + tokens);
        }
        std::vector<float> found(fed.size() * v);
        mobillama_feed(model, fed.data(), runs.data(), (int)runs.size(), found.data());
        const float* from = found.data();
        for (const Run& run : runs) {
            std::copy(from, from + run.tokens * v, &slots[run.slot - 1][run.start * v]);
            from += run.tokens * v;
            held[run.slot - 1] += run.tokens;
        }
    }
    if (slots[0] != slots[1]) return 5;
    fwrite(slots[0].data(), sizeof(float), slots[0].size(), stdout);
    mobillama_free(model);
}
