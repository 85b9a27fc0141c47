"""What a buffer in host memory holds is what the tensors were, wherever they begin."""

import pytest
import torch

from triptych.parallel import device
from triptych.parallel.device import HostBuffer

SHAPES = [(0, 3), (1, 1), (7, 5), (64, 1), (1, 300), (33, 8)]


@pytest.mark.parametrize("part_bytes", [1, 48, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_holds_the_bytes_of_every_tensor(dtype, part_bytes, monkeypatch):
    """Also of one that its threads share, and of those that are filled in again, and smaller."""
    monkeypatch.setattr(device, "PART_BYTES", part_bytes)
    buffer = HostBuffer()
    for shapes in (SHAPES, SHAPES[::2]):
        tensors = [torch.randn(shape).to(dtype) for shape in shapes]
        offsets, num_bytes = [], 0
        for tensor in tensors:
            offsets.append(num_bytes + 16)
            num_bytes += 16 + -(-tensor.nbytes // 16) * 16
        buffer.fill(list(zip(tensors, offsets, strict=True)), num_bytes)
        assert len(buffer.content) == num_bytes
        assert buffer.content.data_ptr() % device.PAGE_BYTES == 0
        for tensor, offset in zip(tensors, offsets, strict=True):
            assert buffer.view(offset, tensor.numel(), dtype).equal(tensor.view(-1))


def test_a_tensor_that_cannot_be_copied_is_told():
    with pytest.raises(RuntimeError):
        HostBuffer().fill([(torch.ones(4), 2)], 18)
