"""One thread per process: ranks are forked, and a parent that has used OpenMP threads must not fork."""

import torch

torch.set_num_threads(1)
