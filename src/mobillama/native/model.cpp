// The decoder: sequences, their keys and values, and the forward pass that all threads walk through together.
//
// A pass takes tokens of any of the sequences, several of one or one of several: each matrix is multiplied with all of them
// at once, and each looks at its own sequence's keys. One sequence is the batch of one.
//
// Every product is cut by rows, the same rows for the same thread at every layer. So the part of the shared feed-forward
// network that a core multiplies with is the same at every layer and stays in its cache; only attention weights stream by.
#include <sys/mman.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"

#define API extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#include <cpuid.h>
extern const Kernels kernels_avx512, kernels_avxvnni, kernels_avx2;
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#endif
extern const Kernels kernels_dotprod;
#endif
extern const Kernels kernels_portable;

namespace {

constexpr int QUERIES = 8;  // heads and tokens whose attention is computed at once
constexpr int TASKS = 32;   // of such tiles that a thread goes through a span with
constexpr int CHUNK = 128;  // tokens taken in at once: their activations fit the second-level cache beside a panel
constexpr int SPAN = 128;   // positions whose keys and values lie together: pairs of blocks of each column of values
constexpr int AHEAD = 4096;                // bytes by which weights are fetched before they are multiplied
constexpr size_t NEAR = (size_t)64 << 20;  // bytes of weights that caches may keep from one token to the next

// The sets that this processor can run, best first.
std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        found.push_back(&kernels_avx512);
    if (avx2 && vnni) found.push_back(&kernels_avxvnni);
    if (avx2) found.push_back(&kernels_avx2);
#elif defined(__aarch64__) && defined(__linux__)
    if (getauxval(AT_HWCAP) & (1 << 20)) found.push_back(&kernels_dotprod);  // HWCAP_ASIMDDP
#elif defined(__aarch64__)
    found.push_back(&kernels_dotprod);  // every Apple processor of this kind
#endif
    found.push_back(&kernels_portable);
    return found;
}

