"""Where tests of what runs on a device run: on the machine's accelerator, if torch finds one."""

import torch

DEVICE = str(torch.accelerator.current_accelerator() or "cpu")
