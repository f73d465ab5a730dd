"""Building the kernel for GPUs, without one: its variants, its entry, the compiler's output looked at."""
