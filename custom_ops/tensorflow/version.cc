// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// The version of TensorFlow this library was built for. The C++ interface of TensorFlow holds
// within one minor version only, so a reader must know it before the library is loaded: it is found
// in the file's bytes, after the marker.

#ifndef KS_TF_VERSION
#error "Define KS_TF_VERSION as the version of TensorFlow this library is built for."
#endif

namespace {
// The closing semicolon ends the version in the file's bytes.
__attribute__((used)) const char kMarkedVersion[] =
    "keras_sparse-tensorflow-version:" KS_TF_VERSION ";";
}  // namespace

extern "C" {
__attribute__((visibility("default"))) const char* ks_tensorflow_version() { return KS_TF_VERSION; }

__attribute__((visibility("default"))) const char* ks_tensorflow_version_marker() {
  return kMarkedVersion;
}
}  // extern "C"
