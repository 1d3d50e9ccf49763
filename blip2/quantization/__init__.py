"""int8 and int4 weights, bf16 packed for the CPU, and the layers that multiply with them."""
