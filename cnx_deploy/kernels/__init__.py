"""Own GPU kernels for what follows the depthwise convolution of a block, written in Triton."""
