// Sixteen lanes as four registers of NEON, with 8-bit dot products where the compiler may use them (Armv8.2 and later).
#pragma once
#include <arm_neon.h>

namespace {
struct V {
    float32x4_t v[4];
};
struct I {
    int32x4_t v[4];
};
struct Bytes {
    int8x16_t v[4];
};
constexpr int COLUMNS = 4;

template <class F>
inline V each(F f) {
    return {{f(0), f(1), f(2), f(3)}};
}
inline V load(const float* p) {
    return each([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, V a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
inline V set(float a) {
    return each([&](int) { return vdupq_n_f32(a); });
}
inline V add(V a, V b) {
    return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline V mul(V a, V b) {
    return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline V div(V a, V b) {
    return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline V fma(V a, V b, V c) {
    return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline V larger(V a, V b) {
    return each([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); });
}
inline V smaller(V a, V b) {
    return each([&](int i) { return vminq_f32(a.v[i], b.v[i]); });
}
inline V magnitude(V a) {
    return each([&](int i) { return vabsq_f32(a.v[i]); });
}
inline V nearest(V a) {
    return each([&](int i) { return vrndnq_f32(a.v[i]); });
}
inline V power_of_two(V whole) {
    return each([&](int i) {
        return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(whole.v[i]), vdupq_n_s32(127)), 23));
    });
}
inline float sum(V a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]))); }
inline float largest(V a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))); }

inline V load_half(const void* p) {
    return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p + 4 * i))); });
}
inline V load_bfloat(const void* p) {
    return each([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)p + 4 * i), 16)); });
}
inline void store_half(uint16_t* p, V a) {
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
inline int store_codes(int8_t* p, V whole) {
    int32x4_t w[4];
    for (int i = 0; i < 4; i++) w[i] = vcvtnq_s32_f32(whole.v[i]);
    vst1_s8(p, vqmovn_s16(vcombine_s16(vqmovn_s32(w[0]), vqmovn_s32(w[1]))));
    vst1_s8(p + 8, vqmovn_s16(vcombine_s16(vqmovn_s32(w[2]), vqmovn_s32(w[3]))));
    return vaddvq_s32(vaddq_s32(vaddq_s32(w[0], w[1]), vaddq_s32(w[2], w[3])));
}

inline I seti(int a) { return {{vdupq_n_s32(a), vdupq_n_s32(a), vdupq_n_s32(a), vdupq_n_s32(a)}}; }
inline V to_float(I a) {
    return each([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
inline Bytes load_bytes(const uint8_t* p) {
    const int8_t* q = (const int8_t*)p;
    return {{vld1q_s8(q), vld1q_s8(q + 16), vld1q_s8(q + 32), vld1q_s8(q + 48)}};
}
inline Bytes low(Bytes a) {
    for (auto& v : a.v) v = vandq_s8(v, vdupq_n_s8(15));
    return a;
}
inline Bytes high(Bytes a) {
    for (auto& v : a.v) v = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(v), 4));
    return a;
}
inline I dot(I acc, Bytes w, const int8_t* x) {
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(four_codes(x)));
    for (int i = 0; i < 4; i++) {
#ifdef __ARM_FEATURE_DOTPROD
        acc.v[i] = vdotq_s32(acc.v[i], w.v[i], four);
#else
        const int16x8_t a = vmull_s8(vget_low_s8(w.v[i]), vget_low_s8(four));
        const int16x8_t b = vmull_high_s8(w.v[i], four);
        acc.v[i] = vaddq_s32(acc.v[i], vpaddq_s32(vpaddlq_s16(a), vpaddlq_s16(b)));
#endif
    }
    return acc;
}
inline I start_signed(int) { return seti(0); }
inline Bytes make_signed(Bytes w) { return w; }
inline I dot_signed(I acc, Bytes w, const int8_t* x) { return dot(acc, w, x); }
}  // namespace
