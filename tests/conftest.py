"""Every test runs on one thread and with the same random examples, so that a failure here is a failure anywhere."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined: here kernels run on the CPU.

from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("rorqual", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("rorqual")
