// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// What the forward operations do to a sum on its way to the output:
//
//   output = activation(sum + bias + residual)
//
// An activation is a pair of bounds, so that all of them are the same two instructions. NaN passes
// through, as it does in TensorFlow's ReLU and ReLU6.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_EPILOGUE_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_EPILOGUE_H_

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/kernels/cpu/vector.h"

namespace ks {
namespace KS_ISA {

struct Epilogue {
  const float* bias;      // [out_channels], or null.
  const float* residual;  // Shaped as the output, or null.
  float least, most;
  bool used;  // False: sums are stored as they are.
};

KS_INLINE Epilogue MakeEpilogue(const KsArguments& arguments) {
  const KsActivation activation = arguments.activation;
  return {arguments.bias, arguments.residual, activation == KS_LINEAR ? -__builtin_inff() : 0.0f,
          activation == KS_RELU6 ? 6.0f : __builtin_inff(),
          arguments.bias != nullptr || arguments.residual != nullptr || activation != KS_LINEAR};
}

// In this order a NaN passes, and each line is one instruction.
KS_INLINE Vec Clamp(Vec x, Vec least, Vec most) {
  x = least > x ? least : x;
  return most < x ? most : x;
}
KS_INLINE float Clamp(float x, float least, float most) {
  x = least > x ? least : x;
  return most < x ? most : x;
}

// Finishes kLanes pixels: lanes[l] holds `count` sums from `channel` on of pixel l, whose residual
// is at address residuals[l]; these addresses are read only if there is a residual.
KS_INLINE void FinishPixels(const Epilogue& epilogue, int64_t channel, int64_t count,
                            const intptr_t (&residuals)[kLanes], Vec (&lanes)[kLanes]) {
  if (epilogue.bias != nullptr) {
    const float* from = epilogue.bias + channel;
    const Vec bias = count == kLanes ? Load(from) : LoadFirst(from, count);
    KS_UNROLL
    for (int l = 0; l < kLanes; ++l) lanes[l] += bias;
  }
  if (epilogue.residual != nullptr && count == kLanes) {
    KS_UNROLL
    for (int l = 0; l < kLanes; ++l) {
      lanes[l] += Load(reinterpret_cast<const float*>(residuals[l]) + channel);
    }
  } else if (epilogue.residual != nullptr) {
    for (int l = 0; l < kLanes; ++l) {
      lanes[l] += LoadFirst(reinterpret_cast<const float*>(residuals[l]) + channel, count);
    }
  }
  const Vec least = Splat(epilogue.least), most = Splat(epilogue.most);
  KS_UNROLL
  for (int l = 0; l < kLanes; ++l) lanes[l] = Clamp(lanes[l], least, most);
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_EPILOGUE_H_