// Zeros that take memory page by page when they are written.
void* reserve(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

size_t panel_bytes(Kind kind, int columns) {
    if (kind == F32) return (size_t)columns * PANEL * 4;
    if (kind == F16 || kind == BF16) return (size_t)columns * PANEL * 2;
    return (size_t)(columns / BLOCK + 1) / 2 * layout_of(kind).pair_bytes;
}

bool finite_half(const uint8_t* p) { return (p[1] & 0x7C) != 0x7C; }

// Pack the rows of one panel, as they stand in a GGUF file. False: a scale or number is infinite or none.
bool pack_panel(const Matrix& m, int panel, const uint8_t* file) {
    uint8_t* to = m.data + (size_t)panel * m.panel_bytes;
    const int rows = std::min(PANEL, m.rows - panel * PANEL);
    bool finite = true;
    if (!m.quantized()) {
        const int width = m.kind == F32 ? 4 : 2;
        for (int r = 0; r < rows; r++) {
            const uint8_t* from = file + (size_t)(panel * PANEL + r) * m.columns * width;
            for (int c = 0; c < m.columns; c++) {
                const uint8_t* number = from + (size_t)c * width;
                memcpy(to + ((size_t)c * PANEL + r) * width, number, width);
                const int top = number[width - 1] << 8 | number[width - 2];  // sign, exponent, first digits
                finite &= m.kind == F16 ? (top & 0x7C00) != 0x7C00 : (top & 0x7F80) != 0x7F80;
            }
        }
        return finite;
    }
    const Layout layout = layout_of(m.kind);
    const int groups = m.columns / BLOCK, head = m.kind == Q4_1 ? 4 : 2, codes = m.kind == Q8_0 ? 32 : 16;
    for (int r = 0; r < rows; r++) {
        const uint8_t* from = file + (size_t)(panel * PANEL + r) * groups * (head + codes);
        for (int g = 0; g < groups; g++, from += head + codes) {
            uint8_t* pair = to + (size_t)(g / 2) * layout.pair_bytes;
            memcpy(pair + g % 2 * 32 + 2 * r, from, 2);
            finite &= finite_half(from);
            if (m.kind == Q4_1) {
                memcpy(pair + layout.minima + g % 2 * 32 + 2 * r, from + 2, 2);
                finite &= finite_half(from + 2);
            }
            uint8_t* block = pair + layout.codes + g % 2 * layout.block_bytes + 4 * r;
            for (int i = 0; i < codes / 4; i++) memcpy(block + 64 * i, from + head + 4 * i, 4);
        }
    }
    return finite;
}

struct Shape {
    int32_t vocabulary, width, inner, layers, heads, key_heads, head_width, context, slots;
    float eps, theta;
    int32_t exact;  // activations as floats
    int32_t cache;  // kind of keys and values: F16, or Q8_0 where head_width is a whole number of blocks
};

// The weights that a layer uses, as indices: matrices q, k, v, o, gate, up, down; norms before attention and network, of
// queries and keys (-1: none).
struct Layer {
    int32_t q, k, v, o, gate, up, down, attention_norm, ffn_norm, query_norm, key_norm;
};

// Tokens of one sequence that stand side by side in a pass and follow the `start` tokens that its slot holds.
struct Run {
    int32_t slot, start, tokens, wanted;  // wanted: of how many of its last tokens logits are asked for
};

struct Range {
    int first, last;
};

class Model {
public:
    Model(const Shape& shape, int threads, const Kernels& kernels)
        : shape(shape), kernels(kernels), pool(threads), queries(shape.heads * shape.head_width),
          keys(shape.key_heads * shape.head_width), group(shape.heads / shape.key_heads) {}

    ~Model() {
        for (auto& [start, bytes] : regions) munmap(start, bytes);
    }

    // Return the matrix's number; -1: no memory, -2: it holds numbers that are infinite or none.
    int add_matrix(Kind kind, int rows, int columns, const uint8_t* file) {
        Matrix m{kind, rows, columns, nullptr, panel_bytes(kind, columns), AHEAD, nullptr, false};
        m.data = allocate_weights(m.panels() * m.panel_bytes);
        if (!m.data) return -1;
        m.end = m.data + m.panels() * m.panel_bytes;
        std::atomic<bool> finite{true};
        pool.run([&](int t) {  // each thread the panels that it will multiply with, so that they lie near its core
            const Range mine = part(m.panels(), t);
            for (int p = mine.first; p < mine.last; p++)
                if (!pack_panel(m, p, file)) finite = false;
        });
        if (!finite) return -2;
        matrices.push_back(m);
        return (int)matrices.size() - 1;
    }

    int add_vector(const float* values, int n) {
        if (!std::all_of(values, values + n, [](float x) { return std::isfinite(x); })) return -2;
        vectors.emplace_back(values, values + n);
        return (int)vectors.size() - 1;
    }

    // Allocate all that a forward pass needs. False: no memory.
    bool prepare() {
        const size_t blocks = (size_t)std::max({shape.width, shape.inner, queries}) / BLOCK + 1;
        qkv_width = queries + 2 * keys;
        const Kind kind = (Kind)shape.cache;
        room = padded(shape.context, SPAN);
        key_panel = panel_bytes(kind, shape.head_width);
        value_panel = panel_bytes(kind, SPAN);
        scales_at = SPAN / PANEL * key_panel;
        values_at = scales_at + (kind == Q8_0 ? SPAN * sizeof(float) : 0);
        head_bytes = values_at + padded(shape.head_width, PANEL) / PANEL * value_panel;
        span_bytes = head_bytes * shape.key_heads * shape.layers;
        x = allocate_floats((size_t)CHUNK * shape.width);
        normed = allocate_floats((size_t)CHUNK * shape.width);
        qkv = allocate_floats((size_t)CHUNK * qkv_width);
        mixed = allocate_floats((size_t)CHUNK * queries);
        gated = allocate_floats((size_t)CHUNK * std::max(shape.inner, queries));
        cosine = allocate_floats((size_t)CHUNK * shape.head_width / 2);
        sine = allocate_floats((size_t)CHUNK * shape.head_width / 2);
        shared = (Activations*)allocate(blocks * CHUNK * sizeof(Activations));
        inner = (Activations*)allocate(blocks * CHUNK * sizeof(Activations));
        rest_room = (int)blocks;
        rests = (Rest*)allocate(CHUNK * blocks * sizeof(Rest));
        cache = (uint8_t*)allocate_huge(cache_bytes());
        bool complete = x && normed && qkv && mixed && gated && cosine && sine && shared && inner && rests && cache;
        for (int t = 0; t < pool.size(); t++) {
            own.push_back({});
            own[t].pair = allocate_floats((size_t)2 * CHUNK * BLOCK);
            own[t].normed = allocate_floats(std::max(shape.width, queries));
            own[t].blocks = (Activations*)allocate(std::max(blocks, (size_t)QUERIES * SPAN / BLOCK) * sizeof(Activations));
            const size_t rows = TASKS * QUERIES;
            own[t].queries = allocate_floats(rows * shape.head_width);
            own[t].scores = allocate_floats(QUERIES * SPAN);
            own[t].products = allocate_floats(QUERIES * shape.head_width);
            own[t].sums = allocate_floats(rows * shape.head_width);
            own[t].most = allocate_floats(rows);
            own[t].total = allocate_floats(rows);
            own[t].query_blocks = (Activations*)allocate((rows * shape.head_width / BLOCK + 1) * sizeof(Activations));
            own[t].rests = (Rest*)allocate(blocks * sizeof(Rest));
            complete &= own[t].pair && own[t].normed && own[t].blocks && own[t].rests && own[t].queries && own[t].scores;
            complete &= own[t].products && own[t].sums && own[t].most && own[t].total && own[t].query_blocks;
        }
        if (!complete) return false;
        mark_streams();
        for (int i = 0; i < shape.head_width / 2; i++)
            frequencies.push_back((float)std::pow((double)shape.theta, -2.0 * i / shape.head_width));
        return true;
    }

    // Keys and values of all slots.
    size_t cache_bytes() const { return slot_bytes() * shape.slots; }

    // Take in at most CHUNK tokens, run after run; write the logits that are wanted, in the order of the tokens.
    void feed(const int32_t* ids, const Run* runs, int count, float* logits) {
        places.clear();
        tiles.clear();
        wanted.clear();
        for (const Run* run = runs; run < runs + count; run++) {
            const int first = (int)places.size(), rows = run->tokens * group;
            for (int i = 0; i < run->tokens; i++) places.push_back({run->slot, run->start + i});
            for (int row = 0; row < rows; row += QUERIES)
                tiles.push_back({first * group + row, std::min(QUERIES, rows - row)});
            for (int i = run->tokens - run->wanted; i < run->tokens; i++) wanted.push_back(first + i);
        }
        pool.run([&](int t) { forward(t, ids, logits); });
    }

    // Give a slot the first `positions` tokens of another.
    void copy(int from, int to, int positions) {
        memcpy(span_at(to, 0), span_at(from, 0), padded(positions, SPAN) / SPAN * span_bytes);
    }

    // Only products of n <= CHUNK tokens' forward pass, all that a token's weights can be read and multiplied in at best: for
    // measuring. Of no tokens: the same weights are read, by the same threads in the same order, and nothing else. Parts: 1
    // attention's, 2 the network's, 4 the head's, or their sum. In step: threads wait for one another where the next product
    // needs all of the last ones; else never. `out` has room for n times the rows of the largest matrix.
    void multiply_only(int parts, int n, bool in_step, float* out) {
        pool.run([&](int t) {
            const auto products = [&](std::initializer_list<int> numbers) {
                for (int number : numbers) multiply_one(t, matrices[number], n, out);
                if (in_step) pool.barrier();
            };
            for (const Layer& layer : layers) {
                if (parts & 1) products({layer.q, layer.k, layer.v}), products({layer.o});
                if (parts & 2) products({layer.gate, layer.up}), products({layer.down});
            }
            if (parts & 4) products({head});
        });
    }

    std::vector<Layer> layers;
    int embedding = -1, head = -1, final_norm = -1;

private:
    struct Place {  // of a token of the pass
        int slot, position;
    };
    struct Tile {  // queries of one sequence that look at the same keys; row r is head r % group of the group, token r / group
        int first, n;
    };
    struct Task {  // a tile at a head of keys; its first row among its thread's
        Tile tile;
        int key_head, slot, positions;
        Input queries;
        int row;
    };
    struct Own {  // of a thread
        float *pair, *normed;
        float *queries, *scores, *products, *sums, *most, *total;  // of attention
        Activations *blocks, *query_blocks;
        Rest* rests;
        int count;
        float seen;  // by reading alone
    };
    struct Cache {  // a span of a sequence's layer and head: a key is a row, a value is a column
        Matrix keys, values;
        float* scales;  // of values, where they are codes
    };

    void* allocate(size_t bytes) {
        void* p = reserve(bytes);
        if (p) regions.emplace_back(p, bytes);
        return p;
    }
    // Huge pages: fewer addresses for the processor to translate.
    void* allocate_huge(size_t bytes) {
        void* p = allocate(bytes);
#ifdef MADV_HUGEPAGE
        if (p) madvise(p, bytes, MADV_HUGEPAGE);
#endif
        return p;
    }
    // Weights lie side by side. What is not written of the last region takes no memory.
    uint8_t* allocate_weights(size_t bytes) {
        bytes = (bytes + 63) / 64 * 64;
        if (bytes > free_bytes) {
            free_bytes = std::max(bytes, (size_t)256 << 20);
            free_weights = (uint8_t*)allocate_huge(free_bytes);
            if (!free_weights) return nullptr;
        }
        free_bytes -= bytes;
        return std::exchange(free_weights, free_weights + bytes);
    }
    float* allocate_floats(size_t n) { return (float*)allocate(n * sizeof(float)); }

    Range part(int n, int t) const {
        return {(int)((int64_t)n * t / pool.size()), (int)((int64_t)n * (t + 1) / pool.size())};
    }

    // What is used in one place alone is read once a token, when much else has been read since.
    void mark_streams() {
        std::vector<int> uses(matrices.size());
        uses[head]++;
        for (const Layer& layer : layers)
            for (int number : {layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down}) uses[number]++;
        size_t bytes = 0;
        for (size_t i = 0; i < uses.size(); i++) bytes += uses[i] ? matrices[i].panels() * matrices[i].panel_bytes : 0;
        for (size_t i = 0; i < uses.size(); i++) matrices[i].streams = uses[i] == 1 && bytes > NEAR;
    }

    void forward(int t, const int32_t* ids, float* logits) {
        const int n = (int)places.size();
        // Whether the queries, keys and values that a thread makes are those that it attends with: none to wait for.
        const bool own_heads = shape.key_heads % pool.size() == 0 && keys % (PANEL * pool.size()) == 0;
        for (int c = t; c < n; c += pool.size()) {
            kernels.row(matrices[embedding], ids[c], x + (size_t)c * shape.width);
            for (size_t i = 0; i < frequencies.size(); i++) {
                const float angle = (float)places[c].position * frequencies[i];
                cosine[c * frequencies.size() + i] = std::cos(angle);
                sine[c * frequencies.size() + i] = std::sin(angle);
            }
        }
        pool.barrier();
        for (int l = 0; l < shape.layers; l++) {
            const Layer& layer = layers[l];
            const Input in = normalised(t, x, shape.width, n, &vectors[layer.attention_norm]);
            multiply(t, matrices[layer.q], in, qkv, qkv_width, false);
            multiply(t, matrices[layer.k], in, qkv + queries, qkv_width, false);
            multiply(t, matrices[layer.v], in, qkv + queries + keys, qkv_width, false);
            if (!own_heads) pool.barrier();
            place(t, layer, l);
            if (!own_heads) pool.barrier();
            attend(t, l);
            pool.barrier();
            multiply(t, matrices[layer.o], normalised(t, mixed, queries, n, nullptr), x, shape.width, true);
            pool.barrier();
            widen(t, layer, normalised(t, x, shape.width, n, &vectors[layer.ffn_norm]));
            pool.barrier();
            const Matrix& down = matrices[layer.down];
            multiply(t, down, widened(t, n, down), x, shape.width, true);
            pool.barrier();
        }
        if (wanted.empty()) return;
        const Input in = normalised(t, x, shape.width, (int)wanted.size(), &vectors[final_norm], wanted.data());
        multiply(t, matrices[head], in, logits, shape.vocabulary, false);
    }

    bool takes_blocks(const Matrix& m) const { return !shape.exact && m.quantized(); }

    void multiply(int t, const Matrix& m, const Input& in, float* out, int stride, bool add) {
        const Range mine = part(m.panels(), t);
        multiply_panels(m, mine.first, mine.last, in, out, stride, add);
    }

    void multiply_panels(const Matrix& m, int first, int last, Input in, float* out, int stride, bool add) {
        if (!takes_blocks(m)) in.blocks = nullptr;
        kernels.multiply(m, first, last, in, out, stride, add);
    }

    void multiply_one(int t, const Matrix& m, int n, float* out) {
        if (!n) {
            const Range mine = part(m.panels(), t);
            own[t].seen = kernels.read(m.data + mine.first * m.panel_bytes, (mine.last - mine.first) * m.panel_bytes);
            return;
        }
        multiply(t, m, {m.columns > shape.width ? gated : x, m.columns, inner, n, nullptr, none}, out, m.rows, false);
    }

    // n vectors, normalised if a norm is given, as floats and as blocks; `rows`: which ones, if not the first. Of one
    // vector each thread makes its own, which takes less time than waiting for another's.
    Input normalised(int t, const float* from, int width, int n, const std::vector<float>* norm, const int* rows = nullptr) {
        const bool alone = n == 1;
        float* to = alone ? own[t].normed : normed;
        Input in{norm ? to : from, width, alone ? own[t].blocks : shared, n};
        give_room(t, in);
        for (int c = alone ? 0 : t; c < n; c += alone ? 1 : pool.size()) {
            const float* vector = from + (size_t)(rows ? rows[c] : c) * width;
            if (norm) {
                kernels.normalise(vector, norm->data(), shape.eps, width, to + (size_t)c * width);
                vector = to + (size_t)c * width;
            }
            kernels.quantize(vector, width, in.blocks + c, n);
            refine(in, c, vector, width);
        }
        if (!alone) pool.barrier();
        if (width % BLOCK) in.blocks = nullptr;
        return in;
    }

    // The network's inner activations, whose blocks are made, with their rests.
    Input widened(int t, int n, const Matrix& down) {
        Input in{gated, shape.inner, inner, n};
        give_room(t, in);
        if (!takes_blocks(down)) return in;
        const bool alone = n == 1;
        for (int c = alone ? 0 : t; c < n; c += alone ? 1 : pool.size())
            refine(in, c, gated + (size_t)c * shape.inner, shape.inner);
        if (!alone) pool.barrier();
        return in;
    }

    void refine(Input& in, int c, const float* vector, int width) {
        in.counts[c] = kernels.refine(vector, width, in.blocks + c, in.n, in.rests + (size_t)c * in.room);
    }

    // For the rests: a thread's own where it makes them of one vector.
    void give_room(int t, Input& in) {
        in.rests = in.n == 1 ? own[t].rests : rests;
        in.counts = in.n == 1 ? &own[t].count : counts;
        in.room = rest_room;
    }

    // Normalise and rotate queries and keys; put keys and values into the cache. Tasks are cut head by head, as in attend.
    void place(int t, const Layer& layer, int l) {
        const int d = shape.head_width, n = (int)places.size();
        const Range mine = part(shape.key_heads * n, t);
        for (int task = mine.first; task < mine.last; task++) {
            const int key_head = task / n, c = task % n, position = places[c].position;
            float* token = qkv + (size_t)c * qkv_width;
            for (int h = key_head * group; h < (key_head + 1) * group; h++)
                turn(c, token + h * d, layer.query_norm, 1.0f / std::sqrt((float)d));
            float* key = token + queries + key_head * d;
            turn(c, key, layer.key_norm, 1);
            const Cache its = cache_of(places[c].slot, l, key_head, position / SPAN * SPAN, position + 1);
            const float scale = kernels.store(its.keys, its.values, key, key + keys, position % SPAN);
            if (its.scales) its.scales[position % SPAN] = scale;
        }
    }

    // Normalise and rotate a query or key of token c.
    void turn(int c, float* head, int norm, float scale) {
        const int d = shape.head_width;
        if (norm >= 0) kernels.normalise(head, vectors[norm].data(), shape.eps, d, head);
        kernels.rotate(head, cosine + (size_t)c * d / 2, sine + (size_t)c * d / 2, d, scale);
    }

    // A thread takes its tasks, some at a time, through one span of positions after the other, and so reads a sequence's keys and
    // values in the order in which they lie.
    void attend(int t, int l) {
        const Range its = part(shape.key_heads * (int)tiles.size(), t);
        for (int first = its.first; first < its.last; first += TASKS) attend(t, l, first, std::min(first + TASKS, its.last));
    }

    void attend(int t, int l, int first, int last) {
        const int d = shape.head_width;
        const Own& mine = own[t];
        Task tasks[TASKS];
        int longest = 0;
        for (int i = 0; i < last - first; i++) {
            const Tile& tile = tiles[(first + i) % tiles.size()];
            const Place& end = places[(tile.first + tile.n - 1) / group];
            Task& task = tasks[i] = {tile, (first + i) / (int)tiles.size(), end.slot, end.position + 1, {}, i * QUERIES};
            longest = std::max(longest, task.positions);
            float* its_queries = mine.queries + task.row * d;
            for (int j = 0; j < tile.n; j++) {
                memcpy(its_queries + j * d, row_of(task, j, qkv, qkv_width), d * sizeof(float));
                mine.most[task.row + j] = -INFINITY;
                mine.total[task.row + j] = 0;
            }
            memset(mine.sums + task.row * d, 0, tile.n * d * sizeof(float));
            task.queries = own_input(its_queries, d, mine.query_blocks + task.row * (d / BLOCK), tile.n);
        }
        for (int start = 0; start < longest; start += SPAN)
            for (const Task* task = tasks; task < tasks + last - first; task++)
                if (start < task->positions) look(t, l, *task, start);
        for (const Task* task = tasks; task < tasks + last - first; task++)
            for (int j = 0; j < task->tile.n; j++) {
                float* out = row_of(*task, j, mixed, queries);
                const float* sums = mine.sums + (task->row + j) * d;
                const float inverse = 1.0f / mine.total[task->row + j];
                for (int i = 0; i < d; i++) out[i] = sums[i] * inverse;
            }
    }

    // Two products, with a span's keys and with its values, and what makes weights of the first one's sums.
    void look(int t, int l, const Task& task, int start) {
        const int d = shape.head_width, n = task.tile.n;
        const Own& mine = own[t];
        const Cache its = cache_of(task.slot, l, task.key_head, start, task.positions);
        const int room = its.values.columns;
        float former[QUERIES];
        kernels.multiply(its.keys, 0, its.keys.panels(), task.queries, mine.scores, room, false);
        for (int j = 0; j < n; j++) {
            const int limit = std::clamp(places[(task.tile.first + j) / group].position + 1 - start, 0, SPAN);
            const int row = task.row + j;
            former[j] = kernels.weigh(mine.scores + j * room, limit, room, its.scales, mine.most + row, mine.total + row);
        }
        const Input weights = own_input(mine.scores, room, mine.blocks, n);
        kernels.multiply(its.values, 0, its.values.panels(), weights, mine.products, d, false);
        for (int j = 0; j < n; j++) {
            float *sums = mine.sums + (task.row + j) * d, *products = mine.products + j * d;
            for (int i = 0; i < d; i++) sums[i] = sums[i] * former[j] + products[i];
        }
    }

    // What stands for a task's query j in the rows of all tokens.
    float* row_of(const Task& task, int j, float* base, int stride) const {
        const int row = task.tile.first + j;
        return base + (size_t)(row / group) * stride + (task.key_head * group + row % group) * shape.head_width;
    }

    // n vectors side by side, to be multiplied with a thread's own head's keys or values. Where those are codes, blocks are made,
    // without rests: queries and weights gain little.
    Input own_input(const float* floats, int width, Activations* blocks, int n) {
        if (shape.exact || shape.cache != Q8_0) return {floats, width, nullptr, n, nullptr, none};
        for (int v = 0; v < n; v++) kernels.quantize(floats + v * width, width, blocks + v, n);
        return {floats, width, blocks, n, nullptr, none};
    }

    // The network's inner activations. As many panels of gate, then of up, are taken at a time as there is room for: of one
    // vector all of them, since a matrix that is read in one go comes faster than two that take turns.
    void widen(int t, const Layer& layer, const Input& in) {
        const Matrix &gate = matrices[layer.gate], &up = matrices[layer.up];
        const bool blocks = takes_blocks(matrices[layer.down]);
        const Range mine = part((gate.panels() + 1) / 2, t);  // two panels make a block of the product with down
        const int most = CHUNK / in.n, stride = most * BLOCK;
        float* gates = own[t].pair;
        float* ups = gates + (size_t)CHUNK * BLOCK;
        for (int pair = mine.first; pair < mine.last; pair += most) {
            const int first = 2 * pair, last = std::min(2 * std::min(pair + most, mine.last), gate.panels());
            const int row = first * PANEL, rows = std::min(last * PANEL, gate.rows) - row;
            multiply_panels(gate, first, last, in, gates - row, stride, false);
            multiply_panels(up, first, last, in, ups - row, stride, false);
            for (int c = 0; c < in.n; c++) {
                float* vector = gates + (size_t)c * stride;
                kernels.gate(vector, ups + (size_t)c * stride, rows);
                if (blocks) kernels.quantize(vector, rows, inner + (size_t)pair * in.n + c, in.n);
                memcpy(gated + (size_t)c * shape.inner + row, vector, rows * sizeof(float));
            }
        }
    }

    // What the first `positions` of a sequence left at a layer's head in the span from `start` on.
    Cache cache_of(int slot, int l, int h, int start, int positions) const {
        const Kind kind = (Kind)shape.cache;
        const int here = std::min(positions - start, SPAN);
        uint8_t* layer = span_at(slot, start / SPAN) + (size_t)l * shape.key_heads * head_bytes;
        uint8_t *head = layer + h * head_bytes, *end = layer + shape.key_heads * head_bytes;
        const ptrdiff_t ahead = head_bytes;  // the same of the next head
        return {{kind, padded(here, PANEL), shape.head_width, head, key_panel, ahead, end, false},
                {kind, shape.head_width, padded(here, BLOCK), head + values_at, value_panel, ahead, end, false},
                kind == Q8_0 ? (float*)(head + scales_at) : nullptr};
    }

    // A span holds all layers, a layer all heads, in the order in which they are read: what a thread reads of a sequence's layer is
    // one stretch a span, and memory is taken as the sequence grows.
    uint8_t* span_at(int slot, int span) const { return cache + slot * slot_bytes() + span * span_bytes; }
    size_t slot_bytes() const { return room / SPAN * span_bytes; }

    const Shape shape;
    const Kernels& kernels;
    Pool pool;
    const int queries, keys, group;
    int qkv_width = 0, room = 0;
    size_t key_panel = 0, value_panel = 0, values_at = 0, scales_at = 0, head_bytes = 0, span_bytes = 0;
    std::vector<Matrix> matrices;
    uint8_t* free_weights = nullptr;
    size_t free_bytes = 0;
    std::vector<std::vector<float>> vectors;
    std::vector<std::pair<void*, size_t>> regions;
    std::vector<Own> own;
    std::vector<Place> places;  // of the pass at hand
    std::vector<Tile> tiles;
    std::vector<int> wanted;
    std::vector<float> frequencies;
    float *x, *normed, *qkv, *mixed, *gated, *cosine, *sine;
    Activations *shared, *inner;
    Rest* rests;
    int counts[CHUNK], none[CHUNK] = {}, rest_room = 0;
    uint8_t* cache = nullptr;
};

}  // namespace

