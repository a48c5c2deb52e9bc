"""What the GEMM back ends of packed NVFP4 operands share: operands, shape rules, and what they take."""
