"""Tensors that stay on one device and are on another only while they are computed with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def visiting(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """The tensors are on `device` within, and after it, whatever happened, what and where they were.

    Nothing is copied back, so that what is written to them within is lost.
    """
    kept = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, home in kept:
            tensor.data = home.to(device)
        yield
    finally:
        for tensor, home in kept:
            tensor.data = home
