"""The operations as Triton kernels: CUDA devices, and CPUs under Triton's interpreter."""
