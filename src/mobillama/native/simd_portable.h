// Sixteen lanes in plain C++, for any processor.
#pragma once
#include <cmath>
#include <cstring>

namespace {
struct V {
    float v[16];
};
struct I {
    int32_t v[16];
};
struct Bytes {
    uint8_t v[64];
};
constexpr int COLUMNS = 2;

template <class F>
inline V each(F f) {
    V out;
    for (int i = 0; i < 16; i++) out.v[i] = f(i);
    return out;
}
template <class T, class U>
inline T bits(U from) {
    static_assert(sizeof(T) == sizeof(U));
    T to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline V load(const float* p) {
    return each([&](int i) { return p[i]; });
}
inline void store(float* p, V a) { memcpy(p, a.v, sizeof a.v); }
inline V set(float a) {
    return each([&](int) { return a; });
}
inline V add(V a, V b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline V mul(V a, V b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline V div(V a, V b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline V fma(V a, V b, V c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline V larger(V a, V b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline V smaller(V a, V b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline V magnitude(V a) {
    return each([&](int i) { return fabsf(a.v[i]); });
}
inline V nearest(V a) {
    return each([&](int i) { return nearbyintf(a.v[i]); });
}
inline V power_of_two(V whole) {
    return each([&](int i) { return bits<float>(((int32_t)whole.v[i] + 127) << 23); });
}
inline float sum(V a) {
    float s = 0;
    for (float x : a.v) s += x;
    return s;
}
inline float largest(V a) {
    float m = a.v[0];
    for (float x : a.v) m = x > m ? x : m;
    return m;
}

inline float from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7FFF;
    if (rest >= 0x7C00) return bits<float>(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest < 0x400) return bits<float>(sign | bits<uint32_t>((float)rest * 0x1p-24f));
    return bits<float>(sign | ((rest << 13) + (112u << 23)));
}
inline uint16_t to_half(float x) {
    const uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, rest = u & 0x7FFFFFFF;
    if (rest > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (rest >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
    if (rest < 0x38800000) return (uint16_t)(sign | (uint32_t)nearbyintf(bits<float>(rest) * 0x1p24f));
    return (uint16_t)(sign | (rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13);
}
inline V load_half(const void* p) {
    return each([&](int i) { return from_half(((const uint16_t*)p)[i]); });
}
inline V load_bfloat(const void* p) {
    return each([&](int i) { return bits<float>((uint32_t)((const uint16_t*)p)[i] << 16); });
}
inline void store_half(uint16_t* p, V a) {
    for (int i = 0; i < 16; i++) p[i] = to_half(a.v[i]);
}
inline int store_codes(int8_t* p, V whole) {
    int s = 0;
    for (int i = 0; i < 16; i++) s += p[i] = (int8_t)whole.v[i];
    return s;
}

inline I seti(int a) {
    I out;
    for (int32_t& x : out.v) x = a;
    return out;
}
inline V to_float(I a) {
    return each([&](int i) { return (float)a.v[i]; });
}
inline Bytes load_bytes(const uint8_t* p) {
    Bytes out;
    memcpy(out.v, p, sizeof out.v);
    return out;
}
inline Bytes low(Bytes a) {
    for (uint8_t& x : a.v) x &= 15;
    return a;
}
inline Bytes high(Bytes a) {
    for (uint8_t& x : a.v) x >>= 4;
    return a;
}
inline I dot(I acc, Bytes w, const int8_t* x) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++) acc.v[i] += (int8_t)w.v[4 * i + j] * x[j];
    return acc;
}
inline I start_signed(int) { return seti(0); }
inline Bytes make_signed(Bytes w) { return w; }
inline I dot_signed(I acc, Bytes w, const int8_t* x) { return dot(acc, w, x); }
}  // namespace
