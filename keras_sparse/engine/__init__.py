"""Packing of kernels and choice of routines for execution by TensorFlow."""
