// What a set of kernels offers, and how matrices lie in memory. One set is compiled for each instruction set (kernels.cpp).
//
// A packed matrix is cut into panels of 16 rows. Four neighbouring numbers of a row are four neighbouring bytes (or half
// bytes), followed by those of the next row: 64 bytes feed one 8-bit dot-product instruction whose 16 sums are 16 rows.
// No sum runs across lanes, and one layout serves every instruction set. A packed matrix takes the bytes of the file's.
//
//   quantized panel: pairs of blocks of 32 columns, each [scales 2x16 fp16][Q4_1: minima 2x16 fp16][codes of both blocks]
//     codes, Q4: 4 x 64 bytes; byte (i, row, j) holds column 4i + j in its low half and column 16 + 4i + j in its high half
//     codes, Q8: 8 x 64 bytes; byte (i, row, j) holds column 4i + j
//   float panel: for each column 16 numbers, as wide as in the file
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

constexpr int PANEL = 16;  // rows
constexpr int BLOCK = 32;  // columns that share a scale

// ggml's numbers of the types.
enum Kind : int32_t { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, BF16 = 30 };

struct Matrix {
    Kind kind;
    int rows, columns;
    uint8_t* data;
    size_t panel_bytes;
    ptrdiff_t ahead;     // what lies so many bytes further on, and before `end`, is fetched while codes are multiplied
    const uint8_t* end;
    bool streams;        // no cache keeps it until it is read again: it shall not displace what one does keep

    int panels() const { return (rows + PANEL - 1) / PANEL; }
    bool quantized() const { return kind == Q4_0 || kind == Q4_1 || kind == Q8_0; }
};

// 32 activations: code times scale. A 4-bit weight is code - 8: minus eight times the sum of the activations' codes is what
// the products with its bare code have too much, negated.
struct Activations {
    int8_t codes[BLOCK];
    float scale;
    int32_t minus_eight_sums;
};

// What 8 bits left of block `group` of a vector, in 8 bits again. Blocks whose scale is far above the vector's mean have one:
// few blocks make most of the rounding error, those that an outlier stands in.
struct Rest {
    int32_t group;
    Activations block;
};
constexpr float FAR_ABOVE = 3;  // times the mean scale

// What a matrix is multiplied with: n vectors, as floats (vector v at floats + v * stride) and, for quantized matrices
// unless `blocks` is null, as blocks (block g of vector v at blocks[g * n + v]) and their rests (counts[v] from rests + v * room).
struct Input {
    const float* floats;
    int stride;
    Activations* blocks;
    int n;
    Rest* rests;
    int* counts;
    int room;
};

struct Kernels {
    const char* name;
    // out[v * stride + row] (+)= matrix row . vector v, for the rows of panels first...last-1
    void (*multiply)(const Matrix&, int first, int last, const Input&, float* out, int stride, bool add);
    // y = x / sqrt(mean(x^2) + eps) * weight
    void (*normalise)(const float* x, const float* weight, float eps, int n, float* y);
    // blocks[g * stride] = block g of x
    void (*quantize)(const float* x, int n, Activations* blocks, int stride);
    // Write the rests of x, of which these are the blocks; return how many.
    int (*refine)(const float* x, int n, const Activations* blocks, int stride, Rest* rests);
    // gate = silu(gate) * up
    void (*gate)(float* gate, const float* up, int n);
    // Rotate the pairs (x[i], x[i + n/2]), then multiply with a scale.
    void (*rotate)(float* x, const float* cosine, const float* sine, int n, float scale);
    // Put a key into row `position` of a matrix, F16 or Q8_0, and a value into that column of another. The value's scale is
    // returned, which the column's codes lack.
    float (*store)(const Matrix& keys, const Matrix& values, const float* key, const float* value, int position);
    // Make the first `limit` scores e^(score - most), times `factors` if there are any, and zero those that follow up to `room`.
    // `most` is the largest score so far, `total` the sum of all so far without their factors; both are brought up to date.
    // What was made with the former `most` is to be multiplied with the result.
    float (*weigh)(float* scores, int limit, int room, const float* factors, float* most, float* total);
    void (*row)(const Matrix&, int row, float* out);
    // Load whole lines of 64 bytes and keep their maximum: the bound of whatever streams.
    float (*read)(const uint8_t* lines, size_t bytes);
};

static inline int32_t four_codes(const int8_t* codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    return four;
}

static inline int padded(int n, int to) { return (n + to - 1) / to * to; }

// Where the parts of a quantized panel lie.
struct Layout {
    int minima, codes, block_bytes, pair_bytes;
};
static inline constexpr Layout layout_of(Kind kind) {
    return kind == Q8_0 ? Layout{0, 64, 512, 64 + 1024}
           : kind == Q4_1 ? Layout{64, 128, 256, 128 + 512}
                          : Layout{0, 64, 256, 64 + 512};
}
