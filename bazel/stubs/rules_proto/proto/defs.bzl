"""Names that Bazel's own tools load from rules_proto, bound to the rules built into Bazel."""

ProtoInfo = ProtoInfo
proto_lang_toolchain = native.proto_lang_toolchain
proto_library = native.proto_library
