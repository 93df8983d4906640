// All that computes, written once over sixteen lanes and compiled for each instruction set (build.py states the flags).
//
// Nothing here has external linkage but the table at the end: a function that two compilations shared could end up, in the
// linked library, in the form that the processor at hand cannot run.
#include "kernels.h"

#if defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

// Sums that live across a loop stay in registers only where the loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

// e^x; the remainder to the nearest power of two is within ±ln(2)/2, where six terms reach float's precision.
inline V exponential(V x) {
    x = larger(smaller(x, set(88.0f)), set(-87.0f));
    const V whole = nearest(mul(x, set(1.44269504f)));
    const V r = fma(whole, set(2.12194440e-4f), fma(whole, set(-0.693359375f), x));
    V p = set(1.0f / 720);
    constexpr float terms[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float term : terms) p = fma(p, r, set(term));
    return mul(p, power_of_two(whole));
}

// Sixteen numbers of which only the first n exist.
inline V load_part(const float* p, int n) {
    float part[16] = {};
    memcpy(part, p, n * sizeof(float));
    return load(part);
}
inline V first_of(V a, int n) {
    float all[16];
    store(all, a);
    return load_part(all, n);
}
inline float first_number(V a) {
    float all[16];
    store(all, a);
    return all[0];
}
inline void store_part(float* p, V a, int n) {
    float part[16];
    store(part, a);
    memcpy(p, part, n * sizeof(float));
}

struct Q4 {
    static constexpr Kind kind = Q4_0;
    static I start(const Activations& x) { return seti(x.minus_eight_sums); }
    static Bytes codes(const uint8_t* p, int four) {
        const Bytes both = load_bytes(p + 64 * (four % 4));
        return four < 4 ? low(both) : high(both);
    }
    static I times(I acc, Bytes w, const int8_t* x) { return dot(acc, w, x); }
};
struct Q4WithMinimum : Q4 {
    static constexpr Kind kind = Q4_1;
    static I start(const Activations&) { return seti(0); }
};
struct Q8 {
    static constexpr Kind kind = Q8_0;
    static I start(const Activations& x) { return start_signed(x.minus_eight_sums); }
    static Bytes codes(const uint8_t* p, int four) { return make_signed(load_bytes(p + 64 * four)); }
    static I times(I acc, Bytes w, const int8_t* x) { return dot_signed(acc, w, x); }
};

// Products of one panel with N vectors, in 8-bit arithmetic.
template <class Format, int N, bool streams>
inline void quantized_panel(const Matrix& m, const uint8_t* panel, const Activations* x, int stride, V* sums) {
    constexpr Layout layout = layout_of(Format::kind);
    const int groups = m.columns / BLOCK;
    const ptrdiff_t distance = m.ahead;
    const uint8_t* end = m.end;
    V acc[N];
    for (int v = 0; v < N; v++) acc[v] = set(0);
    for (int g = 0; g < groups; g++) {
        const uint8_t* pair = panel + (size_t)(g / 2) * layout.pair_bytes;
        const uint8_t* codes = pair + layout.codes + g % 2 * layout.block_bytes;
        const V scale = load_half(pair + g % 2 * 32);
        const uint8_t* ahead = codes + distance < end ? codes + distance : codes;
        for (int line = 0; line < layout.block_bytes; line += 64) __builtin_prefetch(ahead + line, 0, streams ? 0 : 3);
        Bytes w[8];
        UNROLL
        for (int i = 0; i < 8; i++) w[i] = Format::codes(codes, i);
        const Activations* block = x + (size_t)g * stride;
        UNROLL
        for (int v = 0; v < N; v++) {
            I whole = Format::start(block[v]);
            UNROLL
            for (int i = 0; i < 8; i++) whole = Format::times(whole, w[i], block[v].codes + 4 * i);
            acc[v] = fma(to_float(whole), mul(scale, set(block[v].scale)), acc[v]);
            if (Format::kind == Q4_1) {
                const V minimum = load_half(pair + layout.minima + g % 2 * 32);
                acc[v] = fma(minimum, set(block[v].scale * -0.125f * (float)block[v].minus_eight_sums), acc[v]);
            }
        }
    }
    for (int v = 0; v < N; v++) sums[v] = acc[v];
}

