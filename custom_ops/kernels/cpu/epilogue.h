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

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_EPILOGUE_H_
