"""What blocks did and when: records of the kernel's buffers, traces, timelines."""