// Add the products with a vector's rests. Not inline: it must not take registers from the loops above.
template <class Format>
__attribute__((noinline)) void add_rests(const uint8_t* panel, const Rest* rests, int n, V* sum) {
    constexpr Layout layout = layout_of(Format::kind);
    V acc = *sum;
    for (int r = 0; r < n; r++) {
        const int g = rests[r].group;
        const Activations& x = rests[r].block;
        const uint8_t* pair = panel + (size_t)(g / 2) * layout.pair_bytes;
        I whole = Format::start(x);
        UNROLL
        for (int i = 0; i < 8; i++)
            whole = Format::times(whole, Format::codes(pair + layout.codes + g % 2 * layout.block_bytes, i), x.codes + 4 * i);
        acc = fma(to_float(whole), mul(load_half(pair + g % 2 * 32), set(x.scale)), acc);
        if (Format::kind == Q4_1) {
            const V minimum = load_half(pair + layout.minima + g % 2 * 32);
            acc = fma(minimum, set(x.scale * -0.125f * (float)x.minus_eight_sums), acc);
        }
    }
    *sum = acc;
}

// The same in floats: what the 8-bit products are compared with.
template <class Format>
void exact_panel(const uint8_t* panel, int columns, const float* x, int stride, int n, V* sums) {
    constexpr Layout layout = layout_of(Format::kind);
    for (int v = 0; v < n; v++) sums[v] = set(0);
    for (int column = 0; column < columns; column++) {
        const int g = column / BLOCK, k = column % BLOCK;
        const uint8_t* pair = panel + (size_t)(g / 2) * layout.pair_bytes;
        const uint8_t* codes = pair + layout.codes + g % 2 * layout.block_bytes;
        float code[16];
        for (int row = 0; row < PANEL; row++)
            if (Format::kind == Q8_0)
                code[row] = (float)(int8_t)codes[k / 4 * 64 + row * 4 + k % 4];
            else
                code[row] = (float)(codes[k % 16 / 4 * 64 + row * 4 + k % 4] >> k / 16 * 4 & 15);
        V w = load(code);
        if (Format::kind == Q4_0) w = add(w, set(-8));
        w = mul(w, load_half(pair + g % 2 * 32));
        if (Format::kind == Q4_1) w = add(w, load_half(pair + layout.minima + g % 2 * 32));
        for (int v = 0; v < n; v++) sums[v] = fma(w, set(x[(size_t)v * stride + column]), sums[v]);
    }
}

template <class Format, int N>
inline void panel_in_blocks(const Matrix& m, const uint8_t* panel, const Input& in, int first, V* sums) {
    if (m.streams && in.n <= COLUMNS)  // else it is read again at once
        quantized_panel<Format, N, true>(m, panel, in.blocks + first, in.n, sums);
    else
        quantized_panel<Format, N, false>(m, panel, in.blocks + first, in.n, sums);
    for (int v = 0; v < N; v++)
        if (const int n = in.counts[first + v]) add_rests<Format>(panel, in.rests + (size_t)(first + v) * in.room, n, sums + v);
}

inline V load_number(const uint8_t* p, Kind kind) {
    return kind == F32 ? load((const float*)p) : kind == F16 ? load_half(p) : load_bfloat(p);
}

template <Kind kind, int N>
inline void float_panel(const uint8_t* panel, int columns, const float* x, int stride, V* sums) {
    constexpr int width = PANEL * (kind == F32 ? 4 : 2);
    V acc[N];
    for (int v = 0; v < N; v++) acc[v] = set(0);
    for (int column = 0; column < columns; column++) {
        const V w = load_number(panel + (size_t)column * width, kind);
        UNROLL
        for (int v = 0; v < N; v++) acc[v] = fma(w, set(x[(size_t)v * stride + column]), acc[v]);
    }
    for (int v = 0; v < N; v++) sums[v] = acc[v];
}

