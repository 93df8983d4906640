// Sixteen lanes as two registers of AVX2, with AVX-VNNI where the compiler may use it.
#pragma once
#include <immintrin.h>

namespace {
struct V {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};
using Bytes = I;
constexpr int COLUMNS = 4;

inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline V set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V larger(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline V smaller(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline V magnitude(V x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline V nearest(V x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 power_of_two(__m256 whole) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
}
inline V power_of_two(V whole) { return {power_of_two(whole.a), power_of_two(whole.b)}; }
inline float sum(V x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float largest(V x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}

inline V load_half(const void* p) {
    const __m128i* q = (const __m128i*)p;
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline __m256 load_bfloat(const __m128i* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
inline V load_bfloat(const void* p) { return {load_bfloat((const __m128i*)p), load_bfloat((const __m128i*)p + 1)}; }
inline void store_half(uint16_t* p, V x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, mode));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, mode));
}
inline int store_codes(int8_t* p, V whole) {
    const __m256i a = _mm256_cvtps_epi32(whole.a), b = _mm256_cvtps_epi32(whole.b);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
    const __m256i s = _mm256_add_epi32(a, b);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xB1)));
}

inline I seti(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline Bytes low(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes high(Bytes x) { return low(Bytes{_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
inline __m256i dot(__m256i acc, __m256i w, __m256i x) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
    // Two products of at most 128 * 127 fit 16 bits.
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
#endif
}
inline I dot(I acc, Bytes w, const int8_t* x) {
    const __m256i four = _mm256_set1_epi32(four_codes(x));
    return {dot(acc.a, w.a, four), dot(acc.b, w.b, four)};
}
inline I start_signed(int) { return seti(0); }
inline Bytes make_signed(Bytes w) { return w; }
inline I dot_signed(I acc, Bytes w, const int8_t* x) {  // |w| * (x with the sign of w)
    const __m256i four = _mm256_set1_epi32(four_codes(x));
    return {dot(acc.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(four, w.a)),
            dot(acc.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(four, w.b))};
}
}  // namespace