// Names of the sets of kernels that this processor can run, best first, one a line.
API const char* mobillama_kernels() {
    static const std::string names = [] {
        std::string all;
        for (const Kernels* each : usable_kernels()) all += std::string(all.empty() ? "" : "\n") + each->name;
        return all;
    }();
    return names.c_str();
}

// Null: no such kernels here, or no memory.
API Model* mobillama_new(const Shape* shape, int threads, const char* kernels) {
    for (const Kernels* each : usable_kernels())
        if (!strcmp(each->name, kernels)) return new (std::nothrow) Model(*shape, threads, *each);
    return nullptr;
}

API void mobillama_free(Model* model) { delete model; }

API int mobillama_add_matrix(Model* model, int kind, int rows, int columns, const uint8_t* file) {
    return model->add_matrix((Kind)kind, rows, columns, file);
}

API int mobillama_add_vector(Model* model, const float* values, int n) { return model->add_vector(values, n); }

// What loading left behind in the heap goes back to the system.
API int mobillama_prepare(Model* model, const Layer* layers, int n, int embedding, int head, int final_norm) {
    model->layers.assign(layers, layers + n);
    model->embedding = embedding;
    model->head = head;
    model->final_norm = final_norm;
#ifdef __GLIBC__
    malloc_trim(0);
#endif
    return model->prepare();
}

API size_t mobillama_cache_bytes(const Model* model) { return model->cache_bytes(); }

API int mobillama_chunk() { return CHUNK; }

API void mobillama_feed(Model* model, const int32_t* ids, const Run* runs, int count, float* logits) {
    model->feed(ids, runs, count, logits);
}

API void mobillama_copy(Model* model, int from, int to, int positions) { model->copy(from, to, positions); }

API void mobillama_multiply_only(Model* model, int parts, int n, int in_step, float* out) {
    model->multiply_only(parts, n, in_step, out);
}
