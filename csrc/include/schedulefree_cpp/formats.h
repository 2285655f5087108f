// The formats of a state (storage.h) in tensors: what a state needs to follow its parameter.
#pragma once

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "storage.h"

namespace schedulefree {
namespace detail {

// In how many bits a group keeps what it has.
struct Bits {
  std::int64_t state = 32;   // 24 for a bfloat16 parameter and its z in 24 bits each
  std::int64_t moment = 32;  // or 8: those of exp_avg_sq
};

inline at::ScalarType state_dtype(const at::Tensor& p) {
  return p.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The elements of a dense tensor in the order of its memory, on the CPU: a view or a copy.
inline at::Tensor in_memory_order(const at::Tensor& t) {
  return t.as_strided({t.numel()}, {1}).to(at::kCPU).contiguous();
}

inline at::Tensor like(const at::Tensor& p, at::ScalarType dtype) {
  return at::empty_like(p, p.options().dtype(dtype).requires_grad(false));
}

// Whether a dense tensor lies in memory as like() lays it out.
inline bool lies_like(const at::Tensor& t, const at::Tensor& p) {
  return t.strides() == p.strides() || t.strides() == at::infer_dense_strides(p.sizes(), p.strides());
}

// Writes elements in the order of memory.
inline void fill_memory(const at::Tensor& t, const at::Tensor& elements) {
  t.as_strided({t.numel()}, {1}).copy_(elements);
}

// z as a bfloat16 and a low half of 8 bits, rounded to nearest, ties to even.
inline std::pair<at::Tensor, at::Tensor> split_24(const at::Tensor& z) {
  const at::Tensor wide = in_memory_order(z.to(at::kDouble));
  const at::Tensor words = at::empty(wide.sizes(), at::kShort), lows = at::empty(wide.sizes(), at::kChar);
  const double* const from = wide.const_data_ptr<double>();
  auto* const word = reinterpret_cast<std::uint16_t*>(words.mutable_data_ptr<std::int16_t>());
  std::int8_t* const low = lows.mutable_data_ptr<std::int8_t>();
  for (std::int64_t i = 0; i < wide.numel(); ++i) Split24::narrow(Split24::rounded(from[i]), word[i], low[i]);
  const at::Tensor high = like(z, at::kBFloat16), rest = like(z, at::kChar);
  fill_memory(high, words.view(at::kBFloat16));
  fill_memory(rest, lows);
  return {high, rest};
}

inline at::Tensor join_24(const at::Tensor& z, const at::Tensor& z_lo) {
  const at::Tensor words = in_memory_order(z).view(at::kShort), lows = in_memory_order(z_lo);
  const at::Tensor wide = at::empty(words.sizes(), at::kFloat);
  const auto* const word = reinterpret_cast<const std::uint16_t*>(words.const_data_ptr<std::int16_t>());
  const std::int8_t* const low = lows.const_data_ptr<std::int8_t>();
  float* const to = wide.mutable_data_ptr<float>();
  for (std::int64_t i = 0; i < wide.numel(); ++i) to[i] = Split24::widen(word[i], low[i]);
  const at::Tensor result = like(z, at::kFloat);
  fill_memory(result, wide);
  return result;
}

inline std::int64_t scales_for(const at::Tensor& p) {
  return (p.numel() + Moment8::kBlock - 1) / Moment8::kBlock;
}

// A second moment of 8 bits and its scales, rounded to nearest.
inline std::pair<at::Tensor, at::Tensor> encode_8(const at::Tensor& v) {
  const at::Tensor wide = in_memory_order(v.to(at::kFloat));
  const at::Tensor codes = at::empty(wide.sizes(), at::kByte),
                   scales = at::empty({scales_for(v)}, at::kFloat);
  const float* const from = wide.const_data_ptr<float>();
  std::uint8_t* const code = codes.mutable_data_ptr<std::uint8_t>();
  float* const scale = scales.mutable_data_ptr<float>();
  for (std::int64_t begin = 0; begin < wide.numel(); begin += Moment8::kBlock) {
    const std::int64_t end = std::min(begin + Moment8::kBlock, wide.numel());
    std::uint32_t largest = 0;
    for (std::int64_t i = begin; i < end; ++i) largest = std::max(largest, Moment8::order(from[i]));
    const float s = Moment8::scale(largest);
    for (std::int64_t i = begin; i < end; ++i) code[i] = Moment8::encoded(from[i], s, Moment8::kHalf);
    scale[begin / Moment8::kBlock] = s;
  }
  const at::Tensor result = like(v, at::kByte);
  fill_memory(result, codes);
  return {result, scales.to(v.device())};
}

inline at::Tensor decode_8(const at::Tensor& codes, const at::Tensor& scales) {
  const at::Tensor from = in_memory_order(codes), by = scales.to(at::kCPU).contiguous();
  const at::Tensor wide = at::empty(from.sizes(), at::kFloat);
  const std::uint8_t* const code = from.const_data_ptr<std::uint8_t>();
  const float* const scale = by.const_data_ptr<float>();
  float* const to = wide.mutable_data_ptr<float>();
  for (std::int64_t i = 0; i < wide.numel(); ++i)
    to[i] = Moment8::decoded(code[i], scale[i / Moment8::kBlock]);
  const at::Tensor result = like(codes, at::kFloat);
  fill_memory(result, wide);
  return result;
}

// Moves and converts a state to where its parameter is and to the formats that belong to it.
template <typename State>
void match(State& state, const at::Tensor& p, const Bits& bits) {
  for (const auto& entry : state.tensors())
    if (entry.second->defined()) *entry.second = entry.second->to(p.device());

  // bfloat16 and float16 both have low halves of 16 bits, and each its own.
  if (state.dtype != p.scalar_type()) state.y_lo.reset();
  state.dtype = p.scalar_type();
  // With its low half, a parameter of 16 bits keeps the precision of float32, or 16 bits of it.
  const bool bf16 = p.scalar_type() == at::kBFloat16, of_24_bits = bf16 && bits.state == 24;
  if (!bf16 && p.scalar_type() != at::kHalf) {
    state.y_lo.reset();
  } else {
    const at::ScalarType dtype = of_24_bits ? at::kChar : at::kShort;
    at::Tensor& low = state.y_lo;
    if (!low.defined()) {
      low = at::zeros_like(p, p.options().dtype(dtype).requires_grad(false));
    } else if (low.scalar_type() == at::kChar && dtype == at::kShort) {
      low = low.to(at::kShort).mul_(256);
    } else if (low.scalar_type() == at::kShort && dtype == at::kChar) {
      low = low.to(at::kInt).add_(128).bitwise_right_shift_(8).clamp_(-128, 127).to(at::kChar);
    }
  }

  const at::ScalarType wide = state_dtype(p);
  if (state.z_lo.defined() && !of_24_bits) {
    state.z = join_24(state.z, state.z_lo);
    state.z_lo.reset();
  }
  if (state.z.defined()) {
    if (!of_24_bits)
      state.z = state.z.to(wide);
    else if (!state.z_lo.defined())
      std::tie(state.z, state.z_lo) = split_24(state.z);
  }

  const bool of_8_bits = bits.moment == 8 && wide == at::kFloat;
  // Scales count in the memory of the codes, as a step does in that of the parameter: it may have another
  // now.
  if (state.exp_avg_sq_scale.defined() && !(of_8_bits && lies_like(state.exp_avg_sq, p))) {
    state.exp_avg_sq = like(p, at::kFloat).copy_(decode_8(state.exp_avg_sq, state.exp_avg_sq_scale));
    state.exp_avg_sq_scale.reset();
  }
  if (state.exp_avg_sq.defined()) {
    if (!of_8_bits)
      state.exp_avg_sq = state.exp_avg_sq.to(wide);
    else if (!state.exp_avg_sq_scale.defined())
      std::tie(state.exp_avg_sq, state.exp_avg_sq_scale) = encode_8(state.exp_avg_sq);
  }
  if (state.exp_avg.defined()) state.exp_avg = state.exp_avg.to(wide);
}

}  // namespace detail
}  // namespace schedulefree