template <int N>
void panel_times(const Matrix& m, const uint8_t* panel, const Input& in, int first, V* sums) {
    const float* x = in.floats ? in.floats + (size_t)first * in.stride : nullptr;
    switch (m.kind) {
        case Q4_0:
            return in.blocks ? panel_in_blocks<Q4, N>(m, panel, in, first, sums)
                             : exact_panel<Q4>(panel, m.columns, x, in.stride, N, sums);
        case Q4_1:
            return in.blocks ? panel_in_blocks<Q4WithMinimum, N>(m, panel, in, first, sums)
                             : exact_panel<Q4WithMinimum>(panel, m.columns, x, in.stride, N, sums);
        case Q8_0:
            return in.blocks ? panel_in_blocks<Q8, N>(m, panel, in, first, sums)
                             : exact_panel<Q8>(panel, m.columns, x, in.stride, N, sums);
        case F32: return float_panel<F32, N>(panel, m.columns, x, in.stride, sums);
        case F16: return float_panel<F16, N>(panel, m.columns, x, in.stride, sums);
        case BF16: return float_panel<BF16, N>(panel, m.columns, x, in.stride, sums);
    }
}

// Products of panels with n <= N vectors, from vector v on.
template <int N>
void panels_times(int n, const Matrix& m, int first, int last, const Input& in, int v, float* out, int stride, bool add_to) {
    if constexpr (N > 1)
        if (n < N) return panels_times<N - 1>(n, m, first, last, in, v, out, stride, add_to);
    for (int p = first; p < last; p++) {
        const int rows = m.rows - p * PANEL < PANEL ? m.rows - p * PANEL : PANEL;
        V sums[N];
        panel_times<N>(m, m.data + (size_t)p * m.panel_bytes, in, v, sums);
        for (int i = 0; i < N; i++) {
            float* to = out + (size_t)(v + i) * stride + p * PANEL;
            if (rows == PANEL)
                store(to, add_to ? add(load(to), sums[i]) : sums[i]);
            else
                store_part(to, add_to ? add(load_part(to, rows), sums[i]) : sums[i], rows);
        }
    }
}

void multiply(const Matrix& m, int first, int last, const Input& in, float* out, int stride, bool add_to) {
    if (in.n <= COLUMNS) return panels_times<COLUMNS>(in.n, m, first, last, in, 0, out, stride, add_to);
    for (int p = first; p < last; p++)  // a panel stays near while all vectors pass by
        for (int v = 0, n; v < in.n; v += n) {
            const int left = in.n - v, passes = (left + COLUMNS - 1) / COLUMNS;
            n = (left + passes - 1) / passes;  // passes of one width, none of them narrow
            panels_times<COLUMNS>(n, m, p, p + 1, in, v, out, stride, add_to);
        }
}

void normalise(const float* x, const float* weight, float eps, int n, float* y) {
    V squares = set(0);
    int i = 0;
    for (; i + 16 <= n; i += 16) squares = fma(load(x + i), load(x + i), squares);
    const V rest = load_part(x + i, n - i);
    const float mean = sum(fma(rest, rest, squares)) / (float)n;
    const float factor = 1.0f / __builtin_sqrtf(mean + eps);
    for (i = 0; i + 16 <= n; i += 16) store(y + i, mul(mul(load(x + i), set(factor)), load(weight + i)));
    for (; i < n; i++) y[i] = x[i] * factor * weight[i];
}

// Whole numbers that eight bits hold, also of what is infinite or no number.
inline V code(V x) { return larger(smaller(nearest(x), set(127)), set(-127)); }

void quantize(const float* x, int n, Activations* blocks, int stride) {
    for (int g = 0; g < n / BLOCK; g++, x += BLOCK, blocks += stride) {
        const V a = load(x), b = load(x + 16);
        const float most = largest(larger(magnitude(a), magnitude(b)));
        const V inverse = set(most > 0 ? 127.0f / most : 0.0f);
        blocks->scale = most / 127.0f;
        const int first = store_codes(blocks->codes, code(mul(a, inverse)));
        const int second = store_codes(blocks->codes + 16, code(mul(b, inverse)));
        blocks->minus_eight_sums = -8 * (first + second);
    }
}

