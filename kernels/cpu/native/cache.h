// Keys and values as the paged cache keeps them; kernels/kv_formats.py has the table and the arithmetic.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

struct Fp8 { uint8_t bits; };  // e4m3
struct Int8 { int8_t value; };
struct Int4 { uint8_t pair; };  // dimensions 2j (low half) and 2j + 1

template <class E>
constexpr bool QUANTIZED = !std::is_same_v<E, float> && !std::is_same_v<E, uint16_t>;
template <class E>
constexpr int64_t PACKED = std::is_same_v<E, Int4> ? 2 : 1;  // dimensions in an element

// The keys or the values of a layer. A row is one head of one slot.
template <class E>
struct Side {
    E* payload;        // [blocks, block, kv_heads, dim / PACKED]
    uint16_t* scales;  // float16 [blocks, block, kv_heads, 1], of INT4 2: scale and minimum; else null

    E* row(int64_t index, int64_t dim) const { return payload + index * (dim / PACKED<E>); }
};

// -- numbers ----------------------------------------------------------------------------------------------------------

inline float from_half(uint16_t half) {  // finite; the product moves the exponent, of subnormals too
    const float size = same_bits<float>(uint32_t(half & 0x7fff) << 13) * 0x1p112f;
    return half & 0x8000 ? -size : size;
}

constexpr float MOST_HALF = 65504.0f;

inline float round_to_even(float x) { return (x + 12582912.0f) - 12582912.0f; }  // |x| < 2^22

inline uint16_t to_half(float value) {  // |value| ≤ MOST_HALF; to nearest, ties to even
    const uint32_t sign = (same_bits<uint32_t>(value) >> 16) & 0x8000;
    const float size = std::fabs(value);
    if (size < 0x1p-14f) return uint16_t(sign | uint32_t(round_to_even(size * 0x1p24f)));
    const uint32_t bits = same_bits<uint32_t>(size) - (112u << 23);
    return uint16_t(sign | ((bits + 0xfff + ((bits >> 13) & 1)) >> 13));
}

inline float from_e4m3(uint8_t bits) {
    const uint32_t byte = bits;  // its exponent is 120 below that of float32; subnormals come right by the product
    return same_bits<float>((byte & 0x80) << 24 | (byte & 0x7f) << 20) * 0x1p120f;
}

inline uint8_t to_e4m3(float x) {  // |x| ≤ 448, to nearest, ties to even
    const float size = std::fabs(x);
    const uint32_t sign = (same_bits<uint32_t>(x) >> 24) & 0x80;
    const float power = same_bits<float>(same_bits<uint32_t>(size) & 0x7f800000);
    const float step = std::max(power, 0x1p-6f) * 0.125f;  // three bits of mantissa
    const float rounded = round_to_even(size / step) * step;
    return uint8_t(sign | same_bits<uint32_t>(rounded * 0x1p-120f) >> 20);
}

inline float divisor(float scale) { return scale == 0.0f ? 1.0f : scale; }

// -- rows -------------------------------------------------------------------------------------------------------------

template <class E>
inline void read_row(const Side<E>& side, int64_t index, int64_t dim, float* out) {
    const E* from = side.row(index, dim);
    if constexpr (!QUANTIZED<E>) {
        for (int64_t d = 0; d < dim; d += LANES) store(out + d, load_as_float(from + d));
    } else if constexpr (std::is_same_v<E, Int4>) {
        const float scale = from_half(side.scales[2 * index]), minimum = from_half(side.scales[2 * index + 1]);
        for (int64_t j = 0; j < dim / 2; ++j) {
            out[2 * j] = float(int(from[j].pair & 15)) * scale + minimum;
            out[2 * j + 1] = float(int(from[j].pair >> 4)) * scale + minimum;
        }
    } else {
        const float scale = from_half(side.scales[index]);
        for (int64_t d = 0; d < dim; ++d) {
            if constexpr (std::is_same_v<E, Int8>) out[d] = float(int(from[d].value)) * scale;
            else out[d] = from_e4m3(from[d].bits) * scale;
        }
    }
}

// The largest of f(x). dim: multiple of LANES.
template <class F>
inline float largest_of(const float* x, int64_t dim, F f) {
    Vec most = f(load<Vec>(x));
    for (int64_t d = LANES; d < dim; d += LANES) {
        const Vec v = f(load<Vec>(x + d));
        most = v > most ? v : most;
    }
    float largest = most[0];
    for (int i = 1; i < LANES; ++i) largest = std::max(largest, most[i]);
    return largest;
}

template <class E>
inline void write_row(const Side<E>& side, int64_t index, int64_t dim, const float* x) {
    E* to = side.row(index, dim);
    if constexpr (!QUANTIZED<E>) {
        for (int64_t d = 0; d < dim; ++d) put(to + d, x[d]);
    } else if constexpr (std::is_same_v<E, Int4>) {
        const float low = -largest_of(x, dim, [](Vec v) { return -v; });
        const float high = largest_of(x, dim, [](Vec v) { return v; });
        uint16_t* stored = side.scales + 2 * index;
        stored[0] = to_half(std::min((high - low) / 15.0f, MOST_HALF));
        stored[1] = to_half(std::min(std::max(low, -MOST_HALF), MOST_HALF));
        const float scale = divisor(from_half(stored[0])), minimum = from_half(stored[1]);
        const auto level = [&](float v) {
            return uint8_t(round_to_even(std::min(std::max((v - minimum) / scale, 0.0f), 15.0f)));
        };
        for (int64_t j = 0; j < dim / 2; ++j) to[j].pair = uint8_t(level(x[2 * j]) | level(x[2 * j + 1]) << 4);
    } else {
        constexpr float largest = std::is_same_v<E, Int8> ? 127.0f : 448.0f;
        const float size = largest_of(x, dim, [](Vec v) { return v < Vec{} ? -v : v; });
        side.scales[index] = to_half(std::min(size / largest, MOST_HALF));
        const float scale = divisor(from_half(side.scales[index]));
        for (int64_t d = 0; d < dim; ++d) {
            const float scaled = std::min(std::max(x[d] / scale, -largest), largest);
            if constexpr (std::is_same_v<E, Int8>) to[d].value = int8_t(round_to_even(scaled));
            else to[d].bits = to_e4m3(scaled);
        }
    }
}

// Calls `work` with a value of the type that a cache is made of.
template <class F>
inline void with_cache_type(int64_t type, F work) {
    switch (type) {
        case F32: return work(float{});
        case BF16: return work(uint16_t{});
        case INT8: return work(Int8{});
        case INT4: return work(Int4{});
        case FP8: return work(Fp8{});
    }
}

}  // namespace