int refine(const float* x, int n, const Activations* blocks, int stride, Rest* rests) {
    const int groups = n / BLOCK;
    float total = 0;
    for (int g = 0; g < groups; g++) total += blocks[(size_t)g * stride].scale;
    const float least = FAR_ABOVE * total / (float)groups;
    int count = 0;
    for (int g = 0; g < groups; g++) {
        const Activations& block = blocks[(size_t)g * stride];
        if (!(block.scale > least)) continue;
        float left[BLOCK];
        for (int i = 0; i < BLOCK; i++) left[i] = x[g * BLOCK + i] - (float)block.codes[i] * block.scale;
        rests[count].group = g;
        quantize(left, BLOCK, &rests[count++].block, 1);
    }
    return count;
}

inline V silu_times(V gate, V up) {
    const V denominator = add(set(1), exponential(mul(gate, set(-1))));
    return mul(div(gate, denominator), up);
}
void gate(float* gate, const float* up, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) store(gate + i, silu_times(load(gate + i), load(up + i)));
    if (i < n) store_part(gate + i, silu_times(load_part(gate + i, n - i), load_part(up + i, n - i)), n - i);
}

void rotate(float* x, const float* cosine, const float* sine, int n, float scale) {
    const int half = n / 2;
    for (int i = 0; i < half; i++) {
        const float a = x[i] * scale, b = x[i + half] * scale;
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

// Halves that no number of a cache exceeds.
inline void store_clamped(uint16_t* halves, V x) { store_half(halves, larger(smaller(x, set(65504.0f)), set(-65504.0f))); }

void store_halves(const Matrix& keys, const Matrix& values, const float* key, const float* value, int position) {
    const int width = keys.columns;
    uint16_t* row = (uint16_t*)(keys.data + (size_t)(position / PANEL) * keys.panel_bytes) + position % PANEL;
    for (int i = 0; i < width; i += PANEL) {
        const int n = width - i < PANEL ? width - i : PANEL;
        uint16_t halves[PANEL];
        store_clamped(halves, load_part(key + i, n));
        for (int j = 0; j < n; j++) row[(size_t)(i + j) * PANEL] = halves[j];
        uint16_t* panel = (uint16_t*)(values.data + (size_t)(i / PANEL) * values.panel_bytes);
        store_clamped(panel + (size_t)position * PANEL, load_part(value + i, n));
    }
}

// A key has a scale for each of its blocks, as in a file. A value's numbers stand in as many blocks, each of 32 positions: it
// has one scale, which the position's probability is to be multiplied with, and the blocks' scales are one.
float store_codes_of(const Matrix& keys, const Matrix& values, const float* key, const float* value, int position) {
    constexpr Layout layout = layout_of(Q8_0);
    const int width = keys.columns, row = position % PANEL;
    uint16_t halves[PANEL];
    for (int g = 0; g < width / BLOCK; g++) {
        uint8_t* pair = keys.data + (size_t)(position / PANEL) * keys.panel_bytes + (size_t)(g / 2) * layout.pair_bytes;
        Activations block;
        quantize(key + g * BLOCK, BLOCK, &block, 1);
        store_clamped(halves, set(block.scale));
        memcpy(pair + g % 2 * 32 + 2 * row, halves, 2);
        uint8_t* codes = pair + layout.codes + g % 2 * layout.block_bytes + 4 * row;
        for (int i = 0; i < BLOCK / 4; i++) memcpy(codes + 64 * i, block.codes + 4 * i, 4);
    }

    V most = set(0);
    for (int i = 0; i < width; i += PANEL) most = larger(most, magnitude(load(value + i)));
    const float scale = largest(most) / 127.0f;
    const V inverse = set(scale > 0 ? 1.0f / scale : 0.0f);
    const int g = position / BLOCK, k = position % BLOCK;
    store_half(halves, set(1));
    for (int i = 0; i < width; i += PANEL) {
        uint8_t* pair = values.data + (size_t)(i / PANEL) * values.panel_bytes + (size_t)(g / 2) * layout.pair_bytes;
        if (k == 0) memcpy(pair + g % 2 * 32, halves, sizeof halves);
        int8_t codes[PANEL];
        store_codes(codes, code(mul(load(value + i), inverse)));
        uint8_t* column = pair + layout.codes + g % 2 * layout.block_bytes + k / 4 * 64 + k % 4;
        for (int j = 0; j < PANEL; j++) column[4 * j] = (uint8_t)codes[j];
    }
    return scale;
}

float store_position(const Matrix& keys, const Matrix& values, const float* key, const float* value, int position) {
    if (keys.kind == Q8_0) return store_codes_of(keys, values, key, value, position);
    store_halves(keys, values, key, value, position);
    return 1;
}

float weigh(float* scores, int limit, int room, const float* factors, float* most, float* total) {
    float former = 1;
    if (limit > 0) {
        for (int s = limit; s < padded(limit, 16); s++) scores[s] = -__builtin_inff();
        V largest_here = load(scores);
        for (int s = 16; s < limit; s += 16) largest_here = larger(largest_here, load(scores + s));
        const float now = largest(larger(largest_here, set(*most)));
        former = first_number(exponential(set(*most - now)));
        V sum_here = set(0);
        for (int s = 0; s < limit; s += 16) {
            V p = exponential(add(load(scores + s), set(-now)));
            if (limit - s < 16) p = first_of(p, limit - s);
            sum_here = add(sum_here, p);
            // Of positions that follow the factor may be infinite: what stood there before is nobody's business.
            const V factor = !factors ? set(1) : limit - s < 16 ? load_part(factors + s, limit - s) : load(factors + s);
            store(scores + s, mul(p, factor));
        }
        *most = now;
        *total = *total * former + sum(sum_here);
    }
    for (int s = padded(limit, 16); s < room; s++) scores[s] = 0;
    return former;
}

void row_of(const Matrix& m, int row, float* out) {
    const uint8_t* panel = m.data + (size_t)(row / PANEL) * m.panel_bytes;
    const int r = row % PANEL;
    if (!m.quantized()) {
        const int width = m.kind == F32 ? 4 : 2;
        for (int column = 0; column < m.columns; column++) {
            float sixteen[16];
            store(sixteen, load_number(panel + (size_t)column * PANEL * width, m.kind));
            out[column] = sixteen[r];
        }
        return;
    }
    const Layout layout = layout_of(m.kind);
    for (int g = 0; g < m.columns / BLOCK; g++, out += BLOCK) {
        const uint8_t* pair = panel + (size_t)(g / 2) * layout.pair_bytes;
        const uint8_t* codes = pair + layout.codes + g % 2 * layout.block_bytes + 4 * r;
        float scale[16], minimum[16] = {};
        store(scale, load_half(pair + g % 2 * 32));
        if (m.kind == Q4_1) store(minimum, load_half(pair + layout.minima + g % 2 * 32));
        for (int k = 0; k < BLOCK; k++) {
            const int code = m.kind == Q8_0 ? (int8_t)codes[k / 4 * 64 + k % 4]
                                            : (codes[k % 16 / 4 * 64 + k % 4] >> k / 16 * 4 & 15) - (m.kind == Q4_0 ? 8 : 0);
            out[k] = (float)code * scale[r] + minimum[r];
        }
    }
}

float read_lines(const uint8_t* lines, size_t bytes) {
    V most[4] = {set(0), set(0), set(0), set(0)};
    for (size_t i = 0; i + 256 <= bytes; i += 256) {
        UNROLL
        for (int j = 0; j < 4; j++) {
            __builtin_prefetch(lines + i + 64 * j + 4096);
            most[j] = larger(most[j], load((const float*)(lines + i + 64 * j)));
        }
    }
    return largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

}  // namespace

#define STRING(name) #name
#define NAME(name) STRING(name)
#define TABLE_OF(name) kernels_##name
#define TABLE(name) TABLE_OF(name)
extern const Kernels TABLE(KERNELS);
const Kernels TABLE(KERNELS) = {NAME(KERNELS), multiply, normalise, quantize, refine, gate,
                                rotate, store_position, weigh, row_of, read_lines};
